"""Verbs about a run: a dry run, and the whole workflow on a model of a few thousand parameters."""

import json
from pathlib import Path

import pytest
from support import SMALL, TINY, small_config

from glm3kit.weights.random import write_random_hub_weights


def test_a_dry_run_prints_what_would_be_started_and_starts_nothing(tmp_path, capsys, status_of):
    assert status_of("launch", str(TINY), f"output_dir={tmp_path}", "--dry-run", "--port", "8765") == 0
    printed = capsys.readouterr().out
    assert "ranks here: 0 on device 0, 1 on device 1" in printed
    assert "worker_num=2" in printed.lower() and "_port=8765" in printed.lower() and "export GLM3KIT_JOB=" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks
def test_the_verbs_run_the_whole_workflow(tmp_path, capfd, status_of):
    held_out = Path(small_config().data.eval_path[0]).read_text(encoding="utf-8").splitlines(keepends=True)
    dev = tmp_path / "dev.json"
    dev.write_text("".join(held_out[:4]), encoding="utf-8")
    run = [str(TINY), *SMALL, "train.total_steps=3", "generate.max_new_tokens=4", f"data.eval_path={dev}",
           f"output_dir={tmp_path}"]
    hub = write_random_hub_weights(small_config().model, tmp_path / "hub")
    start, merged, job = (str(tmp_path / name) for name in ("start.safetensors", "merged.safetensors", "tiny"))
    assert status_of("convert", str(hub), start) == 0
    assert status_of("data", *run) == 0
    assert status_of("launch", *run, f"model.checkpoint_name_or_path={start}") == 0
    assert status_of("plot", job, "-o", str(tmp_path / "loss.png")) == 0
    assert status_of("logs", job, "--rank", "1", "--lines", "3") == 0
    assert status_of("wait", job) == status_of("logs", job, "--follow") == 0
    assert status_of("merge", job, merged) == 0
    capfd.readouterr()
    assert status_of("status", job) == 0
    assert json.loads(capfd.readouterr().out)["state"] == "succeeded"
    trained = f"model.checkpoint_name_or_path={merged}"
    assert status_of("evaluate", *run, trained, "--answers", str(tmp_path / "answers.jsonl")) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 4
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert status_of("predict", *run, trained, "--prompt", "类型#裙") == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
