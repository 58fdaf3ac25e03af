"""MindFormers' YAML: the model it describes is read, what has no use here is named, another model is refused."""

import warnings
from pathlib import Path

import pytest

from glm3kit import AutoConfig, load_config
from glm3kit.errors import ConfigError

# The form of MindFormers 1.1's configs/glm3/*.yaml, with other sizes.
SIZES = """\
seed: 0
run_mode: 'predict'
context:
  mode: 0
  device_target: "Ascend"
model:
  model_config:
    type: ChatGLM2Config
    batch_size: 1
    num_layers: 3
    padded_vocab_size: 65024
    hidden_size: 64
    ffn_hidden_size: 176
    kv_channels: 16
    num_attention_heads: 4
    seq_length: 96
    layernorm_epsilon: 1e-6
    rmsnorm: True
    multi_query_group_num: 2
    quantization_bit: 0
    pre_seq_len: None
    param_init_type: "bfloat16"
    compute_dtype: "float32"
    max_decode_length: 256
    checkpoint_name_or_path: "/weights/glm3_6b.ckpt"
  arch:
    type: ChatGLM2ForConditionalGeneration
processor:
  tokenizer:
    type: ChatGLM3Tokenizer
    vocab_file: "/weights/tokenizer.model"
runner_config:
  epochs: 1
  batch_size: 8
"""


@pytest.fixture
def write(tmp_path):
    def write_yaml(old: str = "", new: str = "") -> Path:
        assert old in SIZES
        path = tmp_path / "predict.yaml"
        path.write_text(SIZES.replace(old, new) if old else SIZES, encoding="utf-8")
        return path

    return write_yaml


def read(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return AutoConfig.from_pretrained(path)


def test_sizes_types_and_paths_are_read(write):
    assert read(write()).model_dump() == {
        "num_layers": 3, "padded_vocab_size": 65024, "hidden_size": 64, "ffn_hidden_size": 176, "kv_channels": 16,
        "num_attention_heads": 4, "multi_query_group_num": 2, "layernorm_epsilon": 1e-6, "seq_length": 96,
        "param_dtype": "bfloat16", "compute_dtype": "float32", "checkpoint_name_or_path": "/weights/glm3_6b.ckpt",
        "tokenizer_path": "/weights/tokenizer.model", "adapters_path": None,
            "use_flash_attention": False}


def test_all_that_has_no_use_here_is_named_in_one_warning(write):
    with pytest.warns(UserWarning) as warned:
        AutoConfig.from_pretrained(write())
    (message,) = [str(warning.message) for warning in warned]
    assert "has no effect here: seed, run_mode, context, model.model_config.batch_size, " \
           "model.model_config.max_decode_length, processor.tokenizer.type, runner_config; give" in message
    assert warned[0].filename == __file__


def test_what_is_left_out_has_the_values_of_chatglm3_6b(tmp_path):
    (tmp_path / "few.yaml").write_text("model:\n  model_config:\n    num_layers: 2\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to report
        config = AutoConfig.from_pretrained(tmp_path / "few.yaml")
    assert (config.num_layers, config.hidden_size, config.param_dtype) == (2, 4096, "float16")
    assert config.checkpoint_name_or_path is config.tokenizer_path is None


def test_paths_start_in_the_working_directory_and_an_empty_one_is_none(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = read(write("/weights/glm3_6b.ckpt", "./glm3/6b.ckpt"))
    assert relative.checkpoint_name_or_path == str(tmp_path / "glm3/6b.ckpt")
    assert read(write("/weights/glm3_6b.ckpt", "")).checkpoint_name_or_path is None
    (tmp_path / "merged").mkdir()
    assert read(write("/weights/glm3_6b.ckpt", "merged")).checkpoint_name_or_path == str(tmp_path / "merged")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("type: ChatGLM2Config", "type: LlamaConfig", "yaml:8: model.model_config.type is 'LlamaConfig', expected 'Cha"),
    ("ForConditionalGeneration", "WithPtuning2", "yaml:27: model.arch.type is 'ChatGLM2WithPtuning2'"),
    ("quantization_bit: 0", "quantization_bit: 4", "yaml:20: model.model_config.quantization_bit is 4, expected 0"),
    ("pre_seq_len: None", "pre_seq_len: 128", "yaml:21: model.model_config.pre_seq_len is 128, expected None"),
    ("num_layers: 3", "num_layer: 3", "yaml:10: model.model_config.num_layer: unknown key; did you mean 'num_layers'"),
    ("hidden_size: 64", "hidden_size: big", "yaml:12: hidden_size: should be a valid integer, got 'big'"),
    ('type: "bfloat16"', 'type: "int8"', "yaml:22: param_dtype: should be 'float32', 'float16' or 'bfloat16'"),
    ("num_attention_heads: 4", "num_attention_heads: 5", "num_attention_heads 5 is no multiple of"),
    ("/weights/glm3_6b.ckpt", "glm3_6b", "yaml:25: checkpoint_name_or_path is 'glm3_6b', a model that MindFormers"),
])
def test_another_model_and_a_mistyped_key_are_errors_with_their_line(write, old, new, message):
    with pytest.raises(ConfigError, match=message):
        read(write(old, new))


def test_faults_are_reported_together(write):
    with pytest.raises(ConfigError, match="(?s)type is 'LlamaConfig'.*type is 'LlamaModel'"):
        path = write("ChatGLM2Config", "LlamaConfig")
        path.write_text(path.read_text().replace("ChatGLM2ForConditionalGeneration", "LlamaModel"))
        read(path)


def test_the_kits_own_form_is_read_too(tmp_path):
    (tmp_path / "own.yaml").write_text("model: {num_layers: 2, checkpoint_name_or_path: weights}\n")
    config = AutoConfig.from_pretrained(tmp_path / "own.yaml")
    assert config == load_config(tmp_path / "own.yaml").model
    assert config.checkpoint_name_or_path == str(tmp_path / "weights")


def test_a_run_cannot_be_made_of_it_and_the_error_says_so(write):
    with pytest.raises(ConfigError, match="MindFormers' form, of which AutoConfig.from_pretrained reads the model"):
        load_config(write())
