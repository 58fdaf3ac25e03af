"""Rank tables: the real files, every form, every fault with a precise error, waiting for one, merging."""

import contextlib
import json
import random
import re

import pytest
from setup.tables import device, groups, lab, ranks, super_pods, version_1_0

from glm3kit.errors import RankTableError
from glm3kit.setup.rank_table import (
    UnfinishedTableError,
    ascend_cards,
    check_rank_table,
    find_rank_table,
    local_rank_table,
    merge_rank_tables,
    read_rank_table,
    wait_for_rank_table,
)

# What each real file is: devices and servers, or what the error must say (SOURCES.tsv names the forms).
REAL = {
    "01": (16, 2), "02": (16, 2), "03": (8, 1), "26": (8, 1), "37": (16, 2), "42": (16, 2), "59": (64, 8),
    "14_0": "no version", "14_1": (16, 4), "15": "initializing", "35": "_2p.json:33: is no JSON",
    "65": "_sample.json:8: is no JSON", "20": (8, 1), "21": (1, 1), "23": (8, 1), "36": (1, 1), "54": (2, 1),
    "71": "group_list[0].instance_list[0].devices[0]: device_ip is 'xxx.xxx.xxx.xxx'",
}


@pytest.mark.parametrize("number", REAL)
def test_every_real_file_gives_a_table_or_a_precise_error(shared, number):
    [path] = (shared / "data/rank_tables").glob(f"{number}_*.json")
    expected = REAL[number]
    if isinstance(expected, tuple):
        table = read_rank_table(path)
        assert (table.rank_size, len(table.servers)) == expected
        assert [device.rank_id for device in table.devices] == [str(n) for n in range(table.rank_size)]
    else:
        with pytest.raises(RankTableError, match=re.escape(expected)) as caught:
            read_rank_table(path)
        assert str(path) in str(caught.value)


def test_no_real_file_is_left_out(shared):
    found = {path.name for path in (shared / "data/rank_tables").glob("*.json")}
    assert len(found) == len(REAL) == 18
    assert all(any(name.startswith(number + "_") for number in REAL) for name in found)


