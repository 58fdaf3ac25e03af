"""Processes of a job: told apart, ended, what ranks record; who has made no step for too long, who waits for it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from glm3kit.files import atomic_write
from glm3kit.jobs.process import (
    FIRST_STEP_S,
    JOB_VARIABLE,
    Heartbeat,
    Watch,
    end_processes,
    is_running,
    job_processes,
    process_mark,
    rank_process,
)


@pytest.fixture
def clock(monkeypatch):
    """The clock of the watch, set by the test."""
    class Clock:
        now = 0.0

    monkeypatch.setattr("glm3kit.jobs.process.time.monotonic", lambda: Clock.now)
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




def test_the_process_of_another_time_with_the_same_id_is_not_taken_for_ours():
    mine = {"pid": os.getpid(), "create_time": psutil.Process().create_time()}
    assert is_running(mine)
    assert not is_running(mine | {"create_time": mine["create_time"] - 3600})
    assert not is_running(None)


@pytest.mark.parametrize("ending, code, error", [
    (None, 0, None), (SystemExit(0), 0, None), (SystemExit(3), 3, "SystemExit: 3"),
    (SystemExit("no"), 1, "SystemExit: no"), (KeyboardInterrupt(), 1, "KeyboardInterrupt: "),
    (ValueError("boom"), 1, "ValueError: boom"),
])
def test_a_rank_records_how_it_ends(tmp_path, monkeypatch, ending, code, error):
    monkeypatch.setenv("RANK_ID", "2")
    monkeypatch.delenv("MS_ROLE", raising=False)
    try:
        with rank_process(tmp_path):
            assert "exit_code" not in json.loads((tmp_path / "log/rank_2.json").read_text())
            if ending:
                raise ending
    except type(ending) as err:
        assert err is ending, "the error goes on"
    record = json.loads((tmp_path / "log/rank_2.json").read_text())
    assert (record["pid"], record["exit_code"], record["error"]) == (os.getpid(), code, error)


def test_a_rank_records_how_it_ends_on_a_disk_that_was_just_full(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK_ID", "2")
    monkeypatch.delenv("MS_ROLE", raising=False)
    left = 3

    def full(path, text):
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        atomic_write(path, text)

    with pytest.raises(ValueError, match="boom"), rank_process(tmp_path):
        monkeypatch.setattr("glm3kit.jobs.process.atomic_write", full)
        raise ValueError("boom")
    assert json.loads((tmp_path / "log/rank_2.json").read_text())["error"] == "ValueError: boom"


def test_the_scheduler_leaves_no_record_of_a_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK_ID", "0")
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    with rank_process(tmp_path):
        pass
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["scheduler.json"]


PATIENT = """
import signal, sys, time
def end(*_):
    print("asked", flush=True)
    if sys.argv[1] == "obeys":
        sys.exit()
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(300)
time.sleep(300)
"""


def test_processes_are_asked_once_to_end_before_they_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("glm3kit.jobs.process.ASK_S", 1)
    environment = os.environ | {JOB_VARIABLE: str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", PATIENT, what], env=environment, stdout=subprocess.PIPE,
                                  text=True) for what in ("obeys", "refuses")]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    assert {process.pid for process in job_processes(tmp_path)} == {process.pid for process in processes}
    assert end_processes(tmp_path) == []
    assert [process.stdout.read() for process in processes] == ["asked\n"] * 2
    assert not job_processes(tmp_path)
