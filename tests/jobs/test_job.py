"""Jobs: started, watched, stopped and found again; what a dead or failing rank does to them."""

import errno
import functools
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

import glm3kit.jobs.launch
from glm3kit.config.groups import RunConfig
from glm3kit.config.load import load_config
from glm3kit.errors import JobError
from glm3kit.files import atomic_write
from glm3kit.jobs.job import Job, is_running, job_processes, rank_process
from glm3kit.jobs.launch import launch, plan_launch, start_job
from glm3kit.jobs.supervisor import Supervisor, describe_exit
from glm3kit.setup.rank_table import local_rank_table, read_rank_table

# A rank without a model. `behaviour` is what rank `who` does, the others sleep (or end, for "succeed").
RANK = '''
import os, signal, sys, time
from glm3kit.jobs.launch import rank_process

folder, behaviour, who = sys.argv[1:]
me = "scheduler" if os.environ.get("MS_ROLE") == "MS_SCHED" else os.environ["RANK_ID"]
if behaviour == "exit early" and me == who:
    sys.exit(7)
with rank_process(folder):
    print("rank", me, "of", os.environ["RANK_SIZE"])
    if behaviour == "train":
        with open(folder + "/metrics.jsonl", "w") as metrics:
            for step in (1, 2):
                metrics.write('{"step": %d, "loss": 2.5}\\n' % step)
    elif behaviour != "succeed" and (behaviour == "sleep" or me != who):
        time.sleep(300)
    time.sleep(0.3)
    if behaviour == "raise":
        raise ValueError("boom")
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "exit silently":
        os._exit(0)
'''

REAL_RANK = '''
import sys
from glm3kit.jobs.launch import rank_process

with rank_process(sys.argv[1]):
    import mindspore as ms
    from mindspore.communication import get_rank, init
    ms.set_device("CPU")
    init()
    total = ms.ops.AllReduce()(ms.Tensor([get_rank() + 1.0]))
    print("sum over ranks:", total)
'''


@pytest.fixture
def start(tmp_path):
    """Start a job of scripted ranks; end whatever a failing test leaves."""
    jobs = []

    def start(behaviour, ranks=1, who="0", overwrite=False, script=RANK):
        (tmp_path / "rank.py").write_text(script)
        config = make_config(tmp_path, ranks)
        command = [str(tmp_path / "rank.py"), str(config.job_dir), behaviour, who]
        jobs.append(start_job(plan_launch(config, local_rank_table(ranks)), overwrite, command))
        return jobs[-1]

    yield start
    for job in jobs:
        job.stop()


def make_config(folder, ranks=1):
    return RunConfig(name="job", output_dir=str(folder), parallel={"data_parallel": ranks, "device_target": "CPU"})


def until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def nothing_runs(job):
    supervisor = json.loads((job.folder / "job.json").read_text())["processes"]["supervisor"]
    until(lambda: not is_running(supervisor), 5)
    return not job_processes(job.folder)


def reason_of(job):
    with pytest.raises(JobError) as caught:
        job.wait(60)
    assert job.state()["state"] == "failed"
    return str(caught.value)


def test_an_exit_code_is_told_in_words():
    assert describe_exit(-9) == "was killed by signal 9 (SIGKILL; the system does that when memory runs out)"
    assert describe_exit(-11) == "was killed by signal 11 (SIGSEGV)"
    assert describe_exit(2) == "ended with exit code 2 before its work was done"
    assert describe_exit(None) == "ended without a word"


# One rank, without msrun


def test_a_job_that_succeeds_leaves_its_whole_story_in_the_folder(start, tmp_path):
    job = start("succeed").wait(30)
    assert job.folder == tmp_path / "job"
    state = job.state()
    assert state["state"] == "succeeded" and state["reason"] is None
    assert state["exit_codes"] == {"rank_0": 0} and state["rank_size"] == 1
    assert state["started"] < state["ended"]
    assert job.log(0) == "rank 0 of 1"
    assert load_config(job.folder / "config.yaml") == make_config(tmp_path)
    assert read_rank_table(job.folder / "rank_table.json") == local_rank_table(1)
    assert nothing_runs(job)


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


def test_stop_ends_every_process_and_a_second_stop_changes_nothing(start):
    job = start("sleep")
    until(lambda: job.state()["state"] == "running")
    assert job_processes(job.folder)
    state = job.stop()
    assert state["state"] == "stopped" and nothing_runs(job)
    assert job.stop() == state
    with pytest.raises(JobError, match="the job stopped"):
        job.wait(10)


def test_waiting_ends_after_its_time_and_the_job_goes_on(start):
    job = start("sleep")
    with pytest.raises(JobError, match="still .* after 0.1 s; wait"):
        job.wait(0.1)
    assert job_processes(job.folder)


