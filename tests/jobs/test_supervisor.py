"""What a dead, failing or hanging rank does to its job, and what the job says of it."""

import functools
import json
import os
import re
import signal
import sys
import time
from threading import Thread
from types import SimpleNamespace

import pytest
from jobs.scripted import RANK, make_config, nothing_runs, reason_of
from support import until

from glm3kit.config.groups import RunConfig
from glm3kit.errors import JobError
from glm3kit.jobs.launch import plan_launch, start_job
from glm3kit.jobs.process import job_processes, now
from glm3kit.jobs.supervisor import Supervisor, describe_exit
from glm3kit.setup.rank_table import local_rank_table

REAL_RANK = '''
import sys
from glm3kit.jobs.process import rank_process

with rank_process(sys.argv[1]):
    import mindspore as ms
    from mindspore.communication import get_rank, init
    ms.set_device("CPU")
    init()
    total = ms.ops.AllReduce()(ms.Tensor([get_rank() + 1.0]))
    print("sum over ranks:", total)
'''


def test_an_exit_code_is_told_in_words():
    assert describe_exit(-9) == "was killed by signal 9 (SIGKILL; the system does that when memory runs out)"
    assert describe_exit(-11) == "was killed by signal 11 (SIGSEGV)"
    assert describe_exit(2) == "ended with exit code 2 before its work was done"


# One rank


@pytest.mark.parametrize("behaviour, message, code", [
    ("raise", "rank 0 of 1 failed with exit code 1: ValueError: boom", 1),
    ("kill", "rank 0 of 1 was killed by signal 9 (SIGKILL", -9),
    ("exit early", "rank 0 of 1 ended with exit code 7 before its work was done", 7),
    ("exit silently", "rank 0 of 1 ended with exit code 0 before its work was done", 0),
])
def test_a_rank_that_does_not_finish_makes_the_job_a_failure(start, behaviour, message, code):
    job = start(behaviour)
    reason = reason_of(job)
    assert message in reason
    assert job.state()["exit_codes"] == {"rank_0": code}
    if behaviour == "raise":  # the end of the log is part of the reason
        assert 'raise ValueError("boom")\nValueError: boom' in reason
    assert nothing_runs(job)


def test_the_reason_of_a_failure_ends_with_advice_where_its_words_are_known(start):
    reason = reason_of(start("raise", script=RANK.replace("boom", "[Errno 28] No space left on device")))
    assert reason.splitlines()[-1].startswith("The disk is full: free some of it")


def test_the_interpreter_of_the_ranks_is_ours(start):
    assert start("succeed").wait(30).state()["command"][0] == sys.executable


