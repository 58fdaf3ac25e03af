"""Jobs as their folders show them: state, log, waiting, stopping, found again."""

import json
import os
import signal
import time

import pytest
from jobs.scripted import make_config, nothing_runs
from support import until

from glm3kit.config.load import load_config
from glm3kit.errors import JobError
from glm3kit.jobs.job import Job
from glm3kit.jobs.process import job_processes
from glm3kit.setup.rank_table import local_rank_table, read_rank_table


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
    until(lambda: (job.folder / "log/rank_0.log").exists() and job.log(0))
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


def test_a_job_whose_supervisor_was_killed_is_not_shown_as_running(start):
    job = start("sleep")
    until(lambda: job.state()["state"] == "running")
    os.kill(job.state()["processes"]["supervisor"]["pid"], signal.SIGKILL)
    until(lambda: job.state()["state"] == "failed", 5)
    assert "supervisor of the job was killed" in job.state()["reason"]
    with pytest.raises(JobError, match="of an earlier job still run"):
        start("succeed")
    assert job.stop()["state"] == "stopped" and nothing_runs(job)


def test_the_progress_bar_counts_the_steps_of_the_metrics(start, capsys):
    start("train").wait(30, progress=True)
    shown = capsys.readouterr().err
    assert "job: 2step" in shown and "loss=2.500" in shown