def test_a_job_is_found_again_by_its_folder(start, tmp_path):
    start("succeed").wait(30)
    assert Job.attach(tmp_path / "job").state()["state"] == "succeeded"
    with pytest.raises(JobError, match="no job was launched here"):
        Job.attach(tmp_path)
    with pytest.raises(JobError, match="rank_5.log: no such log; there are rank_0.log, supervisor.log"):
        Job.attach(tmp_path / "job").log(5)


def test_a_log_is_followed_until_the_job_ends(start):
    job = start("succeed")
    text = "".join(job.follow(0))
    assert text.count("rank 0 of 1") == 1
    assert job.state()["state"] == "succeeded"
    assert "".join(job.follow(0)).rstrip("\n") == job.log(0), "of a job that has ended, what is there"
    with pytest.raises(JobError, match="rank_7.log: no such log"):
        next(job.follow(7))


def test_a_character_that_is_half_written_is_followed_whole(start):
    job = start("sleep")
    until(lambda: job.log(0) if (job.folder / "log/rank_0.log").exists() else False)
    followed = job.follow(0)
    next(followed)
    letter = "衣".encode()
    with (job.folder / "log/rank_0.log").open("ab") as log:
        log.write(letter[:1])
        log.flush()
        assert next(followed) == ""
        log.write(letter[1:])
        log.flush()
        assert next(followed) == "衣"


def test_a_job_on_another_machine_is_believed_while_it_gives_signs_of_life(start):
    job = start("succeed").wait(30)
    state = json.loads((job.folder / "job.json").read_text())
    (job.folder / "job.json").write_text(json.dumps(state | {"state": "running", "host": "another"}))
    assert job.state()["state"] == "running"
    with pytest.raises(JobError, match="the job runs on another; stop it there"):
        job.stop()
    long_ago = time.time() - 600
    os.utime(job.folder / "job.json", (long_ago, long_ago))
    assert job.state()["state"] == "failed"
    assert "no sign of life from the job's machine another for 600 s" in job.state()["reason"]
    (job.folder / "job.json").write_text(json.dumps(state))


def test_a_running_supervisor_gives_signs_of_life(start):
    job = start("sleep")
    until(lambda: job.state()["state"] == "running")
    long_ago = time.time() - 600
    os.utime(job.folder / "job.json", (long_ago, long_ago))
    until(lambda: (job.folder / "job.json").stat().st_mtime > long_ago + 1)


def test_a_second_job_in_the_same_folder_is_refused_while_the_first_runs(start):
    start("sleep")
    for overwrite in (False, True):
        with pytest.raises(JobError, match="a job is running here"):
            start("succeed", overwrite=overwrite)


def test_an_earlier_run_is_kept_unless_overwriting_is_asked_for(start, tmp_path):
    job = start("train").wait(30)
    (job.folder / "checkpoint/step_2").mkdir(parents=True)
    (job.folder / "notes.txt").write_text("mine")
    with pytest.raises(JobError, match=r"holds an earlier run \(job.json, metrics.jsonl, checkpoint\); give"):
        start("succeed")
    assert (job.folder / "checkpoint/step_2").exists()
    start("succeed", overwrite=True).wait(30)
    assert not (job.folder / "checkpoint").exists() and not (job.folder / "metrics.jsonl").exists()
    assert (job.folder / "notes.txt").exists()


def test_a_job_whose_supervisor_was_killed_is_not_shown_as_running(start):
    job = start("sleep")
    until(lambda: job.state()["state"] == "running")
    os.kill(job.state()["processes"]["supervisor"]["pid"], signal.SIGKILL)
    until(lambda: job.state()["state"] == "failed", 5)
    assert "supervisor of the job was killed" in job.state()["reason"]
    with pytest.raises(JobError, match="of an earlier job still run"):
        start("succeed")
    assert job.stop()["state"] == "stopped" and nothing_runs(job)


def test_the_process_of_another_time_with_the_same_id_is_not_taken_for_ours():
    mine = {"pid": os.getpid(), "create_time": psutil.Process().create_time()}
    assert is_running(mine)
    assert not is_running(mine | {"create_time": mine["create_time"] - 3600})
    assert not is_running(None)


