"""Signs of life: who has made no step for too long, and who only waits for it."""

import os
import signal
import subprocess
import time

import pytest

from glm3kit.config.groups import RunConfig
from glm3kit.errors import JobError
from glm3kit.jobs.heartbeat import FIRST_STEP_S, Heartbeat, Watch
from glm3kit.jobs.job import job_processes, process_mark
from glm3kit.jobs.launch import plan_launch, start_job
from glm3kit.setup.rank_table import local_rank_table


@pytest.fixture
def clock(monkeypatch):
    """The clock of the watch, set by the test."""
    class Clock:
        now = 0.0

    monkeypatch.setattr("glm3kit.jobs.heartbeat.time.monotonic", lambda: Clock.now)
    return Clock


def mark(folder, rank, at):
    """A mark of a rank that its file system dates so."""
    Heartbeat(folder, rank).mark()
    os.utime(folder / "log" / f"rank_{rank}.step", (at, at))


def test_the_rank_that_fell_silent_first_hangs_and_the_others_wait_for_it(tmp_path, clock):
    watch = Watch(tmp_path, ["rank_0", "rank_1", "rank_2"], limit_s=10)
    for rank in range(3):
        mark(tmp_path, rank, 100 + (rank != 1))  # ranks 0 and 2 have begun another step
    clock.now = 5
    assert watch.silent({}) is None, "the marks are new"
    clock.now = 14
    assert watch.silent({}) is None
    clock.now = 16
    name, what = watch.silent({})
    assert name == "rank_1" and "hangs: no step for 11 s (train.hang_timeout_s is 10)" in what


def test_a_process_that_is_stopped_is_named_before_those_that_wait(tmp_path, clock):
    watch = Watch(tmp_path, ["rank_0", "rank_1"], limit_s=10)
    mark(tmp_path, 0, 100)
    mark(tmp_path, 1, 101)
    watch.silent({})
    clock.now = 11
    sleeping = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    try:
        sleeping[1].send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, sleeping[1].pid, os.WSTOPPED | os.WNOWAIT)
        name, what = watch.silent({f"rank_{rank}": process_mark(process.pid) for rank, process in enumerate(sleeping)})
    finally:
        for process in sleeping:
            process.kill()
            process.wait()
    assert name == "rank_1" and what.endswith("its process is stopped")


def test_the_first_step_may_take_longer_for_it_compiles(tmp_path, clock):
    watch = Watch(tmp_path, ["rank_0", "rank_1"], limit_s=10)
    mark(tmp_path, 0, 100)
    clock.now = FIRST_STEP_S - 1
    assert watch.silent({}) is None, "rank 1 has made no step yet"
    clock.now = 2 * FIRST_STEP_S
    assert watch.silent({})[0] == "rank_1"
    assert Watch(tmp_path, ["rank_0"], limit_s=None).silent({}) is None, "null waits for ever"


def test_drawing_a_batch_marks_a_step_that_has_begun_but_not_the_first(tmp_path):
    heartbeat = Heartbeat(tmp_path, 0)
    batches = heartbeat.drawing([1, 2])
    assert next(batches) == 1 and not heartbeat.path.exists()
    heartbeat.mark()
    os.utime(heartbeat.path, (100, 100))
    assert next(batches) == 2 and heartbeat.path.stat().st_mtime > time.time() - 60


HANGING = '''
import sys, time
from glm3kit.jobs.heartbeat import Heartbeat
from glm3kit.jobs.job import rank_process

def wait_in_vain():
    time.sleep(300)

with rank_process(sys.argv[1]):
    Heartbeat(sys.argv[1], 0).mark()
    wait_in_vain()
'''


def test_a_hanging_rank_ends_its_job_and_has_told_where_it_was(tmp_path):
    (tmp_path / "rank.py").write_text(HANGING)
    config = RunConfig(name="job", output_dir=str(tmp_path), train={"hang_timeout_s": 1},
                       parallel={"device_target": "CPU"})
    start = plan_launch(config, local_rank_table(1))
    job = start_job(start, command=[str(tmp_path / "rank.py"), str(config.job_dir)])
    with pytest.raises(JobError, match="rank 0 of 1 hangs: no step for"):
        job.wait(60)
    assert "in wait_in_vain" in job.state()["reason"], "the end of its log is where it stands"
    assert not job_processes(job.folder)