HANGING = '''
import sys, time
from glm3kit.jobs.process import Heartbeat, rank_process

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


# Several ranks, and the scheduler where they meet


@pytest.mark.ranks
def test_two_processes_compute_together(start):
    job = start("", ranks=2, script=REAL_RANK).wait(120)
    for rank in (0, 1):
        assert "sum over ranks: [3.]" in job.log(rank, lines=40)
    state = job.state()
    assert state["exit_codes"] == {"rank_0": 0, "rank_1": 0}
    assert state["processes"].keys() == {"supervisor", "scheduler", "rank_0", "rank_1"}
    assert nothing_runs(job)


@pytest.mark.ranks
@pytest.mark.parametrize("behaviour, message, code", [
    ("raise", "rank 1 of 2 failed with exit code 1: ValueError: boom", 1),
    ("kill", "rank 1 of 2 was killed by signal 9 (SIGKILL", -9),
    ("exit early", "rank 1 of 2 ended with exit code 7 before its work was done", 7),
    ("exit silently", "rank 1 of 2 ended with exit code 0 before its work was done", 0),
])
def test_one_rank_that_fails_ends_the_others_within_ten_seconds(start, behaviour, message, code):
    job = start(behaviour, ranks=2, who="1")
    reason = reason_of(job)
    state = job.state()
    assert message in reason
    assert state["exit_codes"] == {"rank_0": None, "rank_1": code}
    assert nothing_runs(job)
    last_sign = (job.folder / "log/rank_1.log").stat().st_mtime
    assert (job.folder / "job.json").stat().st_mtime - last_sign < 10


@pytest.mark.ranks
def test_the_death_of_the_scheduler_ends_the_job(start):
    job = start("sleep", ranks=2)
    until(lambda: job.state()["state"] == "running")
    os.kill(job.state()["processes"]["scheduler"]["pid"], signal.SIGKILL)
    killed = time.monotonic()
    assert "scheduler was killed by signal 9 (SIGKILL" in reason_of(job)
    assert time.monotonic() - killed < 10
    assert nothing_runs(job)


@pytest.fixture
def two_ranks(tmp_path):
    """A supervisor of processes that are played: a dict of their exit codes, None while they run."""
    supervisor = Supervisor(tmp_path, plan_launch(make_config(tmp_path, 2), local_rank_table(2)).plan, [], None)
    codes = dict.fromkeys(["scheduler", "rank_0", "rank_1"])
    supervisor.children = {name: SimpleNamespace(poll=functools.partial(codes.get, name)) for name in codes}
    (tmp_path / "log").mkdir()
    return supervisor, codes


def leave_record(folder, name, exit_code, error="ValueError: boom"):
    """The record that a process leaves when it has worked or failed."""
    time.sleep(0.002)  # what happened before this happened earlier
    record = {"pid": 1, "exit_code": exit_code, "error": error, "ended": now()}
    (folder / f"log/{name}.json").write_text(json.dumps(record))
    time.sleep(0.002)  # what happens next happens later


@pytest.mark.parametrize("rank_ended, named", [("before", "rank 1 of 2 failed with exit code 1: ValueError: boom"),
                                               ("after", "scheduler was killed by signal 9")])
def test_a_scheduler_without_a_word_is_the_cause_only_where_no_rank_failed_before(two_ranks, tmp_path, monkeypatch,
                                                                                  rank_ended, named):
    monkeypatch.setattr("glm3kit.jobs.supervisor.GRACE_S", 0.2)
    supervisor, codes = two_ranks
    for what in ("rank", "scheduler") if rank_ended == "before" else ("scheduler", "rank"):
        if what == "rank":  # it has left its record and is about to end
            leave_record(tmp_path, "rank_1", 1)
        else:
            codes["scheduler"] = -signal.SIGKILL
        supervisor.look()
        assert supervisor.failure() is None, "all about it may not be known yet"
    time.sleep(0.3)
    assert supervisor.failure().startswith(named)


def test_a_scheduler_that_misses_a_rank_yields_to_what_the_ranks_say(two_ranks, tmp_path):
    supervisor, codes = two_ranks
    leave_record(tmp_path, "scheduler", 1, "RuntimeError: The total number of timed out node is 1")
    codes["scheduler"] = 1
    supervisor.look()
    assert supervisor.failure() is None, "a rank may tell more"
    leave_record(tmp_path, "rank_0", 1)
    codes["rank_0"] = 1
    supervisor.look()
    assert supervisor.failure().startswith("rank 0 of 2 failed with exit code 1: ValueError: boom")


def test_a_rank_that_was_killed_is_named_before_one_that_missed_it_at_once(two_ranks, tmp_path):
    supervisor, codes = two_ranks
    codes["rank_1"] = -signal.SIGKILL
    leave_record(tmp_path, "rank_0", 1, "RuntimeError: Launch kernel failed")
    codes["rank_0"] = 1
    supervisor.look()
    assert supervisor.failure().startswith("rank 1 of 2 was killed by signal 9")


def test_ranks_that_are_done_have_succeeded_however_they_leave_the_cluster(two_ranks, tmp_path):
    supervisor, codes = two_ranks
    leave_record(tmp_path, "rank_0", 0, None)
    codes["rank_0"] = -signal.SIGSEGV
    supervisor.look()
    assert supervisor.failure() is None and supervisor.working == {"rank_1"}
    leave_record(tmp_path, "rank_1", 0, None)
    codes["scheduler"] = 0
    assert supervisor.watch() == ("succeeded", None)
    assert supervisor.state["exit_codes"] == {"rank_0": 0, "rank_1": 0}


def test_a_running_supervisor_gives_signs_of_life(two_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("glm3kit.jobs.supervisor.SIGN_OF_LIFE_S", 0.05)
    supervisor, _ = two_ranks
    supervisor.write()
    long_ago = time.time() - 600
    os.utime(tmp_path / "job.json", (long_ago, long_ago))
    watching = Thread(target=supervisor.watch)
    watching.start()
    try:
        until(lambda: (tmp_path / "job.json").stat().st_mtime > long_ago + 1, 10)
    finally:
        supervisor.stopping = True
        watching.join()


@pytest.mark.ranks
def test_stopping_several_ranks_leaves_no_process_behind(start):
    job = start("sleep", ranks=2)
    until(lambda: job.state()["state"] == "running")
    assert len(job_processes(job.folder)) == 3  # scheduler, two ranks
    assert job.stop()["state"] == "stopped"
    assert nothing_runs(job)


@pytest.mark.ranks
def test_a_mindspore_that_cannot_be_imported_is_told_with_its_own_words(start, monkeypatch, tmp_path):
    broken = tmp_path / "broken/mindspore"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libascend_hal.so is missing')")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    reason = reason_of(start("", ranks=2, script=REAL_RANK))
    assert re.search(r"rank [01] of 2 failed with exit code 1: ImportError: libascend_hal.so is missing", reason)