@pytest.mark.parametrize("number", ["02", "03", "42"])
def test_version_1_0_is_written_as_it_was_read(shared, tmp_path, number):
    [path] = (shared / "data/rank_tables").glob(f"{number}_*.json")
    read_rank_table(path).save(tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == json.loads(path.read_text())
    assert read_rank_table(tmp_path / "table.json") == read_rank_table(path)


def test_every_fault_of_a_table_is_told_at_once(table_file):
    content = version_1_0(("a", [device(0, "10.0.0.1", 0), device(0, "no address", 1)]),
                          ("a", [device(1, "10.0.0.1", 2), device("x", "10.0.0.4", 2)]), server_count="5")
    content["status"] = "failed"
    faults = check_rank_table(table_file(content))
    expected = ['status is "failed"', "device_ip is 'no address'", 'device_id is "x"', "server_count says 5",
                "server_id a stands twice", "device_ip 10.0.0.1 stands twice"]
    assert len(faults) == len(expected) and all(any(what in fault for fault in faults) for what in expected)
    with pytest.raises(RankTableError) as caught:
        read_rank_table(table_file(content))
    assert len(str(caught.value).splitlines()) == len(expected)


def test_a_message_ends_after_some_faults_and_says_how_many_more(shared):
    [path] = (shared / "data/rank_tables").glob("71_*.json")
    assert len(check_rank_table(path)) == 32, "the address of each of its 32 devices is a row of x"
    with pytest.raises(RankTableError, match=r"24 more faults; `glm3kit rank-table check .*71_.*` lists them all"):
        read_rank_table(path)


def test_a_table_without_faults_and_one_that_cannot_be_read_are_checked_too(table_file):
    assert check_rank_table(table_file(version_1_0(("a", [device(0, rank=0)])))) == []
    (fault,) = check_rank_table(table_file("{"))
    assert "is no JSON" in fault


def waited_for(states, path, **options):
    """What waiting gives, and says, while the file goes through `states` (text, or None: no file), one a look."""
    said, rest = [], list(states)

    def step(_):
        if rest:
            content = rest.pop(0)
            path.unlink(missing_ok=True) if content is None else path.write_text(content)

    step(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm3kit.setup.rank_table.time.sleep", step)
        return wait_for_rank_table(path, say=said.append, **options), said


def test_waiting_ends_when_the_table_is_complete_and_stays_so(tmp_path):
    complete = json.dumps(version_1_0(("a", [device(0, rank=0)])))
    initializing = '{"status": "initializing"}'
    path = tmp_path / "jobstart_hccl.json"
    table, said = waited_for([complete], path)
    assert table.rank_size == 1 and said == [], "a table that is complete already is not waited for"
    table, said = waited_for([None, initializing, complete[:40], complete, initializing, complete], path)
    assert table.rank_size == 1
    for told, what in zip(said, ("no such file", "initializing", "is no JSON", "is complete; making sure",
                                 "went back: a pod is being replaced", "is complete; making sure"), strict=True):
        assert what in told


def test_waiting_has_a_limit_and_says_what_it_waited_for(tmp_path):
    with pytest.raises(UnfinishedTableError, match="(?s)initializing.*Waited 0 s; is the job still being scheduled"):
        waited_for(['{"status": "initializing"}'], tmp_path / "table.json", timeout_s=0)
    with pytest.raises(UnfinishedTableError, match="RANK_TABLE_FILE is not set and .* holds none"):
        wait_for_rank_table(timeout_s=0, say=lambda _: None, environ={}, root=tmp_path, poll_s=0)


def test_a_complete_table_with_faults_is_not_waited_for(tmp_path):
    content = json.dumps(version_1_0(("a", [device(0, rank=0)]), server_count="2"))
    with pytest.raises(RankTableError, match="server_count says 2"):
        waited_for([content], tmp_path / "table.json")


def test_servers_follow_the_number_of_their_pod_not_the_text(table_file):
    table = read_rank_table(table_file(groups(("job-10", "c", [device(0, "10.0.3.1")]),
                                              ("job-9", "b", [device(0, "10.0.2.1")]),
                                              ("job-1", "a", [device(0, "10.0.1.1")]))))
    assert [server.server_id for server in table.servers] == ["a", "b", "c"]


def test_groups_and_pods_without_devices_take_no_rank(table_file):
    content = groups(("job-0", "a", []), ("job-1", "b", [device(3, "10.0.1.1")]))
    content["group_list"].insert(0, {"group_name": "empty", "device_count": "0", "instance_list": []})
    table = read_rank_table(table_file(content))
    assert table.to_dict()["server_list"] == [{"server_id": "b", "device": [device(3, "10.0.1.1", rank=0)]}]


def test_the_shorter_word_complete_is_a_completed_table(table_file):
    content = version_1_0(("a", [device(0, rank=0)]))
    assert read_rank_table(table_file(content | {"status": "complete"})).to_dict()["status"] == "completed"


def test_one_server_needs_no_device_addresses_but_two_do(table_file):
    alone = version_1_0(("a", [{"device_id": "0", "rank_id": "0"}, {"device_id": "1", "rank_id": "1"}]))
    assert read_rank_table(table_file(alone)).rank_size == 2
    two = version_1_0(("a", [{"device_id": "0", "rank_id": "0"}]), ("b", [device(0, rank=1)]))
    with pytest.raises(RankTableError, match="device 0 of server a has no device_ip"):
        read_rank_table(table_file(two))


@pytest.mark.parametrize("content, message", [
    ({"status": "initializing"}, "not assigned all devices yet; wait until"),
    ({"status": "initializing", "group_list": []}, "not assigned all devices yet"),
    ({"status": "failed"}, 'status is "failed"; expected "completed"'),
    ({}, "status is null"),
    ([1, 2], "holds a list; expected an object"),
    ("", ":1: is no JSON"),
    ('{"status":\n "completed"\n,}', ":3: is no JSON"),
    ("[" * 100000, "cannot be read as JSON"),
    ('{"status": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    (version_1_0(), "lists no device"),
    (version_1_0(("a", [])), "lists no device"),
    (version_1_0(("a", [device(0, rank=0)]), version="3.0"), 'is of version "3.0"; the forms read are version "1.0"'),
    (version_1_0(("a", [device(0, rank=0)]), version=[1]), "is of version [1]; the forms read are"),
    (version_1_0(("a", [device(0, rank=0)]), version="2.0"), "no such key; expected rank_list to be a list"),
    (version_1_0(("a", [device(0, rank=0)]), server_count="2"), "server_count says 2, but 1 server"),
    (version_1_0(("a", [device(0, rank=0)]), server_list={}), "got {}; expected server_list to be a list"),
    (version_1_0(("a", [device(0)])), r"server_list[0].device[0]: rank_id is missing"),
    (version_1_0(("a", [{"rank_id": "0"}])), r"server_list[0].device[0]: device_id is missing"),
    (version_1_0(("", [device(0, rank=0)])), 'server_id is ""'),
    (version_1_0(("a", [device("x", ip="10.0.0.1", rank=0)])), 'device_id is "x"; expected a number'),
    (version_1_0(("a", [device(0, ip="xx.xx.xx.xx", rank=0)])), "device_ip is 'xx.xx.xx.xx'"),
    (version_1_0(("a", [device(0, rank=0), device(1, rank=0)])), "rank_id 0 stands twice, expected once"),
    (version_1_0(("a", [device(0, rank=0), device(1, rank=2)])),
     "rank_ids are 0, 2; expected each of 0 to 1 once"),
    (version_1_0(("a", [device(0, rank=0)]), ("a", [device(1, rank=1)])), "server_id a stands twice"),
    (version_1_0(("a", [device(0, rank=0), device(0, ip="10.0.0.9", rank=1)])), "device 0 of server a stands twice"),
    (version_1_0(("a", [device(0, rank=0)]), ("b", [device(0, rank=1)])), "device_ip 10.0.0.0 stands twice"),
    (groups(("p-0", "a", [device(0)]), ("p-0", "b", [device(1)])), "pod_names end in 0, 0"),
    (groups(("p-0", "a", [device(0)]), ("p-" + "0" * 5000, "b", [device(1)])), "pod_names end in 0, 0"),
    (groups(("p-0", "a", [device(0)]), ("q", "b", [device(1)])), 'pod_name "q" ends in no number'),
    (groups(("p-0", "a", [device(0)]), ("p-1", "a", [device(1)])), "server_id a stands twice"),
    ({"status": "completed", "group_list": [{"device_count": "8", "instance_list": []}]},
     "device_count says 8, but 0 device(s)"),
    ({"status": "completed", "group_list": [{"instance_list": 3}]}, "got 3; expected instance_list to be a list"),
    ({"status": "completed", "group_list": "no"}, 'got "no"; expected group_list'),
])
def test_a_table_that_cannot_be_used_says_what_is_wrong(table_file, content, message):
    path = table_file(content)
    with pytest.raises(RankTableError, match=re.escape(message)) as caught:
        read_rank_table(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_a_folder_and_bytes_that_are_no_text_are_errors(tmp_path):
    (tmp_path / "noise.json").write_bytes(bytes(range(256)))
    for path, message in ((tmp_path / "none.json", "no such file"), (tmp_path, "cannot be read"),
                          (tmp_path / "noise.json", "cannot be read")):
        with pytest.raises(RankTableError, match=message):
            read_rank_table(path)


def test_a_damaged_table_raises_no_other_error(monkeypatch):
    nonsense = [None, 7, -1, 1.5, True, "", "x", [], {}, [None], [{}], [[1]], {"a": 1}]
    draw = random.Random(0)
    for _ in range(2000):
        content = draw.choice([version_1_0(("a", [device(0, rank=0), device(1, rank=1)])), super_pods(),
                               groups(("p-0", "a", [device(0)]), ("p-1", "b", [device(1)])), lab((0, "a"), (1, "a")),
                               ranks((0, "a", "10.0.0.1"), (1, "a", "10.0.0.2"))])
        holder = content
        while True:  # walk down to a random place and put nonsense there, or take it away
            key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if isinstance(holder[key], (dict, list)) and holder[key] and draw.random() < 0.7:
                holder = holder[key]
                continue
            if draw.random() < 0.2:
                del holder[key]
            else:
                holder[key] = draw.choice(nonsense)
            break
        monkeypatch.setattr("glm3kit.setup.rank_table._load", lambda path, content=content: content)
        with contextlib.suppress(RankTableError):
            read_rank_table("damaged.json")


def test_fewer_devices_than_asked_for_gives_both_numbers():
    with pytest.raises(RankTableError, match=r"lists 4 device\(s\), but 8 are asked for"):
        local_rank_table(4).first(8)


def test_the_first_ranks_are_taken_in_rank_order_across_servers(table_file):
    table = read_rank_table(table_file(version_1_0(("a", [device(0, rank=2), device(1, rank=1)]),
                                                   ("b", [device(2, rank=0), device(3, rank=3)]))))
    assert [d.device_id for d in table.devices] == ["2", "1", "0", "3"]
    first = table.first(2)
    assert {server.server_id: [d.device_id for d in server.devices] for server in first.servers} == {
        "a": ["1"], "b": ["2"]}
    assert [server.server_id for server in table.first(1).servers] == ["b"]


def test_the_environment_is_asked_before_the_known_files(tmp_path):
    config = tmp_path / "user/config"
    config.mkdir(parents=True)
    own = tmp_path / "own.json"
    assert find_rank_table({}, root=tmp_path) is None
    (config / "nbstart_hccl.json").touch()
    assert find_rank_table({}, root=tmp_path) == config / "nbstart_hccl.json"
    (config / "jobstart_hccl.json").touch()
    assert find_rank_table({}, root=tmp_path) == config / "jobstart_hccl.json"
    own.touch()
    assert find_rank_table({"RANK_TABLE_FILE": str(own)}, root=tmp_path) == own
    assert find_rank_table({"RANK_TABLE_FILE": str(config)}, root="/nowhere") == config / "jobstart_hccl.json"


def test_an_environment_that_leads_nowhere_is_an_error(tmp_path):
    with pytest.raises(RankTableError, match="a folder without jobstart_hccl.json"):
        find_rank_table({"RANK_TABLE_FILE": str(tmp_path)})
    with pytest.raises(RankTableError, match="no such file or folder"):
        find_rank_table({"RANK_TABLE_FILE": str(tmp_path / "none")})


def test_cards_are_counted_by_their_device_files(tmp_path):
    (tmp_path / "dev").mkdir()
    for name in ("davinci10", "davinci2", "davinci_manager", "davinci"):
        (tmp_path / "dev" / name).touch()
    assert ascend_cards(tmp_path) == [2, 10]


def test_a_local_table_is_a_valid_version_1_0(tmp_path):
    table = local_rank_table(2)
    table.save(tmp_path / "table.json")
    assert read_rank_table(tmp_path / "table.json") == table
    assert table.to_dict() == {
        "status": "completed", "version": "1.0", "server_count": "1",
        "server_list": [{"server_id": "127.0.0.1", "device": [
            {"device_id": "0", "device_ip": "127.0.0.1", "rank_id": "0"},
            {"device_id": "1", "device_ip": "127.0.0.2", "rank_id": "1"}]}]}
    with pytest.raises(RankTableError, match="0 devices"):
        local_rank_table(0)


def one_server(name, ips):
    return version_1_0((name, [device(n, ip, rank=n) for n, ip in enumerate(ips)]))


def test_merged_ranks_follow_the_order_of_the_arguments(table_file):
    a = read_rank_table(table_file(one_server("10.0.0.1", [f"192.1.0.{n}" for n in range(8)]), "a.json"))
    b = read_rank_table(table_file(one_server("10.0.0.2", [f"192.2.0.{n}" for n in range(8)]), "b.json"))
    merged = merge_rank_tables([b, a])
    assert [d.rank_id for d in merged.devices] == [str(n) for n in range(16)]
    assert [server.server_id for server in merged.servers] == ["10.0.0.2", "10.0.0.1"]
    assert [d.device_ip for d in merged.devices][8] == "192.1.0.0"
    assert merged.to_dict()["server_count"] == "2"
    assert a.devices[0].rank_id == "0", "the argument stays as it was"


def test_merging_a_server_or_an_address_twice_is_refused_and_names_both_files(table_file):
    a = read_rank_table(table_file(one_server("10.0.0.1", ["192.1.0.1"]), "a.json"))
    same_server = read_rank_table(table_file(one_server("10.0.0.1", ["192.1.0.2"]), "b.json"))
    same_address = read_rank_table(table_file(one_server("10.0.0.2", ["192.1.0.1"]), "c.json"))
    with pytest.raises(RankTableError, match=r"b.json\): server_id 10.0.0.1 is also in .*a.json"):
        merge_rank_tables([a, same_server])
    with pytest.raises(RankTableError, match=r"c.json\): device_ip 192.1.0.1 is also in .*a.json"):
        merge_rank_tables([a, same_address])
    with pytest.raises(RankTableError, match="no rank table"):
        merge_rank_tables([])
