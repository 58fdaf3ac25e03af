"""Merging: whole weights from the shards of a run, of this kit and of MindFormers; damage is named."""

import json
import shutil

import numpy as np
import pytest

from glm3kit.checkpoint import newest_checkpoint, weight_layouts
from glm3kit.config import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.merge import merge, merged_tensors
from glm3kit.model import ChatGLM3, slicing
from glm3kit.parallel import Topology
from glm3kit.safetensors_file import write_safetensors
from glm3kit.strategy import write_strategy
from glm3kit.weights import random_weights, read_weights

TINY = ModelConfig(num_layers=2, padded_vocab_size=64, hidden_size=16, ffn_hidden_size=24, kv_channels=8,
                   num_attention_heads=4, seq_length=48, param_dtype="float32", compute_dtype="float32")
WEIGHTS = random_weights(TINY, seed=3)


@pytest.fixture
def sharded(tmp_path):
    """A job folder with the weights in two slices of tensor parallelism."""
    job = tmp_path / "job"
    folder = job / "checkpoint" / "step_7" / "model"
    for rank in range(2):
        parts = {}
        for name in WEIGHTS:
            cut = slicing(name, TINY)
            parts[name] = cut.part(WEIGHTS[name], rank, 2) if cut else WEIGHTS[name]
        write_safetensors(folder / f"rank_{rank}.safetensors", parts)
    (folder.parent / "complete.json").write_text("{}")
    write_strategy(job / "strategy" / "strategy.json", weight_layouts(ChatGLM3(TINY), Topology(0, 1, 2)))
    return job


def test_merged_shards_equal_the_unsharded_weights(sharded, tmp_path):
    for name in ("merged.safetensors", "merged.ckpt"):
        merged = read_weights(merge(sharded, tmp_path / name, progress=False))
        assert list(merged.specs.items()) != [] and dict(merged.specs) == dict(WEIGHTS.specs)
        for parameter in WEIGHTS:
            np.testing.assert_array_equal(merged[parameter], WEIGHTS[parameter], parameter)


def test_a_checkpoint_and_a_folder_of_shards_merge_like_their_job(sharded):
    step = newest_checkpoint(sharded)
    for source in (step, step / "model"):
        assert merged_tensors(source).specs == merged_tensors(sharded).specs
    moved = shutil.copytree(step / "model", sharded.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="strategy.json: cannot be read"):
        merged_tensors(moved)
    assert len(merged_tensors(moved, sharded / "strategy")) == len(WEIGHTS)


def test_a_missing_rank_is_named(sharded):
    (newest_checkpoint(sharded) / "model" / "rank_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing: rank 1, for pieces of 12 parameters"):
        merged_tensors(sharded)


def test_a_cut_file_is_an_error_and_leaves_no_result(sharded, tmp_path):
    path = newest_checkpoint(sharded) / "model" / "rank_1.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="rank_1.safetensors.*cut off"):
        merge(sharded, tmp_path / "merged.safetensors", progress=False)
    assert not (tmp_path / "merged.safetensors").exists()


def test_the_strategy_of_another_run_is_an_error(sharded):
    path = sharded / "strategy" / "strategy.json"
    strategy = json.loads(path.read_text())
    layouts = strategy["parallel_layout_item"]
    layouts["transformer.encoder.layers.9.mlp.dense_4h_to_h.weight"] = layouts["transformer.output_layer.weight"]
    path.write_text(json.dumps(strategy))
    with pytest.raises(CheckpointError, match="strategy file is of another run.*layers.9"):
        merged_tensors(sharded)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="no strategy file of MindSpore's"):
        merged_tensors(sharded)


def test_slices_of_unequal_shape_are_an_error(sharded):
    path = newest_checkpoint(sharded) / "model" / "rank_1.safetensors"
    parts = dict(read_weights(path))
    parts["transformer.output_layer.weight"] = parts["transformer.output_layer.weight"][:-1]
    write_safetensors(path, parts)
    with pytest.raises(CheckpointError, match=r"output_layer.weight': pieces .*32, 16\], .*31, 16\]\] differ"):
        merged_tensors(sharded)


def test_an_existing_result_is_not_replaced_without_force(sharded, tmp_path):
    (tmp_path / "merged.ckpt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        merge(sharded, tmp_path / "merged.ckpt", progress=False)
    merge(sharded, tmp_path / "merged.ckpt", progress=False, force=True)


def test_a_folder_without_a_complete_checkpoint_is_an_error(tmp_path):
    (tmp_path / "checkpoint" / ".step_3.tmp").mkdir(parents=True)
    (tmp_path / "checkpoint" / "step_4").mkdir()  # no completion marker
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        merge(tmp_path, tmp_path / "merged.safetensors")