def test_interrupting_the_waiting_launch_stops_the_job(start, tmp_path, monkeypatch):
    def interrupted(job, **_):
        until(lambda: job.state()["state"] == "running")
        raise KeyboardInterrupt

    (tmp_path / "rank.py").write_text(RANK)
    command = [str(tmp_path / "rank.py"), str(tmp_path / "job"), "sleep", "0"]
    monkeypatch.setattr(glm3kit.jobs.launch, "start_job", functools.partial(start_job, command=command))
    monkeypatch.setattr(Job, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(make_config(tmp_path))
    job = Job.attach(tmp_path / "job")
    assert job.state()["state"] == "stopped" and nothing_runs(job)


def test_the_progress_bar_counts_the_steps_of_the_metrics(start, capsys):
    start("train").wait(30, progress=True)
    shown = capsys.readouterr().err
    assert "job: 2step" in shown and "loss=2.500" in shown


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
        monkeypatch.setattr("glm3kit.jobs.job.atomic_write", full)
        raise ValueError("boom")
    assert json.loads((tmp_path / "log/rank_2.json").read_text())["error"] == "ValueError: boom"


def test_the_scheduler_leaves_no_record_of_a_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK_ID", "0")
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    with rank_process(tmp_path):
        pass
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["scheduler.json"]


# Several ranks, by msrun


@pytest.mark.ranks
def test_two_processes_compute_together(start):
    job = start("", ranks=2, script=REAL_RANK).wait(120)
    for rank in (0, 1):
        assert "sum over ranks: [3.]" in job.log(rank, lines=40)
    state = job.state()
    assert state["exit_codes"] == {"rank_0": 0, "rank_1": 0}
    assert state["processes"].keys() == {"supervisor", "msrun", "scheduler", "rank_0", "rank_1"}
    assert nothing_runs(job)


@pytest.mark.ranks
@pytest.mark.parametrize("behaviour, message, code", [
    ("raise", "rank 1 of 2 failed with exit code 1: ValueError: boom", 1),
    ("kill", "rank 1 of 2 was killed by signal 9 (SIGKILL", -9),
    ("exit early", "rank 1 of 2 ended with exit code 7 before its work was done", 7),
    ("exit silently", "rank 1 of 2 ended without a word", None),
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
@pytest.mark.parametrize("victim, message", [("msrun", "msrun ended with exit code -9"),
                                             ("scheduler", "scheduler ended without a word")])
def test_the_death_of_msrun_or_scheduler_ends_the_job(start, victim, message):
    job = start("sleep", ranks=2)
    until(lambda: job.state()["state"] == "running" and victim in job.state()["processes"])
    os.kill(job.state()["processes"][victim]["pid"], signal.SIGKILL)
    killed = time.monotonic()
    assert message in reason_of(job)
    assert time.monotonic() - killed < 10
    assert nothing_runs(job)


@pytest.mark.parametrize("rank_ended, named", [("before", "rank 1 of 2 failed with exit code 1: ValueError: boom"),
                                               ("after", "scheduler ended without a word")])
def test_a_scheduler_without_a_word_is_the_cause_only_where_no_rank_failed_before(tmp_path, monkeypatch, rank_ended,
                                                                                  named):
    monkeypatch.setattr("glm3kit.jobs.supervisor.GRACE_S", 0.2)
    monkeypatch.setattr("glm3kit.jobs.supervisor.is_running", lambda mark: mark["create_time"] > 0)
    start = plan_launch(make_config(tmp_path, 2), local_rank_table(2))
    supervisor = Supervisor(tmp_path, start.plan, [], None)
    supervisor.launcher = SimpleNamespace(poll=lambda: None, pid=os.getpid())
    (tmp_path / "log").mkdir()
    alive, gone = {"pid": 2**22 + 1, "create_time": 1.0}, {"pid": 2**22 + 1, "create_time": 0.0}
    supervisor.state["processes"] |= {"msrun": alive, "scheduler": alive, "rank_0": alive, "rank_1": alive}
    end = {"pid": 2**22 + 1, "exit_code": 1, "error": "ValueError: boom", "ended": "2024-01-01T00:00:00"}
    for what in ("rank", "scheduler") if rank_ended == "before" else ("scheduler", "rank"):
        if what == "rank":  # it has left its record and is about to end
            (tmp_path / "log/rank_1.json").write_text(json.dumps(end))
        else:
            supervisor.state["processes"]["scheduler"] = gone
        assert supervisor.failure() is None, "all about it may not be known yet"
    time.sleep(0.3)
    assert supervisor.failure().startswith(named)


@pytest.mark.ranks
def test_stopping_several_ranks_leaves_no_process_behind(start):
    job = start("sleep", ranks=2)
    until(lambda: job.state()["state"] == "running")
    assert len(job_processes(job.folder)) == 4  # msrun, scheduler, two ranks
    assert job.stop()["state"] == "stopped"
    assert nothing_runs(job)


@pytest.mark.ranks
def test_an_msrun_that_cannot_start_is_told_with_its_own_words(start, monkeypatch, tmp_path):
    broken = tmp_path / "broken/mindspore"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libascend_hal.so is missing')")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    reason = reason_of(start("succeed", ranks=2))
    assert "msrun ended with exit code 1 before the ranks did" in reason
    assert "libascend_hal.so is missing" in reason


def test_the_interpreter_of_the_ranks_is_ours(start):
    assert start("succeed").wait(30).state()["command"][0] == sys.executable
