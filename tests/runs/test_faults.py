"""Faults with real processes: what dies, hangs or fills up ends the job, is named, leaves nothing, and the job goes on.

The tests share one job: each goes on from where the fault of the one before has left it.
"""

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, SMALL, TINY, until

import glm3kit.jobs.launch
from glm3kit.checkpoint.folder import checkpoints, damage
from glm3kit.config.load import load_config
from glm3kit.jobs.job import Job
from glm3kit.jobs.launch import launch, start_job
from glm3kit.jobs.process import is_running, job_processes

pytestmark = pytest.mark.ranks
CHANGES = (*SMALL, f"data.train_path={ROOT / 'glm3kit/tiny/train.json'}", "data.max_source_length=16",
           "data.max_target_length=15", "train.total_steps=100000", "train.save_steps=5", "train.keep_checkpoints=2",
           "name=run")
WITHIN_S = 20  # from the notice of a fault to the end of the job
BUSY_S = 120  # for what takes ten seconds on an idle machine

# A rank that raises at its third step if it is the second.
RAISING = '''
import sys
from glm3kit.config.load import load_config
from glm3kit.jobs.process import rank_process
from glm3kit.train.run import run_rank
from glm3kit.train.trainer import Trainer

advance, steps = Trainer.advance, []

def raise_at_the_third(trainer, batches):
    steps.append(trainer.step)
    if len(steps) == 3 and int(__import__("os").environ["RANK_ID"]) == 1:
        raise ValueError("a fault of the test")
    return advance(trainer, batches)

Trainer.advance = raise_at_the_third
config = load_config(sys.argv[1])
with rank_process(config.job_dir):
    run_rank(config, resume=True)
'''


class Run:
    """The job that the tests share, and how to go on with it."""

    def __init__(self, folder: Path):
        self.folder = folder / "run"
        self.job = Job(self.folder)

    def config(self, *changes: str):
        return load_config(TINY, [*CHANGES, f"output_dir={self.folder.parent}", *changes])

    def records(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def go_on(self, *changes: str) -> None:
        """Start or resume, and wait for a few steps and a checkpoint of this start."""
        self.before = len(self.records())
        launch(self.config(*changes), wait=False, resume=bool(checkpoints(self.folder)))
        self.wait_for_steps()

    def wait_for_steps(self) -> None:
        until(lambda: len(self.records()) > self.before + 7 or self.ended(), BUSY_S)
        self.processes = self.job.state()["processes"]
        assert not self.ended(), self.job.state()["reason"]

    def started(self) -> str | None:
        """When the job was started, None between two starts."""
        path = self.folder / "job.json"
        return json.loads(path.read_text())["started"] if path.exists() else None

    def ended(self) -> bool:
        return self.job.state()["state"] not in ("starting", "running")

    def end(self, timeout_s: float = BUSY_S) -> dict:
        """Wait for the end; the final state. Nothing may be left of the job."""
        until(self.ended, timeout_s)
        state = self.job.state()
        until(lambda: not is_running(self.processes["supervisor"]), 10)
        assert not [name for name, mark in self.processes.items() if is_running(mark)], "by process id"
        assert not job_processes(self.folder), "nor any other that the job started"
        assert len(self.processes) == 4, "supervisor, scheduler, two ranks"
        return state

    def fail(self, *, after_s: float = 0) -> str:
        """Wait for the end as a failure, `after_s` seconds after the fault at most; the reason."""
        fault = time.time()
        state = self.end()
        assert state["state"] == "failed"
        assert (self.folder / "job.json").stat().st_mtime - fault < after_s + WITHIN_S
        return state["reason"]

    def fill_disk(self) -> Path:
        """Leave 200 kB, which a checkpoint does not fit in; returns the file to remove.

        Where no disk of its own could be had, the ranks may write no larger file.
        """
        ballast = self.folder.parent / "ballast"
        if os.path.ismount(self.folder.parent):
            ballast.write_bytes(bytes(shutil.disk_usage(self.folder).free - 200_000))
        for name in ("rank_0", "rank_1") if not os.path.ismount(self.folder.parent) else ():
            resource.prlimit(self.processes[name]["pid"], resource.RLIMIT_FSIZE, (200_000, 200_000))
        return ballast

    def kill(self, name: str, what: int) -> None:
        os.kill(self.processes[name]["pid"], what)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    disk = tmp_path_factory.mktemp("faults")
    tmpfs = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)]
    mounted = shutil.which("mount") and not subprocess.run(tmpfs, check=False, stderr=subprocess.DEVNULL).returncode
    run = Run(disk)
    yield run
    if (run.folder / "job.json").exists():
        run.job.stop()
    if mounted:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_rank_that_is_killed_within_a_step_ends_the_job(run):
    run.go_on()
    run.kill("rank_1", signal.SIGKILL)
    reason = run.fail()
    assert "rank 1 of 2 was killed by signal 9 (SIGKILL" in reason
    assert "The end of log/rank_1.log" in reason


