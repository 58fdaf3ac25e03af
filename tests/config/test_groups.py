"""The groups of a configuration: defaults, what is derived, what is refused, the published config.json."""

import json

import pytest

from glm3kit.config.groups import DataConfig, ModelConfig, RunConfig, TrainConfig
from glm3kit.errors import ConfigError


def test_defaults_are_those_of_chatglm3_6b():
    m = RunConfig().model
    assert (m.num_layers, m.padded_vocab_size, m.hidden_size, m.ffn_hidden_size) == (28, 65024, 4096, 13696)
    assert (m.kv_channels, m.num_attention_heads, m.multi_query_group_num, m.seq_length) == (128, 32, 2, 2048)


def test_the_published_config_json_is_read(golden):
    m = ModelConfig.from_hf(golden / "hf/config.json", compute_dtype="float32")
    assert (m.num_layers, m.hidden_size, m.param_dtype, m.compute_dtype) == (3, 64, "float16", "float32")


@pytest.mark.parametrize("change, reason", [({"model_type": "llama"}, "model_type is 'llama'"),
                                            ({"rmsnorm": False}, r"rmsnorm False \(expected True\)"),
                                            ({"hidden_size": "64"}, "hidden_size: should be a valid integer")])
def test_a_config_json_of_another_model_is_refused(golden, tmp_path, change, reason):
    published = json.loads((golden / "hf/config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(ConfigError, match=reason):
        ModelConfig.from_hf(tmp_path / "config.json")


def test_values_out_of_range_are_refused():
    for wrong in ({"batch_size": 0}, {"eps": 0.0}, {"learning_rate": -1.0}):
        with pytest.raises(ValueError):
            TrainConfig(**wrong)


def test_the_window_is_derived_in_code_too_and_no_default_conflicts():
    rows = {"max_source_length": 64, "max_target_length": 127}
    assert RunConfig(data=rows).model.seq_length == 192
    assert RunConfig(data=DataConfig(**rows), model=ModelConfig(num_layers=2)).model.seq_length == 192
    assert RunConfig(data={"packing": True}).model.seq_length == 2048
    with pytest.raises(ValueError, match="model.seq_length is 100, but in data max_seq_length is 192"):
        RunConfig(data={"max_seq_length": 192}, model={"seq_length": 100})
