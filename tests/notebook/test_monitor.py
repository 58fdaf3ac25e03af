"""The live cell: what it reads from a job's folder, what it draws, and what its buttons do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support import until

from glm3kit.config.groups import RunConfig
from glm3kit.errors import JobError
from glm3kit.files import atomic_write
from glm3kit.jobs.job import Job
from glm3kit.jobs.launch import plan_launch, start_job
from glm3kit.jobs.process import process_mark
from glm3kit.notebook.monitor import MonitorView, ProgressReader, duration, ranks_html, state_html, training_monitor
from glm3kit.setup.rank_table import local_rank_table

ATTACK = "<img src=x onerror=alert(1)>"


def write_job(folder, state="running", ranks=2, **more):
    """A job.json as a supervisor writes it, of processes that are this one."""
    mark, names = process_mark(os.getpid()), [f"rank_{rank}" for rank in range(ranks)]
    (folder / "log").mkdir(parents=True, exist_ok=True)
    content = {"state": state, "reason": None, "processes": {"supervisor": mark} | dict.fromkeys(names, mark),
               "exit_codes": dict.fromkeys(names), "rank_size": ranks} | more
    atomic_write(folder / "job.json", json.dumps(content))
    for name in names:
        (folder / "log" / f"{name}.log").touch()
    return Job(folder)


def write_steps(folder, *steps, mode="a", total=100, step_time_ms=500):
    with (folder / "metrics.jsonl").open(mode) as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": 8 / step, "learning_rate": 1e-3, "tokens_per_second": 1234.5,
                                   "step_time_ms": step_time_ms, "total_steps": total}) + "\n")


def test_progress_is_read_from_the_folder_and_only_what_is_new(tmp_path):
    reader = ProgressReader(write_job(tmp_path))
    assert (reader.read().step, reader.read().loss, reader.read().left_s) == (0, None, None)
    write_steps(tmp_path, 1, 2)
    progress = reader.read()
    assert (progress.step, progress.total_steps, progress.loss, progress.tokens_per_second) == (2, 100, 4.0, 1234.5)
    assert progress.left_s == 98 * 0.5
    offset = reader.records.offset
    assert offset == (tmp_path / "metrics.jsonl").stat().st_size
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert reader.read().step == 2 and reader.records.offset == offset, "a line that is being written is left for later"


def test_a_run_that_replaces_another_is_read_from_its_beginning(tmp_path):
    reader = ProgressReader(write_job(tmp_path))
    write_steps(tmp_path, 1, 2, 3)
    assert reader.read().step == 3
    write_steps(tmp_path, 1, mode="w")
    assert reader.read().step == 1


def test_a_damaged_line_and_an_evaluation_are_no_steps(tmp_path):
    reader = ProgressReader(write_job(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('nonsense\n[1]\n{"step": 9, "eval_loss": 2.0}\n')
    assert reader.read().step == 0


def test_each_rank_is_shown_as_it_is(tmp_path):
    gone = {"pid": os.getpid(), "create_time": 0.0}  # a process id that another process has by now
    mark = process_mark(os.getpid())
    job = write_job(tmp_path, ranks=6, exit_codes={"rank_0": None, "rank_1": 0, "rank_2": 3, "rank_3": -9,
                                                   "rank_4": None, "rank_5": None},
                    processes={"supervisor": mark, "rank_0": mark, "rank_1": gone, "rank_2": gone, "rank_3": gone,
                               "rank_4": gone})
    ranks = ProgressReader(job).read().ranks
    assert [rank.state for rank in ranks] == ["running", "finished", "exit code 3", "signal 9", "ended", "starting"]
    assert [rank.bad for rank in ranks] == [False, False, True, True, False, False]
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "log/rank_0.log", (hour_ago, hour_ago))
    silent = ProgressReader(job).read().ranks[0]
    assert silent.state == "silent" and silent.bad
    assert "rank 0: silent · 1 h 00 min ago" in ranks_html(ProgressReader(job).read())


def test_ranks_of_the_other_machines_are_shown_too(tmp_path):
    job = write_job(tmp_path, plan={"nodes": 2})
    assert len(ProgressReader(job).read().ranks) == 2
    mark = {"pid": 2**22 + 1, "create_time": 0.0}  # of another machine: it means nothing here
    write_job(tmp_path / "node_1", host="another machine", exit_codes={"rank_2": None, "rank_3": 1},
              processes={"supervisor": mark, "rank_2": mark, "rank_3": mark})
    assert [(rank.name, rank.state) for rank in ProgressReader(job).read().ranks][2:] == [
        ("rank 2", "running"), ("rank 3", "exit code 1")]


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"),
                                           (7500, "2 h 05 min")])
def test_durations_are_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_everything_that_was_read_is_escaped(tmp_path):
    job = write_job(tmp_path, state="failed", reason=ATTACK, exit_codes={ATTACK: 1})
    progress = ProgressReader(job).read()
    for html in (state_html(progress, note=ATTACK), ranks_html(progress)):
        assert "<img" not in html and "&lt;img" in html
    view = MonitorView(write_job(tmp_path / "other", state=ATTACK))
    view.draw()
    assert "<img" not in view.state.value


def test_the_buttons_offer_what_is_possible(tmp_path):
    job = write_job(tmp_path)
    view = MonitorView(job)
    assert view.draw() and (view.stop.disabled, view.resume.disabled) == (False, True)
    write_job(tmp_path, state="failed", reason="boom")
    assert not view.draw() and (view.stop.disabled, view.resume.disabled) == (True, True), "there is no checkpoint"
    assert "boom" in view.state.value
    (tmp_path / "checkpoint/step_4").mkdir(parents=True)
    (tmp_path / "checkpoint/step_4/complete.json").touch()
    view.draw()
    assert (view.stop.disabled, view.resume.disabled) == (True, False)
    write_job(tmp_path, state="succeeded")
    view.draw()
    assert (view.stop.disabled, view.resume.disabled) == (True, True)


def test_the_cell_follows_the_folder_until_the_job_ends_and_is_drawn_again_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr("glm3kit.notebook.monitor.REFRESH_S", 0.05)
    write_job(tmp_path)
    box = training_monitor(tmp_path)
    assert training_monitor(Job(tmp_path)) is box, "the same widgets, shown once more"
    _, state, bar, numbers, ranks, _ = box.children
    write_steps(tmp_path, *range(1, 51))
    until(lambda: "50 / 100" in numbers.value)
    assert (bar.value, bar.max) == (50, 100) and "25 s" in numbers.value and "1,234" in numbers.value
    assert "rank 1: running" in ranks.value
    write_job(tmp_path, state="succeeded", exit_codes={"rank_0": 0, "rank_1": 0})
    until(lambda: "succeeded" in state.value)
    assert bar.bar_style == "success" and "rank 1: finished" in ranks.value


def test_stop_ends_a_real_job_and_an_error_of_a_button_is_shown(tmp_path):
    config = RunConfig(name="job", output_dir=str(tmp_path), parallel={"device_target": "CPU"})
    (tmp_path / "rank.py").write_text("import time; time.sleep(300)")
    job = start_job(plan_launch(config, local_rank_table(1)), command=[str(tmp_path / "rank.py")])
    try:
        view = MonitorView(job)
        view.watch()
        view.stop.click()
        until(lambda: "stopped" in view.state.value and not view._busy)
        assert job.state()["state"] == "stopped"
        view.resume.click()  # a keyboard finds it although it is disabled
        until(lambda: "holds no complete checkpoint" in view.state.value)
        assert job.state()["state"] == "stopped"
    finally:
        job.stop()


def test_resume_starts_the_job_of_the_folder_again(tmp_path, monkeypatch):
    config = RunConfig(name="job", output_dir=str(tmp_path), parallel={"device_target": "CPU"})
    (tmp_path / "rank.py").write_text("import time; time.sleep(300)")
    command = [str(tmp_path / "rank.py")]
    job = start_job(plan_launch(config, local_rank_table(1)), command=command)
    job.stop()
    asked = []

    def start_again(start, overwrite):
        asked.append((start.resume, start.config.job_dir, overwrite))
        return start_job(start, overwrite, command)

    monkeypatch.setattr("glm3kit.jobs.launch.start_job", start_again)
    monkeypatch.setattr("glm3kit.jobs.launch.newest_checkpoint", lambda folder: None)  # as if there were one
    view = MonitorView(job)
    try:
        view.resume.click()
        until(lambda: asked and not view._busy and not view.stop.disabled)
        assert asked == [(True, job.folder, False)]
        assert job.state()["state"] in ("starting", "running")
    finally:
        job.stop()


def test_a_folder_without_a_job_is_an_error(tmp_path):
    with pytest.raises(JobError, match="no job was launched here"):
        training_monitor(tmp_path)


def test_a_dead_supervisor_is_not_drawn_as_running(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        mark = process_mark(process.pid)
        job = write_job(tmp_path, processes={"supervisor": mark})
        process.send_signal(signal.SIGKILL)
    progress = ProgressReader(job).read()
    assert progress.state == "failed" and "supervisor of the job was killed" in progress.reason
