"""The forms of rank tables: what each means, and the faults that it can have of its own."""

import json
import re

import pytest
from setup.tables import device, lab, ranks, super_pods, version_1_0

from glm3kit.errors import RankTableError
from glm3kit.setup.rank_table import check_rank_table, read_rank_table


def test_the_group_form_of_a_job_converts_to_its_version_1_0(shared):
    folder = shared / "data/rank_tables"
    converted = read_rank_table(folder / "01_modelarts_v0_2x8_k8s_jobstart_hccl.json").to_dict()
    assert converted == json.loads((folder / "02_modelarts_v1_2x8_generated_jobstart_hccl.json").read_text())


def test_an_instance_of_the_lab_form_is_a_device_with_its_own_rank(shared):
    [path] = (shared / "data/rank_tables").glob("20_*.json")
    table = read_rank_table(path)
    assert [(d.device_id, d.device_ip, d.rank_id) for d in table.devices][:2] == [
        ("0", "192.168.100.101", "0"), ("1", "192.168.101.101", "1")]
    assert [server.server_id for server in table.servers] == ["10.155.170.167"]


def test_super_pods_keep_the_addresses_of_their_hosts(shared, tmp_path):
    [path] = (shared / "data/rank_tables").glob("14_1_*.json")
    table = read_rank_table(path)
    assert [(server.server_id, server.host_ip) for server in table.servers] == [
        ("node_0", "172.16.0.100"), ("node_1", "172.16.0.101"), ("node_2", "172.16.0.102"), ("node_3", "172.16.0.103")]
    assert table.devices[15].device_ip == "192.168.4.9"
    table.save(tmp_path / "table.json")
    assert read_rank_table(tmp_path / "table.json") == table


def test_the_lab_form_is_checked_against_its_counts(table_file):
    assert read_rank_table(table_file(lab((1, "a"), (0, "a")))).devices[0].device_id == "0"
    for change, message in (({"server_num": "2"}, "server_num says 2, but 1 server(s)"),
                            ({"device_num": "3"}, "device_num says 3, but 2 device(s)")):
        assert check_rank_table(table_file(lab((0, "a"), (1, "a"), **change))) == [
            f"group_list[0]: {message} are listed; the table is unfinished or was cut: make it again"]
    content = lab((0, "a"))
    content["group_list"][0]["instance_list"][0]["devices"].append(device(1))
    assert any("has 2 devices; expected one, that of rank_id 0" in fault
               for fault in check_rank_table(table_file(content)))


def test_super_pods_are_checked_against_the_servers(table_file):
    assert read_rank_table(table_file(super_pods(version="1.1"))).rank_size == 1
    for pods, message in (([], "has server a 0 time(s), server_list 1 time(s)"),
                          ([{"super_pod_id": "0", "server_list": [{"server_id": "a"}, {"server_id": "b"}]}],
                           "has server b 1 time(s), server_list 0 time(s)")):
        assert any(message in fault for fault in check_rank_table(table_file(super_pods(super_pod_list=pods))))
    plain = version_1_0(("a", [device(0, rank=0)]))["server_list"]
    (fault,) = check_rank_table(table_file(super_pods(server_list=plain)))
    assert "super_device_id is missing" in fault


def test_a_list_of_ranks_becomes_servers_with_their_devices(table_file):
    table = read_rank_table(table_file(ranks((0, "rack0-pod0", "172.16.0.10"), (1, "rack0-pod0", "172.16.0.28"),
                                             (0, "rack0-pod1", "172.16.1.10"), (1, "rack0-pod1", "172.16.1.28"))))
    assert table.to_dict() == version_1_0(
        ("rack0-pod0", [device(0, "172.16.0.10", 0), device(1, "172.16.0.28", 1)]),
        ("rack0-pod1", [device(0, "172.16.1.10", 2), device(1, "172.16.1.28", 3)]))
    eid = read_rank_table(table_file(ranks((0, "pod", "000000000000000000100000dfdf0020"))))
    assert eid.devices[0].device_ip == "::10:0:dfdf:20"


@pytest.mark.parametrize("change, message", [
    ({"rank_count": 3}, "rank_count says 3, but 1 rank(s)"),
    ({"status": "initializing"}, "not assigned all devices yet"),
    ({"rank_list": [{"rank_id": 0, "device_id": 0, "level_list": []}]}, "does not begin with net_layer 0"),
    ({"rank_list": [{"rank_id": "x", "device_id": 0}]}, 'rank_id is "x"'),
])
def test_a_list_of_ranks_with_a_fault_says_which(table_file, change, message):
    with pytest.raises(RankTableError, match=re.escape(message)):
        read_rank_table(table_file(ranks((0, "pod", "10.0.0.1"), **change)))
