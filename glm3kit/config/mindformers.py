"""AutoConfig: the model of a configuration file, in the kit's form or in MindFormers' own.

A YAML of MindFormers 1.1, such as its configs/glm3/predict_glm3_6b.yaml, names the model under `model.model_config` and
the tokenizer under `processor.tokenizer.vocab_file`. What it says beyond that is reported, not dropped in silence.

    config = AutoConfig.from_pretrained("predict_glm3_6b.yaml"); model = AutoModel.from_config(config)
"""

import difflib
import os
import warnings
from pathlib import Path
from typing import Any

from glm3kit.config.faults import validated
from glm3kit.config.groups import ARCHITECTURE, ModelConfig
from glm3kit.config.load import is_mindformers, load_config
from glm3kit.config.yaml_lines import read_yaml
from glm3kit.errors import ConfigError

MODEL = ("model", "model_config")  # where the file has the model
WEIGHTS, VOCABULARY = (*MODEL, "checkpoint_name_or_path"), ("processor", "tokenizer", "vocab_file")
# Where each field of ModelConfig stands; those not named here have the same name under model.model_config.
PLACES = {field: (*MODEL, field) for field in ModelConfig.model_fields} | {
    "param_dtype": (*MODEL, "param_init_type"), "tokenizer_path": VOCABULARY}
# What the file may say because ChatGLM3 is so; another value asks for what is not here.
FIXED = {(*MODEL, key): value for key, value in (ARCHITECTURE | {
    "type": "ChatGLM2Config", "rope_ratio": 1, "quantization_bit": 0, "pre_seq_len": None, "prefix_projection": False,
    "fp32_residual_connection": False}).items()} | {("model", "arch", "type"): "ChatGLM2ForConditionalGeneration"}


def _leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every value that is no mapping, by the path of its keys."""
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in values.items():
        leaves |= _leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return leaves


def _model_fields(values: dict[str, Any], lines: dict[tuple, int],
                  source: str) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Fields of ModelConfig that a parsed MindFormers YAML gives, and the paths of the keys that have no use here.

    lines: the line of each key, for messages.
    Raises ConfigError, all faults together, for another model or architecture, a mistyped key of the model, and weights
    that are a name to download.
    """
    fields, ignored, faults = {}, [], []
    field_of = {place: field for field, place in PLACES.items()}
    for place, value in _leaves(values).items():
        value = None if value == "None" else value  # Python's word, which YAML reads as a text
        at = f"{source}:{lines.get(place, 1)}"  # a merged key (<<) has no line of its own
        where = f"{at}: {'.'.join(place)}"
        if place in (WEIGHTS, VOCABULARY) and isinstance(value, str):  # from the working directory, "" for none
            path = Path(os.path.expanduser(value))
            if place == WEIGHTS and path.name == value and not path.suffix and not path.exists():
                faults.append(f"{at}: checkpoint_name_or_path is '{value}', a model that MindFormers would download; "
                              "give the path of the weights here, or '' for random ones")
            value = str(path.resolve()) if value else None
        if place in field_of:
            fields[field_of[place]] = value
        elif place in FIXED:
            if value != FIXED[place]:
                faults.append(f"{where} is {value!r}, expected {FIXED[place]!r}: the kit has ChatGLM3 only")
        elif place[:2] == MODEL and (near := difflib.get_close_matches(
                place[2], [known[2] for known in {*field_of, *FIXED} if known[:2] == MODEL], 1, cutoff=0.88)):
            faults.append(f"{where}: unknown key; did you mean '{near[0]}'?")
        else:
            ignored.append(place)
    if faults:
        raise ConfigError("\n".join(faults))
    return fields, ignored


class AutoConfig:
    """The name that MindFormers' scripts use for reading a model's configuration."""

    @staticmethod
    def from_pretrained(path: str | Path) -> ModelConfig:
        """The model of a configuration file, in the kit's form or in MindFormers'.

        In the kit's form `seq_length` is derived where the file has data. Of MindFormers' form the sizes, types,
        weights (`model.model_config.checkpoint_name_or_path`) and tokenizer are read, relative paths from the working
        directory; a UserWarning names everything else, such as the settings of training and of generation.
        Raises ConfigError that lists all faults together, each with file and line.
        """
        path = Path(path)
        values, lines = read_yaml(path)
        if not is_mindformers(values):
            return load_config(path).model
        fields, ignored = _model_fields(values, lines, str(path))
        places = {(field,): lines[place] for field, place in PLACES.items() if place in lines}
        config = validated(ModelConfig, fields, places, str(path))
        if ignored:  # of groups other than the model's and the processor's only the group is named
            names = dict.fromkeys(".".join(place if place[0] in ("model", "processor") else place[:1])
                                  for place in ignored)
            warnings.warn(f"{path}: has no effect here: {', '.join(names)}; give settings of generation to "
                          "model.generate, settings of training in the kit's form (configs/)", stacklevel=2)
        return config
