"""Several real processes give what one gives: data parallel, tensor parallel, both."""

import json

import numpy as np
import pytest
from four_ranks import ReferenceRun, answers
from support import GOLDEN

from glm3kit.checkpoint.merge import merge, merged_tensors
from glm3kit.config.groups import ModelConfig, ParallelConfig, RunConfig
from glm3kit.errors import ConfigError
from glm3kit.parallel import ALONE, shard_of, start_processes
from glm3kit.weights.formats.safetensors import read_safetensors
from glm3kit.weights.read import read_weights


def test_shards_hold_every_value_once():
    values = np.arange(1, 11, dtype=np.float32).reshape(2, 5)
    shards = [shard_of(values, rank, 4) for rank in range(4)]
    assert [shard.shape for shard in shards] == [(3,)] * 4
    np.testing.assert_array_equal(np.concatenate(shards)[:10].reshape(2, 5), values)
    np.testing.assert_array_equal(np.concatenate(shards)[10:], 0)


def test_a_number_of_processes_that_was_not_asked_for_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK_SIZE", "4")
    with pytest.raises(ConfigError, match=r"data_parallel 2 x tensor_parallel 1 = 2 process\(es\), 4 started"):
        start_processes(ParallelConfig(data_parallel=2, device_target="CPU"))


def test_a_layout_that_does_not_divide_is_an_error_that_says_what_would_do():
    assert RunConfig(parallel=ParallelConfig(tensor_parallel=8)).parallel.ranks == 8, "four ranks a group"
    with pytest.raises(ValueError, match="3, which does not divide num_attention_heads 32, multi_query_group_num 2, "
                                         "ffn_hidden_size 13696, padded_vocab_size 65024; these would do: 1, 2, 4, 8"):
        RunConfig(parallel=ParallelConfig(tensor_parallel=3))
    odd = ModelConfig(padded_vocab_size=65026)
    with pytest.raises(ValueError, match="4, which does not divide padded_vocab_size 65026; these would do: 1, 2 "):
        RunConfig(model=odd, parallel=ParallelConfig(tensor_parallel=4))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The weights after the reference's steps in one process."""
    folder = tmp_path_factory.mktemp("one")
    ReferenceRun(ALONE).train(folder)
    return merged_tensors(folder)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks, slices, name", [
    (2, 1, "golden_2x1"), (2, 1, "golden_2x1_unsharded"), (2, 2, "golden_1x2"), (4, 4, "golden_1x4"),
    (4, 2, "golden_2x2"), (4, 2, "golden_2x2_unsharded")])
def test_processes_train_as_one_and_merge_to_its_weights(ranks, slices, name, one, four_ranks, tmp_path):
    folder = four_ranks / name
    reference = np.load(GOLDEN / "reference.npz")
    records = json.loads((folder / "records.json").read_text())
    np.testing.assert_allclose([r["loss"] for r in records], reference["train.loss"], rtol=1e-4)
    np.testing.assert_allclose([r["grad_norm"] for r in records], reference["train.grad_norm"], rtol=1e-4)

    shards = sorted(path.name for path in (folder / "checkpoint/step_20/model").glob("rank_*"))
    assert shards == [f"rank_{rank}.safetensors" for rank in range(slices)]
    state = [read_safetensors(path)
             for path in (folder / "checkpoint/step_20/optimizer").glob("rank_*.safetensors")]
    assert len(state) == ranks
    table = "exp_avg.transformer.embedding.embedding_table"
    assert {file.specs[table].nbytes for file in state} == {
        one[table.removeprefix("exp_avg.")].nbytes // (slices if "unsharded" in name else ranks)}
    merged = read_weights(merge(folder, tmp_path / "merged.safetensors", progress=False))
    assert merged.specs == one.specs
    for name in one:
        difference = np.abs(merged[name] - one[name]).max()
        if not name.endswith("query_key_value.bias"):  # some of it is noise: see train/test_run.py
            assert difference <= 1e-4 * np.abs(one[name]).max(), (name, difference)


@pytest.mark.ranks
def test_adapters_train_on_four_processes_as_in_the_reference(four_ranks, tmp_path):
    reference = np.load(GOLDEN / "lora.npz")
    folder = four_ranks / "golden_2x2_lora"
    records = json.loads((folder / "records.json").read_text())
    np.testing.assert_allclose([r["loss"] for r in records], reference["loss"], rtol=1e-4)
    merged = read_weights(merge(folder, tmp_path / "merged.safetensors", progress=False))
    for layer in range(3):
        weight = merged[f"transformer.encoder.layers.{layer}.self_attention.query_key_value.weight"]
        np.testing.assert_allclose(weight, reference[f"merged_qkv.{layer}"], atol=2e-5)


@pytest.mark.ranks
def test_processes_that_share_a_model_generate_as_one(four_ranks):
    first, second = (json.loads((four_ranks / f"answers_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert "seed is None, expected a number" in first.pop("without a seed")
    assert first == answers()