def test_a_rank_that_hangs_is_named_after_the_set_time(run):
    run.go_on("train.hang_timeout_s=8")
    run.kill("rank_1", signal.SIGSTOP)
    reason = run.fail(after_s=8)
    assert "rank 1 of 2 hangs: no step for" in reason and "train.hang_timeout_s is 8), its process is stopped" in reason
    # The other rank has told where it waited.
    assert "advance" in run.job.log(0, lines=200) and "most recent call first" in run.job.log(0, lines=200)


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_launcher_stops_its_job(run, what):
    run.before, earlier = len(run.records()), run.started()
    changes = [*CHANGES, f"output_dir={run.folder.parent}"]
    launcher = subprocess.Popen([sys.executable, "-m", "glm3kit", "launch", str(TINY), *changes,
                                 *(["--resume"] if checkpoints(run.folder) else [])],
                                stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        until(lambda: run.started() not in (None, earlier), BUSY_S)
        run.wait_for_steps()
        launcher.send_signal(what)
        state = run.end(WITHIN_S)
        _, errors = launcher.communicate(timeout=BUSY_S)
    finally:
        launcher.kill()
    assert launcher.returncode == 1 and errors.endswith("interrupted\n")
    assert state["state"] == "stopped"


def test_a_rank_that_raises_ends_the_job(run, tmp_path, monkeypatch):
    if not checkpoints(run.folder):
        run.go_on()
        run.job.stop()
    (tmp_path / "raising.py").write_text(RAISING)
    command = [str(tmp_path / "raising.py"), str(run.folder / "config.yaml")]
    monkeypatch.setattr(glm3kit.jobs.launch, "start_job", functools.partial(start_job, command=command))
    launch(run.config(), wait=False, resume=True)
    until(run.ended, BUSY_S)
    run.processes = run.job.state()["processes"]
    reason = run.fail()
    assert "rank 1 of 2 failed with exit code 1: ValueError: a fault of the test" in reason
    assert 'raise ValueError("a fault of the test")' in reason, "the end of its log"


def test_a_full_disk_at_a_checkpoint_ends_the_job_and_costs_nothing_that_was_saved(run):
    run.go_on()
    ballast = run.fill_disk()
    try:
        reason = run.fail()
    finally:
        ballast.unlink(missing_ok=True)
    assert re.search(r"rank [01] of 2 failed with exit code 1: CheckpointError: .*step_\d+: cannot be written: "
                     r"(No space left on device|File too large), .* lower train.keep_checkpoints", reason)
    assert [path for path in (run.folder / "checkpoint").iterdir() if path not in checkpoints(run.folder)] == []
    assert damage(checkpoints(run.folder)[-1]) is None


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run):
    if len(checkpoints(run.folder)) < 2:
        run.go_on()
        run.job.stop()
    before, newest = checkpoints(run.folder)[-2:]
    path = newest / "optimizer" / "rank_1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run.go_on()
    assert run.records()[run.before]["step"] == int(before.name.removeprefix("step_")) + 1
    assert f"{newest.name} is damaged: optimizer/rank_1.safetensors has" in run.job.log(1, lines=400)
    assert run.job.stop()["state"] == "stopped"


def test_the_curve_of_repeated_steps_is_that_of_the_first_time(run):
    losses: dict[int, set[float]] = {}
    repeated = 0
    for record in run.records():
        repeated += record["step"] in losses
        losses.setdefault(record["step"], set()).add(record["loss"])
    assert repeated > 0, "a fault between two checkpoints costs the steps since the last"
    assert all(len(found) == 1 for found in losses.values()), "made again, a step has the same loss to the last bit"
    assert sorted(losses) == list(range(1, len(losses) + 1)), "no step is left out"
