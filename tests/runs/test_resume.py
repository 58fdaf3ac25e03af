"""Going on with real processes: the losses of the run that was never interrupted, on its layout and on others.

That a launched run goes on in new processes is test_faults.py's part; here groups of four ranks do, see four_ranks.py.
"""

import json
import shutil

import numpy as np
import pytest
from four_ranks import ROWS, run_config
from support import GOLDEN

from glm3kit.checkpoint.folder import checkpoints
from glm3kit.checkpoint.merge import merge
from glm3kit.errors import CheckpointError
from glm3kit.jobs.launch import launch
from glm3kit.jobs.metrics import read_metrics
from glm3kit.train.run import run_rank
from glm3kit.weights.random import random_weights
from glm3kit.weights.read import read_weights


def steps_and_losses(folder):
    records = json.loads((folder / "records.json").read_text())
    return [record["step"] for record in records], [record["loss"] for record in records]


def losses(folder):
    return [record["loss"] for record in read_metrics(folder)]


@pytest.mark.ranks
def test_a_run_goes_on_with_half_the_processes_and_then_with_another_layout(four_ranks):
    uninterrupted = np.load(GOLDEN / "reference.npz")["train.loss"]
    steps, on_two = steps_and_losses(four_ranks / "golden_2x2_then_2x1")  # from step 5 of four processes
    assert steps == list(range(6, 21))
    np.testing.assert_allclose(on_two, uninterrupted[5:], rtol=1e-4)
    steps, again = steps_and_losses(four_ranks / "golden_2x1_again")
    assert steps == list(range(11, 21))
    assert again == on_two[5:], "the same layout: identical to the last bit"
    steps, on_slices = steps_and_losses(four_ranks / "golden_2x1_then_1x2")  # from step 10 of those two
    assert steps == list(range(11, 21))
    np.testing.assert_allclose(on_slices, uninterrupted[10:], rtol=1e-4)


@pytest.mark.ranks
def test_another_global_batch_is_refused_with_the_numbers(four_ranks, tmp_path):
    folder = shutil.copytree(four_ranks / "adapters_2x1", tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"rows_per_step {ROWS}, here {2 * ROWS}"):
        run_rank(run_config(folder, 1, 1, f"train.batch_size={2 * ROWS}"), resume=True)


def test_a_folder_without_a_checkpoint_cannot_be_resumed(tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        launch(run_config(tmp_path / "run"), resume=True)


@pytest.mark.ranks
def test_a_lora_run_goes_on_with_another_layout_and_merges_to_the_same_weights(four_ranks, tmp_path):
    job, resumed = four_ranks / "adapters_2x1", four_ranks / "adapters_2x1_then_1x2"
    np.testing.assert_allclose(losses(resumed), losses(job), rtol=1e-4)  # from step 2, by the slices of each matrix
    assert [path.name for path in checkpoints(resumed)] == ["step_2", "step_4", "step_6"]
    expected, merged = (read_weights(merge(folder, tmp_path / f"{folder.name}.safetensors", progress=False))
                        for folder in (job, resumed))
    assert merged.specs.keys() == expected.specs.keys(), "adapters are folded in"
    start = random_weights(run_config(resumed).model, seed=0)
    for name in merged:
        np.testing.assert_allclose(merged[name], expected[name], atol=1e-4 * np.abs(expected[name]).max())
        adapted = name.endswith(("query_key_value.weight", "attention.dense.weight", "dense_4h_to_h.weight"))
        assert np.array_equal(merged[name], start[name]) != adapted, "what has no adapter stays as it was"
