"""Random weights: their spread, their seed, the published form."""

import json

import numpy as np
import pytest
import safetensors.numpy
from support import TOKENIZER, assert_golden

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.weights.convert import convert_weights
from glm3kit.weights.random import write_random_hub_weights
from glm3kit.weights.read import read_weights

EMBEDDING = "transformer.embedding.embedding_table"
OUTPUT = "transformer.output_layer.weight"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_random_hub_weights_have_the_published_form(dtype, hub, tmp_path):
    cfg = ModelConfig.from_hf(hub / "config.json", param_dtype=dtype)
    write_random_hub_weights(cfg, tmp_path / "hub", seed=7)
    golden_index = json.loads((hub / INDEX).read_text())
    index = json.loads((tmp_path / "hub" / INDEX).read_text())
    assert set(index["weight_map"]) == set(golden_index["weight_map"])
    assert set(index["weight_map"].values()) == set(golden_index["weight_map"].values())
    assert index["metadata"]["total_size"] == golden_index["metadata"]["total_size"] * (2 if dtype == "float32" else 1)
    golden_config = json.loads((hub / "config.json").read_text())
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert set(config) == set(golden_config)
    assert config == golden_config | {"torch_dtype": dtype}
    assert {spec.dtype for spec in read_weights(tmp_path / "hub").specs.values()} == {dtype}
    convert_weights(tmp_path / "hub", tmp_path / "t.ckpt", progress=False)


def test_random_weights_are_spread_as_gpt2_s_are_and_follow_the_seed(tmp_path):
    cfg = ModelConfig(num_layers=8, padded_vocab_size=512, hidden_size=64, ffn_hidden_size=176, kv_channels=16,
                      num_attention_heads=4, param_dtype="float32")
    first = read_weights(write_random_hub_weights(cfg, tmp_path / "a", seed=1))
    again = read_weights(write_random_hub_weights(cfg, tmp_path / "b", seed=1))
    other = read_weights(write_random_hub_weights(cfg, tmp_path / "c", seed=2))
    layer = "transformer.encoder.layers.3."
    assert first[OUTPUT].std() == pytest.approx(0.02, rel=0.03)
    assert first[layer + "self_attention.dense.weight"].std() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8) = 4
    assert first[layer + "mlp.dense_4h_to_h.weight"].std() == pytest.approx(0.02 / 4, rel=0.05)
    assert (first[layer + "input_layernorm.weight"] == 1).all()
    assert (first[layer + "self_attention.query_key_value.bias"] == 0).all()
    assert not np.array_equal(first[OUTPUT], first[EMBEDDING])
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first[OUTPUT], other[OUTPUT])


def test_rotary_constants_are_the_published_ones(hub, published, tmp_path):
    write_random_hub_weights(ModelConfig.from_hf(hub / "config.json"), tmp_path)
    name = "transformer.rotary_pos_emb.inv_freq"
    shard = json.loads((tmp_path / INDEX).read_text())["weight_map"][name]
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / shard)[name], published[name])


def test_random_weights_never_replace_others_without_force(copied, published):
    cfg = ModelConfig.from_hf(copied / "config.json")
    with pytest.raises(CheckpointError, match="holds weights already"):
        write_random_hub_weights(cfg, copied)
    assert_golden(read_weights(copied), published)
    write_random_hub_weights(cfg, copied, force=True)
    assert not np.array_equal(read_weights(copied)[OUTPUT], published[OUTPUT])


def test_a_tokenizer_is_copied_beside_random_weights(hub, tmp_path):
    write_random_hub_weights(ModelConfig.from_hf(hub / "config.json"), tmp_path, tokenizer=TOKENIZER)
    assert (tmp_path / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
