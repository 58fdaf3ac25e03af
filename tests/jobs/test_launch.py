"""Launching: which devices a run gets, what its ranks inherit, what is refused before anything starts."""

import functools
import json
import shlex
import subprocess
import sys
from threading import Timer

import pytest
from jobs.scripted import RANK, make_config, nothing_runs
from support import until

import glm3kit.jobs.launch
import glm3kit.setup.rank_table
from glm3kit.config.groups import RunConfig
from glm3kit.config.load import load_config
from glm3kit.errors import JobError, RankTableError
from glm3kit.jobs.job import Job
from glm3kit.jobs.launch import choose_rank_table, launch, plan_launch, start_job
from glm3kit.jobs.plan import free_port
from glm3kit.setup.rank_table import Device, RankTable, Server, local_rank_table


def test_too_few_devices_are_refused_with_both_numbers_and_nothing_is_written(tmp_path):
    with pytest.raises(RankTableError, match=r"lists 1 device\(s\), but 2 are asked for"):
        launch(make_config(tmp_path / "output", 2), rank_table=local_rank_table(1))
    assert not (tmp_path / "output").exists()


def test_a_table_still_initializing_starts_nothing(tmp_path):
    (tmp_path / "hccl.json").write_text('{"status": "initializing"}')
    with pytest.raises(RankTableError, match="initializing"):
        launch(make_config(tmp_path / "output", 2), rank_table=tmp_path / "hccl.json", table_timeout_s=0)
    assert not (tmp_path / "output").exists()


def group_form(count):
    """What ModelArts leaves in a training job of one pod."""
    devices = [{"device_id": str(n), "device_ip": f"192.1.0.{n}"} for n in range(count)]
    instance = {"pod_name": "job-0", "server_id": "10.0.0.7", "devices": devices}
    return json.dumps({"status": "completed", "group_list": [{"instance_list": [instance]}]})


def test_a_launch_waits_for_the_table_that_a_platform_is_filling(tmp_path, monkeypatch, capsys):
    table = tmp_path / "jobstart_hccl.json"
    table.write_text('{"status": "initializing"}')
    monkeypatch.setenv("RANK_TABLE_FILE", str(tmp_path))
    often = functools.partial(glm3kit.setup.rank_table.wait_for_rank_table, poll_s=0.05)
    monkeypatch.setattr("glm3kit.jobs.launch.wait_for_rank_table", often)
    filling = Timer(0.3, table.write_text, [group_form(2)])
    filling.start()
    start = plan_launch(make_config(tmp_path, 2, device_target="auto"))
    assert [device.device_ip for device in start.table.devices] == ["192.1.0.0", "192.1.0.1"]
    assert "initializing" in capsys.readouterr().out


def test_a_process_that_a_platform_started_once_a_device_launches_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK_SIZE", "8")
    monkeypatch.setenv("RANK_ID", "3")
    with pytest.raises(JobError, match="RANK_SIZE=8 is set: a platform starts this once a device.*`glm3kit train`"):
        launch(make_config(tmp_path))


def two_servers():
    return RankTable((Server("10.0.0.1", (Device("0", "192.1.0.1", "0"),)),
                      Server("10.0.0.2", (Device("0", "192.1.0.2", "1"),))))


def test_the_second_machine_has_a_folder_of_its_own_inside_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("glm3kit.jobs.plan.own_addresses", lambda: {"127.0.0.1", "10.0.0.2"})
    config = make_config(tmp_path, 2)
    start = plan_launch(config, two_servers())
    assert start.folder == tmp_path / "job/node_1"
    (tmp_path / "job").mkdir()
    (tmp_path / "job/job.json").write_text("that of the first machine")
    (tmp_path / "rank.py").write_text("import time; time.sleep(300)")
    job = start_job(start, command=[str(tmp_path / "rank.py")])
    try:
        assert load_config(job.folder / "config.yaml").job_dir == config.job_dir, "metrics and checkpoints are shared"
        assert (tmp_path / "job/job.json").read_text() == "that of the first machine"
    finally:
        job.stop()


def test_a_machine_without_any_of_the_ranks_asked_for_launches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("glm3kit.jobs.launch.own_addresses", lambda: {"127.0.0.1", "10.0.0.2"})
    with pytest.raises(JobError, match=r"the 1 ranks asked for are on 10.0.0.1, none on this machine \(10.0.0.2\)"):
        choose_rank_table(make_config(tmp_path, 1), two_servers())
    monkeypatch.setattr("glm3kit.jobs.launch.own_addresses", lambda: {"127.0.0.1", "10.0.0.1"})
    assert choose_rank_table(make_config(tmp_path, 1), two_servers()).rank_size == 1


