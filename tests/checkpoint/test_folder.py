"""Checkpoint folders: which are whole, and what is wrong with one that is not."""

import json
from pathlib import Path

import pytest

from glm3kit.checkpoint.folder import checkpoints, damage, marks_of, newest_checkpoint
from glm3kit.errors import CheckpointError

FILES = ("model/rank_0.safetensors", "model/strategy.json", "optimizer/rank_0.safetensors", "optimizer/strategy.json")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A complete checkpoint of a job."""
    folder = tmp_path / "checkpoint" / "step_10"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    marks = marks_of(folder, [folder / name for name in FILES])
    (folder / "complete.json").write_text(json.dumps({"files": marks}))
    return folder


def test_complete_checkpoints_are_found_in_the_order_of_their_steps(checkpoint, tmp_path):
    for name in ("step_9", "step_11", "step_12.damaged", ".step_13.tmp"):
        (checkpoint.parent / name).mkdir()
    for name in ("step_9", "step_12.damaged", ".step_13.tmp"):
        (checkpoint.parent / name / "complete.json").write_text("{}")
    assert [path.name for path in checkpoints(tmp_path)] == ["step_9", "step_10"]
    assert newest_checkpoint(tmp_path) == checkpoint
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        newest_checkpoint(checkpoint)


def test_each_rank_verifies_its_share_of_the_files(checkpoint):
    assert damage(checkpoint) is None
    (checkpoint / "optimizer" / "rank_0.safetensors").unlink()
    found = [damage(checkpoint, rank, 2) for rank in range(2)]
    assert sorted(found, key=bool) == [None, "optimizer/rank_0.safetensors is missing"]
