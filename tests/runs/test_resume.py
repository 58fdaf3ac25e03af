"""Going on with real processes: the losses of the run that was never interrupted, on its layout and on others."""

import shutil

import numpy as np
import pytest
from support import ROOT

from glm3kit.checkpoint.folder import checkpoints
from glm3kit.checkpoint.merge import merge
from glm3kit.config.load import load_config
from glm3kit.errors import CheckpointError, JobError
from glm3kit.jobs.job import Job
from glm3kit.jobs.launch import launch
from glm3kit.jobs.metrics import read_metrics
from glm3kit.weights.random import random_weights
from glm3kit.weights.read import read_weights

SMALL = ("model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.kv_channels=8",
         "train.total_steps=6", "train.save_steps=2", "train.keep_checkpoints=3")
ROWS = 4  # a step, over all ranks


def run_of(folder, data_parallel, tensor_parallel, *changes):
    layout = (f"parallel.data_parallel={data_parallel}", f"parallel.tensor_parallel={tensor_parallel}",
              f"train.batch_size={ROWS // data_parallel}")
    return load_config(ROOT / "configs" / "tiny.yaml", [*SMALL, *layout, f"output_dir={folder}", "name=run", *changes])


def losses(folder):
    return [record["loss"] for record in read_metrics(folder)]


def forget(job: Job, *steps: int) -> None:
    """Remove checkpoints, as if the run had been killed before it wrote them."""
    for step in steps:
        shutil.rmtree(job.folder / "checkpoint" / f"step_{step}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four processes, two by two, that was not interrupted."""
    return launch(run_of(tmp_path_factory.mktemp("whole"), 2, 2), progress=False)


@pytest.mark.ranks
def test_a_run_goes_on_with_half_the_processes_and_then_with_another_layout(whole, tmp_path):
    uninterrupted = losses(whole.folder)
    job = Job(shutil.copytree(whole.folder, tmp_path / "run"))
    forget(job, 4, 6)
    launch(run_of(tmp_path, 2, 1), progress=False, resume=True)  # from step 2 of four processes
    on_two = losses(job.folder)
    np.testing.assert_allclose(on_two, uninterrupted, rtol=1e-4)

    # The same layout: identical to the last bit.
    forget(job, 6)
    launch(run_of(tmp_path, 2, 1), progress=False, resume=True)
    assert losses(job.folder) == on_two

    forget(job, 6)
    launch(run_of(tmp_path, 1, 2), progress=False, resume=True)  # from step 4 of two data-parallel processes
    np.testing.assert_allclose(losses(job.folder), uninterrupted, rtol=1e-4)
    assert [path.name for path in checkpoints(job.folder)] == ["step_2", "step_4", "step_6"]


@pytest.mark.ranks
def test_another_global_batch_is_refused_with_the_numbers(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    with pytest.raises(JobError, match=f"rows_per_step {ROWS}, here {2 * ROWS}"):
        launch(run_of(tmp_path, 1, 1, f"train.batch_size={2 * ROWS}"), progress=False, resume=True)


def test_a_folder_without_a_checkpoint_cannot_be_resumed(tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        launch(run_of(tmp_path, 1, 1), resume=True)


@pytest.mark.ranks
def test_a_lora_run_goes_on_with_another_layout_and_merges_to_the_same_weights(tmp_path):
    lora = ("train.lora={rank: 4, dropout: 0.2, targets: [query_key_value, dense, dense_4h_to_h]}",)
    job = launch(run_of(tmp_path, 2, 1, *lora), progress=False)
    uninterrupted, expected = losses(job.folder), dict(read_weights(merge(job.folder, tmp_path / "a.safetensors",
                                                                          progress=False)))
    forget(job, 4, 6)
    launch(run_of(tmp_path, 1, 2, *lora), progress=False, resume=True)  # from step 2, by the slices of each matrix
    np.testing.assert_allclose(losses(job.folder), uninterrupted, rtol=1e-4)
    merged = read_weights(merge(job.folder, tmp_path / "b.safetensors", progress=False))
    assert merged.specs.keys() == expected.keys(), "adapters are folded in"
    start = random_weights(load_config(job.folder / "config.yaml").model, seed=0)
    for name in merged:
        np.testing.assert_allclose(merged[name], expected[name], atol=1e-4 * np.abs(expected[name]).max())
        adapted = name.endswith(("query_key_value.weight", "attention.dense.weight", "dense_4h_to_h.weight"))
        assert np.array_equal(merged[name], start[name]) != adapted, "what has no adapter stays as it was"