def environments(folder):
    """What the processes of a job have printed, without what a shell adds."""
    found = {name: json.loads((folder / f"log/{name}.log").read_text()) for name in ("scheduler", "rank_0", "rank_1")}
    for environment in found.values():
        for name in ("_", "SHLVL", "PWD", "OLDPWD", "LINES", "COLUMNS"):
            environment.pop(name, None)
    return found


SHOW = """
import json, os, sys
from glm3kit.jobs.process import rank_process
with rank_process(sys.argv[1]):
    print(json.dumps(dict(os.environ)))
"""


def test_the_report_and_the_shell_lines_say_what_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK_TABLE_FILE", "of another launcher")
    start = plan_launch(make_config(tmp_path / "my folder", 2), local_rank_table(2), port=free_port())
    assert "devices: local rank table, 2 on 1 machine(s)" in start.report()
    assert "ranks here: 0 on device 0, 1 on device 1" in start.report()
    lines = start.shell()
    assert "unset RANK_TABLE_FILE" in lines.splitlines()
    assert lines.count(shlex.join([sys.executable, *start.rank_command])) == 3, "a scheduler, two ranks"
    assert not (tmp_path / "my folder").exists(), "nothing was started"

    # A shell that runs these lines gives each process the environment that it has in the job.
    (tmp_path / "show.py").write_text(SHOW)
    command = [str(tmp_path / "show.py"), str(start.folder)]
    job = start_job(start, command=command).wait(60)
    in_job = environments(job.folder)
    assert [in_job[name].get("MS_NODE_ID") for name in in_job] == [None, "0", "1"]
    for log in (job.folder / "log").glob("*.log"):
        log.unlink()
    script = lines.replace(shlex.join(start.rank_command), shlex.join(command))
    subprocess.run(["bash", "-c", script], check=True)
    assert environments(job.folder) == in_job


def test_the_platforms_table_is_used_unless_the_run_is_for_the_cpu(tmp_path):
    (tmp_path / "user/config").mkdir(parents=True)
    RankTable((Server("10.0.0.1", tuple(Device(str(n), f"10.1.0.{n}", str(n)) for n in range(8))),)).save(
        tmp_path / "user/config/jobstart_hccl.json")
    found = choose_rank_table(make_config(tmp_path, 2, device_target="auto"), environ={}, root=tmp_path)
    assert [device.device_ip for device in found.devices] == ["10.1.0.0", "10.1.0.1"]
    assert choose_rank_table(make_config(tmp_path, 2), environ={}, root=tmp_path) == local_rank_table(2)
    with pytest.raises(RankTableError, match="lists 8"):
        choose_rank_table(make_config(tmp_path, 9, device_target="auto"), environ={}, root=tmp_path)


def test_without_a_table_the_cards_of_the_machine_are_counted(tmp_path):
    (tmp_path / "dev").mkdir()
    ascend = make_config(tmp_path, 2, device_target="Ascend")
    with pytest.raises(RankTableError, match=r"shows 0 Ascend card\(s\) .* but 2 are asked for"):
        choose_rank_table(ascend, environ={}, root=tmp_path)
    either = make_config(tmp_path, 2, device_target="auto")
    assert choose_rank_table(either, environ={}, root=tmp_path) == local_rank_table(2)
    (tmp_path / "dev/davinci0").touch()
    with pytest.raises(RankTableError, match=r"shows 1 Ascend card"):
        choose_rank_table(either, environ={}, root=tmp_path)


def test_the_saved_configuration_means_the_same_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = RunConfig(output_dir="output", data={"train_path": "train.json"}, model={"tokenizer_path": "tok.model"})
    config.save("deep/er/config.yaml")
    loaded = load_config("deep/er/config.yaml")
    assert loaded.job_dir == tmp_path / "output/run"
    assert loaded.data.train_path == (str(tmp_path / "train.json"),)
    assert loaded.model.tokenizer_path == str(tmp_path / "tok.model")


def test_a_configuration_without_data_is_read_back_equal(tmp_path):
    RunConfig(output_dir="/output").save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == RunConfig(output_dir="/output")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="cannot be written"):
        launch(make_config(tmp_path / "file"))


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
