"""Launching: which devices a run gets, what its ranks inherit, what is refused before anything starts."""

import json
import os
import shlex
import subprocess
import sys
from threading import Timer

import pytest

from glm3kit.config.groups import RunConfig
from glm3kit.config.load import load_config
from glm3kit.errors import JobError, RankTableError
from glm3kit.jobs.launch import choose_rank_table, launch, plan_launch, rank_environment, start_job, visible_devices
from glm3kit.jobs.plan import msrun_command, plan_run
from glm3kit.setup.rank_table import Device, RankTable, Server, local_rank_table


def make_config(folder, ranks=1, **more):
    parallel = {"data_parallel": ranks, "device_target": "CPU"} | more
    return RunConfig(name="job", output_dir=str(folder), parallel=parallel)


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
    monkeypatch.setattr("glm3kit.setup.rank_table.POLL_S", 0.05)
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


def test_between_machines_the_ranks_talk_from_the_address_that_the_others_know():
    plan = plan_run(two_servers(), {}, {"10.0.0.2", "172.17.0.1"})
    environment = rank_environment(plan, "CPU", {})
    assert environment["MS_WORKER_IP"] == environment["HCCL_IF_IP"] == "10.0.0.2"
    by_hand = rank_environment(plan, "CPU", {"HCCL_SOCKET_IFNAME": "eth1", "MS_WORKER_IP": "10.9.0.2"})
    assert by_hand["MS_WORKER_IP"] == "10.9.0.2" and "HCCL_IF_IP" not in by_hand
    assert not {"MS_WORKER_IP", "HCCL_IF_IP"} & rank_environment(plan_run(local_rank_table(2)), "CPU", {}).keys()


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


def test_the_report_and_the_shell_lines_say_what_would_run(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK_TABLE_FILE", "of another launcher")
    start = plan_launch(make_config(tmp_path / "my folder", 2), local_rank_table(2), port=9321)
    assert "devices: local rank table, 2 on 1 machine(s)" in start.report()
    assert "ranks here: 0 on device 0, 1 on device 1" in start.report()
    *settings, folder, command = start.shell().splitlines()
    assert "unset RANK_TABLE_FILE" in settings
    assert shlex.split(command) == msrun_command(start.plan, start.folder / "log", start.rank_command)
    # a shell that runs these lines has the environment that the ranks get
    show = f"{shlex.quote(sys.executable)} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    script = "\n".join([*settings, show])
    shell = json.loads(subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout)
    expected = start.environment | {"GLM3KIT_JOB": str(start.folder)}
    expected.pop("_", None)  # a shell's own: the program that it runs
    assert {key: shell.get(key) for key in expected} == expected
    assert not (tmp_path / "my folder").exists(), "nothing was started"


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


def table_of(*device_ids):
    return RankTable((Server("a", tuple(Device(str(d), "", str(n)) for n, d in enumerate(device_ids))),))


def test_other_cards_than_the_first_are_made_visible_by_their_place():
    assert visible_devices(("0", "1"), [0, 1, 2, 3]) is None
    assert visible_devices(("4", "5"), list(range(8))) == "4,5"
    assert visible_devices(("4", "5"), [4, 5]) is None  # a container that was given these two
    assert visible_devices(("6", "4"), [4, 5, 6]) == "2,0"
    assert visible_devices(("9",), [0]) is None  # numbers of another host: leave it to the runtime


def test_ranks_share_the_cores_and_forget_other_launchers(tmp_path):
    caller = {"RANK_TABLE_FILE": "x", "MS_ROLE": "MS_WORKER", "RANK_ID": "3", "HOME": "/root"}
    environment = rank_environment(plan_run(local_rank_table(2)), "CPU", caller)
    assert not environment.keys() & {"RANK_TABLE_FILE", "MS_ROLE", "RANK_ID"}
    assert environment["HOME"] == "/root"
    assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert rank_environment(plan_run(local_rank_table(2)), "CPU", {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    (tmp_path / "dev").mkdir()
    for card in range(4):
        (tmp_path / f"dev/davinci{card}").touch()
    on_cards = rank_environment(plan_run(table_of(2, 3)), "Ascend", {}, tmp_path)
    assert on_cards["ASCEND_RT_VISIBLE_DEVICES"] == "2,3" and "OMP_NUM_THREADS" not in on_cards


def test_msrun_is_asked_for_one_process_a_device_on_this_machine(tmp_path):
    command = msrun_command(plan_run(local_rank_table(8), port=4567), tmp_path,
                            ["-m", "glm3kit", "train", "config.yaml"])
    assert not [word for word in command if word.startswith("--node_rank")]
    assert {"--worker_num=8", "--local_worker_num=8", "--master_port=4567", f"--log_dir={tmp_path}"} <= set(command)
    assert command[-5:] == ["python", "-m", "glm3kit", "train", "config.yaml"]


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
