"""What makes a process a rank: its place among the others, its share of cores and cards; joining a platform's run."""

import json
import os
import subprocess
import sys
import time

import pytest
from support import ROOT, SMALL, TINY, until

from glm3kit.errors import JobError
from glm3kit.jobs.environment import joining_variables, process_variables, rank_environment, visible_devices
from glm3kit.jobs.plan import free_port, plan_run
from glm3kit.jobs.process import is_running, process_mark
from glm3kit.setup.rank_table import Device, RankTable, Server, local_rank_table


def table_of(*device_ids, servers=("10.0.0.1",)):
    """Servers with these devices each, ranks counted on from server to server."""
    return RankTable(tuple(Server(name, tuple(Device(str(device), f"192.168.{n}.{device}", str(n * len(device_ids) + k))
                                              for k, device in enumerate(device_ids)))
                           for n, name in enumerate(servers)))


TWO = ("10.0.0.1", "10.0.0.2")


def test_the_ranks_of_a_machine_meet_at_the_scheduler_that_is_started_with_them():
    processes = process_variables(plan_run(local_rank_table(8), port=4567))
    assert list(processes) == ["scheduler", *(f"rank_{rank}" for rank in range(8))]
    common = {"MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": "4567", "MS_WORKER_NUM": "8", "RANK_SIZE": "8",
              "MS_TOPO_TIMEOUT": "300"}
    assert processes["scheduler"] == common | {"MS_ROLE": "MS_SCHED", "RANK_ID": "0"}
    assert processes["rank_5"] == common | {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": "5", "RANK_ID": "5", "DEVICE_ID": "5"}


def test_on_a_machine_without_the_scheduler_only_its_ranks_are_started():
    processes = process_variables(plan_run(table_of(0, 1, servers=TWO), {}, {"10.0.0.2"}, port=9000))
    assert list(processes) == ["rank_2", "rank_3"]
    assert processes["rank_3"].items() >= {"MS_WORKER_NUM": "4", "MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "9000",
                                           "RANK_ID": "3", "DEVICE_ID": "1"}.items()


def test_a_rank_alone_meets_nobody():
    assert process_variables(plan_run(local_rank_table(1))) == {
        "rank_0": {"RANK_ID": "0", "RANK_SIZE": "1", "DEVICE_ID": "0"}}


def test_between_machines_the_ranks_talk_from_the_address_that_the_others_know():
    plan = plan_run(table_of(0, servers=TWO), {}, {"10.0.0.2", "172.17.0.1"})
    environment = rank_environment(plan, "CPU", {})
    assert environment["MS_WORKER_IP"] == environment["HCCL_IF_IP"] == "10.0.0.2"
    by_hand = rank_environment(plan, "CPU", {"HCCL_SOCKET_IFNAME": "eth1", "MS_WORKER_IP": "10.9.0.2"})
    assert by_hand["MS_WORKER_IP"] == "10.9.0.2" and "HCCL_IF_IP" not in by_hand
    assert not {"MS_WORKER_IP", "HCCL_IF_IP"} & rank_environment(plan_run(local_rank_table(2)), "CPU", {}).keys()


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


# Joining the others where a platform has started the processes


PRESET = {"RANK_ID": "9", "RANK_SIZE": "16", "ASCEND_DEVICE_ID": "1"}


def test_a_process_started_by_the_platform_joins_the_others(tmp_path):
    table = tmp_path / "jobstart_hccl.json"
    table_of(*range(8), servers=TWO).save(table)
    joined = joining_variables(PRESET | {"RANK_TABLE_FILE": str(table)})
    assert joined == {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "16", "MS_NODE_ID": "9", "DEVICE_ID": "1",
                      "MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118"}
    pods = joining_variables(PRESET | {"RANK_TABLE_FILE": str(table), "VC_WORKER_HOSTS": "job-0.job,job-1.job"})
    assert pods["MS_SCHED_HOST"] == "job-0.job"


def test_on_one_machine_they_meet_at_its_loopback_address(tmp_path):
    table = tmp_path / "jobstart_hccl.json"
    table_of(*range(8)).save(table)
    assert joining_variables(PRESET | {"RANK_ID": "3", "RANK_SIZE": "8", "RANK_TABLE_FILE": str(table)})[
        "MS_SCHED_HOST"] == "127.0.0.1"


@pytest.mark.parametrize("environ", [{}, {"RANK_SIZE": "1", "RANK_ID": "0"}, PRESET | {"MS_ROLE": "MS_WORKER"}])
def test_a_single_process_and_one_that_a_launcher_placed_join_nothing_else(environ):
    assert joining_variables(environ) == {}


@pytest.mark.parametrize("change", [{"RANK_ID": ""}, {"RANK_ID": "16"}, {"RANK_SIZE": "many"}])
def test_a_rank_outside_of_its_size_is_refused(change, tmp_path):
    with pytest.raises(JobError, match="expected numbers, the first below the second"):
        joining_variables(PRESET | change, root=tmp_path)


@pytest.mark.ranks
def test_processes_that_a_platform_started_train_together(tmp_path):
    """A ModelArts training job, played: the platform's variables, a process a card, a table that is still filled."""
    group = {"pod_name": "job-0", "server_id": "10.0.0.1",
             "devices": [{"device_id": str(n), "device_ip": f"192.1.0.{n}"} for n in range(2)]}
    table = tmp_path / "jobstart_hccl.json"
    table.write_text('{"status": "initializing"}')
    content = json.dumps({"status": "completed", "group_list": [{"instance_list": [group]}]})
    command = [sys.executable, "-m", "glm3kit", "train", str(TINY), *SMALL, "train.total_steps=2",
               f"output_dir={tmp_path}"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "RANK_TABLE_FILE": str(table), "RANK_SIZE": "2",
                              "MS_SCHED_PORT": str(free_port())}
    ranks = [subprocess.Popen(command, env=variables | {"RANK_ID": str(n), "ASCEND_DEVICE_ID": str(n)},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for n in range(2)]
    try:
        until(lambda: all((tmp_path / f"tiny/log/rank_{n}.json").exists() for n in range(2)), 120)
        time.sleep(1)  # both look at the table right after they have said that they start
        table.write_text(content)
        said = [rank.communicate(timeout=180)[0] for rank in ranks]  # until the scheduler has ended, too
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert any("initializing" in text for text in said), "they waited for the table"
    assert len((tmp_path / "tiny/metrics.jsonl").read_text().splitlines()) == 2
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "tiny/log").glob("*.json")}
    assert records["rank_0"]["exit_code"] == records["rank_1"]["exit_code"] == 0
    until(lambda: not is_running(process_mark(records["scheduler"]["pid"])), 30)  # once all ranks have left
