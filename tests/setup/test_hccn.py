"""Rank tables made on a bare machine: ranges of devices, addresses by hccn_tool or hccn.conf, the seed's file name."""

import re

import pytest

from glm3kit.errors import RankTableError
from glm3kit.setup.hccn import device_addresses, make_rank_table, parse_devices, table_name
from glm3kit.setup.rank_table import merge_rank_tables

TOOL = """#!/bin/sh
[ "$1 $3 $4" = "-i -ip -g" ] || exit 2
[ "$2" -lt 8 ] || { echo "device $2 does not exist" >&2; exit 1; }
echo "ipaddr:192.168.1$2.3"
echo "netmask:255.255.255.0"
"""
CONF = "".join(f"address_{n}=10.1.{n}.6\nnetmask_{n}=255.255.255.0\n" for n in range(8))


@pytest.fixture
def machine(tmp_path):
    """A machine's root folder: with hccn_tool where the driver puts it, or with hccn.conf."""
    def build(tool=None, conf=None):
        if tool:
            (tmp_path / "usr/local/Ascend/driver/tools").mkdir(parents=True)
            path = tmp_path / "usr/local/Ascend/driver/tools/hccn_tool"
            path.write_text(tool)
            path.chmod(0o755)
        if conf is not None:
            (tmp_path / "etc").mkdir()
            (tmp_path / "etc/hccn.conf").write_text(conf)
        return {"environ": {"PATH": "/bin:/usr/bin"}, "root": tmp_path}
    return build


def test_a_range_is_half_open():
    assert parse_devices("[0,8)") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert parse_devices(" [ 4 , 6 ) ") == [4, 5]


@pytest.mark.parametrize("text, message", [
    ("[0,8]", "write '[0,8)' for the devices 0 to 7, or '[0,9)' for 0 to 8"),
    ("[3,3)", "holds no device"), ("[5,2)", "holds no device"), ("8", "expected a half-open range such as '[0,8)'"),
    ("[0,8", "expected a half-open"), ("(0,8)", "expected a half-open"), ("[-1,8)", "expected a half-open"), ("", "''"),
])
def test_another_range_is_refused_with_what_to_write(text, message):
    with pytest.raises(RankTableError, match=re.escape(message)):
        parse_devices(text)


def test_the_tool_is_asked_before_the_file(machine):
    assert device_addresses([0, 5], **machine(TOOL, CONF)) == {0: "192.168.10.3", 5: "192.168.15.3"}


def test_the_file_answers_where_the_tool_is_missing_or_refused(machine):
    assert device_addresses([7], **machine("#!/bin/sh\nexit 1\n", CONF)) == {7: "10.1.7.6"}


def test_without_either_everything_tried_is_named(machine):
    with pytest.raises(RankTableError, match="(?s)hccn_tool: not found on PATH or in .*hccn.conf: No such file"):
        device_addresses([0], **machine())


def test_a_device_without_an_address_is_named(machine):
    place = machine(conf=CONF + "address_8=\n")
    with pytest.raises(RankTableError, match=r"no address for device\(s\) 8, 9; it has address_0=10.1.0.6"):
        device_addresses(range(6, 10), **place)


def test_the_table_of_a_machine_has_the_form_and_the_name_that_hccl_tools_gives(machine, shared):
    import json

    addresses = ["10.3", "11.6", "12.13", "13.16", "10.18", "11.23", "12.27", "13.30"]
    conf = "".join(f"address_{n}=192.168.{end}\n" for n, end in enumerate(addresses))
    table = make_rank_table(parse_devices("[0,8)"), "127.0.1.1", **machine(conf=conf))
    [path] = (shared / "data/rank_tables").glob("03_*.json")
    assert table.to_dict() == json.loads(path.read_text()), "this file was made by hccl_tools.py"
    assert table_name(table) == "hccl_8p_01234567_127.0.1.1.json"


def test_machines_that_took_the_address_of_their_name_are_not_merged(machine):
    place = machine(conf=CONF)
    tables = [make_rank_table([0, 1], "127.0.1.1", **place), make_rank_table([2, 3], "127.0.1.1", **place)]
    with pytest.raises(RankTableError, match="server_id 127.0.1.1 is also in .*regenerate with --server-ip"):
        merge_rank_tables(tables)


def test_a_server_ip_that_is_none_is_refused(machine):
    with pytest.raises(RankTableError, match="--server-ip xx.xx.xx.xx: is no address"):
        make_rank_table([0], "xx.xx.xx.xx", **machine(conf=CONF))
