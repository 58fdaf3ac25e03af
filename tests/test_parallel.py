"""Several real processes give what one gives: data parallel, tensor parallel, both."""

import json
from pathlib import Path

import numpy as np
import pytest

from glm3kit import model
from glm3kit.checkpoint import merge, merged_tensors
from glm3kit.config import ModelConfig, ParallelConfig, RunConfig
from glm3kit.errors import ConfigError
from glm3kit.launch import start_job
from glm3kit.parallel import Slicing, shard_of, start_processes
from glm3kit.rank_table import local_rank_table
from glm3kit.weights import parameter_shapes, read_weights


def test_shards_hold_every_value_once():
    values = np.arange(1, 11, dtype=np.float32).reshape(2, 5)
    shards = [shard_of(values, rank, 4) for rank in range(4)]
    assert [shard.shape for shard in shards] == [(3,)] * 4
    np.testing.assert_array_equal(np.concatenate(shards)[:10].reshape(2, 5), values)
    np.testing.assert_array_equal(np.concatenate(shards)[10:], 0)


def test_slices_of_fused_weights_hold_whole_heads_of_each_part():
    cut = Slicing(0, (4, 2, 2))  # q of 4 rows, k and v of 2
    rows = np.array([["q0"], ["q1"], ["q2"], ["q3"], ["k0"], ["k1"], ["v0"], ["v1"]])
    assert cut.part(rows, 0, 2).ravel().tolist() == ["q0", "q1", "k0", "v0"]
    assert cut.part(rows, 1, 2).ravel().tolist() == ["q2", "q3", "k1", "v1"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_slices_put_together_are_the_whole(ranks):
    cfg = ModelConfig(num_layers=1, padded_vocab_size=64, hidden_size=16, ffn_hidden_size=24, kv_channels=4,
                      num_attention_heads=4)
    for name, shape in parameter_shapes(cfg).items():
        values, cut = np.random.default_rng(0).standard_normal(shape), model.slicing(name, cfg)
        if cut:
            assert sum(cut.segments) == shape[cut.axis], name
            np.testing.assert_array_equal(cut.whole([cut.part(values, r, ranks) for r in range(ranks)]), values, name)


def test_a_number_of_processes_that_was_not_asked_for_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK_SIZE", "4")
    with pytest.raises(ConfigError, match=r"data_parallel 2 x tensor_parallel 1 = 2 process\(es\), 4 started"):
        start_processes(ParallelConfig(data_parallel=2, device_target="CPU"))


def test_a_layout_that_does_not_divide_is_an_error_that_says_what_would_do():
    with pytest.raises(ValueError, match="does not divide multi_query_group_num 2; these would do: 1, 2"):
        RunConfig(parallel=ParallelConfig(tensor_parallel=4))


def train_golden(golden, folder, parallel):
    """The reference's 20 steps as a job of `parallel.ranks` processes."""
    config = RunConfig(name="job", output_dir=str(folder), parallel=parallel)
    command = [str(Path(__file__).with_name("fit_golden.py")), str(golden.resolve()), str(config.job_dir),
               str(parallel.data_parallel), str(parallel.tensor_parallel)]
    return start_job(config, local_rank_table(parallel.ranks), command=command).wait(timeout_s=240)


@pytest.fixture(scope="module")
def one(golden, tmp_path_factory):
    """The weights after the same steps in one process."""
    job = train_golden(golden, tmp_path_factory.mktemp("one"), ParallelConfig(device_target="CPU"))
    return merged_tensors(job.folder)


@pytest.mark.ranks
@pytest.mark.parametrize("data_parallel, tensor_parallel", [(2, 1), (1, 2), (2, 2)])
def test_processes_train_as_one_and_merge_to_its_weights(data_parallel, tensor_parallel, golden, one, tmp_path):
    reference = np.load(golden / "tiny/reference.npz")
    parallel = ParallelConfig(data_parallel=data_parallel, tensor_parallel=tensor_parallel, device_target="CPU")
    job = train_golden(golden, tmp_path, parallel)
    records = json.loads((job.folder / "records.json").read_text())
    np.testing.assert_allclose([r["loss"] for r in records], reference["train.loss"], rtol=1e-4)
    np.testing.assert_allclose([r["grad_norm"] for r in records], reference["train.grad_norm"], rtol=1e-4)

    shards = sorted(path.name for path in (job.folder / "checkpoint/step_20/model").iterdir())
    assert shards == [f"rank_{rank}.safetensors" for rank in range(tensor_parallel)]
    assert len(list((job.folder / "checkpoint/step_20/optimizer").iterdir())) == parallel.ranks
    merged = read_weights(merge(job.folder, tmp_path / "merged.safetensors", progress=False))
    assert merged.specs == one.specs
    for name in one:
        difference = np.abs(merged[name] - one[name]).max()
        if not name.endswith("query_key_value.bias"):  # some of it is noise: see test_train.py
            assert difference <= 1e-4 * np.abs(one[name]).max(), (name, difference)
