"""Merging: whole weights from the shards of a run, of this kit and of MindFormers; damage is named."""

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from glm3kit.checkpoint.folder import newest_checkpoint
from glm3kit.checkpoint.layout import Layout
from glm3kit.checkpoint.merge import merge, merged_tensors
from glm3kit.checkpoint.strategy import write_strategy
from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import Topology
from glm3kit.train.saving import weight_layouts
from glm3kit.weights.formats.safetensors import read_safetensors, write_safetensors
from glm3kit.weights.random import random_weights
from glm3kit.weights.read import read_weights
from glm3kit.weights.slices import slicing

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
            parts[name] = cut.slice_of(WEIGHTS[name], rank, 2) if cut else WEIGHTS[name]
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


def test_merged_weights_may_be_a_folder_of_files_up_to_a_size(sharded, tmp_path):
    folder = merge(sharded, tmp_path / "merged", max_shard_size=8000, progress=False)
    files = [read_safetensors(path).nbytes for path in folder.glob("*.safetensors")]
    assert len(files) > 1 and max(files) <= 8000
    merged = read_weights(folder)
    for parameter in WEIGHTS:
        np.testing.assert_array_equal(merged[parameter], WEIGHTS[parameter], parameter)


def test_blocks_that_are_written_are_the_whole_bit_by_bit(sharded, monkeypatch):
    monkeypatch.setattr("glm3kit.checkpoint.layout.BLOCK", 96)  # bytes: a row or two
    merged = merged_tensors(sharded)
    for parameter in WEIGHTS:
        blocks = list(merged.blocks(parameter))
        np.testing.assert_array_equal(np.concatenate(blocks), WEIGHTS[parameter].reshape(-1), parameter)
    assert len(list(merged.blocks("transformer.output_layer.weight"))) == 64


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
    with pytest.raises(CheckpointError, match=r"missing: rank 1, for shares of 12 parameters"):
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
    with pytest.raises(CheckpointError, match=r"output_layer.weight': shares .*32, 16\], .*31, 16\]\] differ"):
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


# ---- what MindFormers leaves ----

RNG = np.random.default_rng(0)
WHOLE = {"embedding": RNG.standard_normal((16, 6)), "dense": RNG.standard_normal((8, 6)),
         "row": RNG.standard_normal((8, 6)), "norm": RNG.standard_normal(8)}
WHOLE = {name: values.astype(np.float32) for name, values in WHOLE.items()}
STRATEGY = {  # data parallel 2 x model parallel 2; what is not cut is shared by the optimizer: step, size
    "embedding": ([1, -1], 1, 2), "dense": ([0, -1], 2, 2), "row": ([-1, 0], 2, 2),
    "norm": ([-1], 1, 4)}


def shares_of(rank):
    """What a rank holds of `WHOLE`: its slice by model parallelism (the embedding's by data), then its shard of it."""
    data, model = divmod(rank, 2)
    halves = {"embedding": np.split(WHOLE["embedding"], 2)[data], "dense": np.split(WHOLE["dense"], 2)[model],
              "row": np.split(WHOLE["row"], 2, 1)[model]}
    return {"embedding": np.split(halves["embedding"], 2)[model], "dense": np.split(halves["dense"], 2)[data],
            "row": np.split(halves["row"], 2)[data],
            "norm": np.split(WHOLE["norm"], 4)[rank]}


@pytest.fixture(params=["ckpt", "safetensors"])
def mindformers(request, tmp_path):
    """An output folder as MindFormers leaves it: checkpoint/rank_N/NAME-epoch_step, strategy/ with a file a rank."""
    message = ParallelStrategyMap(current_stage=0)
    message.parallel_strategy_item.add(node_name="MatMul-op0").parallel_strategys.stage = 0
    for name in STRATEGY:
        for stored in (name, f"adam_m.{name}"):
            item = message.parallel_layout_item.add(param_name=stored).parallel_layouts
            item.dev_matrix.add().dim.extend([2, 2])
            axes, item.opt_weight_shard_step, item.opt_weight_shard_size = STRATEGY[name]
            item.tensor_map.add().dim.extend(axes)
            item.param_split_shape.add()
            item.indices_offset.add()
            item.field = 0
    (tmp_path / "strategy").mkdir()
    for rank in range(4):
        (tmp_path / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(message.SerializeToString())
        folder = tmp_path / "checkpoint" / f"rank_{rank}"
        folder.mkdir(parents=True)
        for step in (9, 10):  # in the order of texts, 9 is the last
            shares = {name: values if step == 10 else -values for name, values in shares_of(rank).items()}
            shares |= {f"adam_m.{name}": values for name, values in shares.items()} | {"global_step": np.array([step])}
            ms.save_checkpoint([{"name": name, "data": ms.Tensor(values)} for name, values in shares.items()],
                               str(folder / f"glm3_rank_{rank}-1_{step}.{request.param}"), format=request.param)
    return tmp_path


def test_shards_of_mindformers_merge_to_what_mindspore_makes_of_them(mindformers, tmp_path):
    merged = merged_tensors(mindformers)
    assert sorted(merged) == sorted(WHOLE), "without the optimizer's state and counters"
    for path in (mindformers / "checkpoint").glob("*/*-1_9.*"):  # theirs takes the last in the order of texts
        path.unlink()
    form = next((mindformers / "checkpoint/rank_0").iterdir()).suffix[1:]
    ms.transform_checkpoints(str(mindformers / "checkpoint"), str(tmp_path / "theirs"), "whole",
                             str(mindformers / "strategy/ckpt_strategy_rank_0.ckpt"), None, output_format=form)
    (path,) = (tmp_path / "theirs").rglob(f"*.{form}")
    theirs = ms.load_checkpoint(str(path), format=form)
    for name, values in WHOLE.items():
        np.testing.assert_array_equal(merged[name], values, name)
        np.testing.assert_array_equal(theirs[name].asnumpy(), values, name)


def test_a_rank_folder_without_the_newest_checkpoint_makes_the_one_before_be_taken(mindformers):
    next((mindformers / "checkpoint/rank_2").glob("*-1_10.*")).unlink()
    np.testing.assert_array_equal(merged_tensors(mindformers)["norm"], -WHOLE["norm"])
    next((mindformers / "checkpoint/rank_2").glob("*-1_9.*")).unlink()
    with pytest.raises(CheckpointError, match="missing: rank 2, for shares of 4 parameters"):
        merged_tensors(mindformers)


def test_a_cut_file_and_the_strategy_of_fewer_ranks_are_errors(mindformers):
    path = next((mindformers / "checkpoint/rank_3").glob("*-1_10.*"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="rank_3-1_10.*(cut off|damaged)"):
        merged_tensors(mindformers)
    write_strategy(mindformers / "two.json", {name: Layout((2,), ((0,),)) for name in WHOLE})
    path.unlink()
    next((mindformers / "checkpoint/rank_3").glob("*-1_9.*")).rename(path)
    with pytest.raises(CheckpointError, match="it describes 2 ranks, there is a file of rank 3"):
        merged_tensors(mindformers, mindformers / "two.json")


def test_two_files_of_a_rank_that_do_not_say_which_is_newer_are_an_error(mindformers):
    for path in list((mindformers / "checkpoint/rank_0").iterdir()):
        path.rename(path.with_name(path.name.replace("-1_", "_")))
    with pytest.raises(CheckpointError, match="rank_0: holds .*neither name says which is newer"):
        merged_tensors(mindformers)
