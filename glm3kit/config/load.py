"""A configuration file with its overrides -> RunConfig: what departs from the defaults, checked before anything starts.

Relative paths in a file are relative to that file's folder; in an override, to the working directory.

    config = load_config("configs/tiny.yaml", ["train.batch_size=2"])
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glm3kit.config.faults import validated
from glm3kit.config.groups import RunConfig, absolute_paths
from glm3kit.config.yaml_lines import parse_yaml, read_yaml
from glm3kit.errors import ConfigError


def is_mindformers(values: dict) -> bool:
    """Whether a parsed YAML has MindFormers' form, which `glm3kit.config.mindformers` reads."""
    return isinstance(values.get("model"), dict) and isinstance(values["model"].get("model_config"), dict)


def _parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    """"train.batch_size=2" -> (("train", "batch_size"), 2); raises ConfigError for another form."""
    key, equals, value = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"override '{override}': expected group.key=value, such as train.batch_size=2")
    parsed, _ = parse_yaml(f"value: {value.strip() or 'null'}", f"override '{override}'")
    return keys, absolute_paths(parsed["value"], Path.cwd(), keys[-1])


def _with(values: Any, keys: tuple[str, ...], value: Any) -> Any:
    """The values with one replaced, in groups that are created where there are none."""
    if not keys:
        return value
    group = values if isinstance(values, dict) else {}
    return group | {keys[0]: _with(group.get(keys[0]), keys[1:], value)}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration file and apply overrides such as "train.batch_size=2".

    The name of the run is the file's name unless `name` is given; results go to `output` in the working directory
    unless `output_dir` is given.
    Raises ConfigError that lists all faults together, each with file and line: unknown keys, wrong types, keys that
    stand twice, a seq_length that does not match the data.
    """
    path = Path(path)
    values, lines = read_yaml(path)
    if is_mindformers(values):
        raise ConfigError(f"{path}: this is MindFormers' form, of which AutoConfig.from_pretrained reads the model; "
                          "for everything else copy the values that differ into one of the files in configs/")
    values = {"name": path.stem, "output_dir": str(Path("output").resolve())} | absolute_paths(values, path.parent)

    faults: list[str] = []
    where: dict[tuple, int | str] = dict(lines)
    for override in overrides:
        try:
            keys, value = _parse_override(override)
        except ConfigError as err:
            faults.append(str(err))
            continue
        values = _with(values, keys, value)
        where[keys] = f"override '{override}'"
    try:
        config = validated(RunConfig, values, where, str(path))
    except ConfigError as err:
        faults.append(str(err))
    if faults:
        raise ConfigError("\n".join(faults))
    return config
