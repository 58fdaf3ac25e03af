"""Verbs about the machine: checks, and rank tables that are shown, checked, waited for, made and merged."""

import json
import re
from pathlib import Path

import pytest
from support import TINY

from glm3kit.setup.checks import CHECKS
from glm3kit.setup.rank_table import Device, RankTable, Server


@pytest.fixture
def without_mindspore(monkeypatch):
    """Checks without the one that starts MindSpore in a process of its own; tests/setup runs it."""
    monkeypatch.delitem(CHECKS, "MindSpore")


def test_check_prints_json_and_exits_by_what_failed(capsys, without_mindspore, status_of):
    status = status_of("check", str(TINY), "--json")
    checks = json.loads(capsys.readouterr().out)
    assert {"name", "state", "finding", "next_step"} <= set(checks[0])
    assert status == int(any(check["state"] == "failed" for check in checks))


def test_check_names_the_failed_file_and_exits_with_1(capsys, without_mindspore, status_of):
    assert status_of("check", str(TINY), "model.tokenizer_path=none/tokenizer.model") == 1
    assert "none/tokenizer.model" in capsys.readouterr().out


def test_rank_tables_are_merged_in_the_order_given_and_shown(tmp_path, capsys, status_of):
    for name, server in (("a", "10.0.0.1"), ("b", "10.0.0.2")):
        devices = tuple(Device(str(n), f"192.168.{n}.{server[-1]}", str(n)) for n in range(2))
        RankTable((Server(server, devices),)).save(tmp_path / f"{name}.json")
    paths = [str(tmp_path / name) for name in ("b.json", "a.json")]
    assert status_of("rank-table", "merge", *paths, "-o", str(tmp_path / "both.json")) == 0
    capsys.readouterr()
    assert status_of("rank-table", "show", "--json", str(tmp_path / "both.json")) == 0
    servers = json.loads(capsys.readouterr().out)["server_list"]
    assert [server["server_id"] for server in servers] == ["10.0.0.2", "10.0.0.1"]
    assert [device["rank_id"] for server in servers for device in server["device"]] == ["0", "1", "2", "3"]
    assert status_of("rank-table", "show", str(tmp_path / "both.json")) == 0
    printed = capsys.readouterr().out
    assert "4 device(s) on 2 server(s)" in printed
    assert re.search(r"server 10.0.0.1.*: 2 device\(s\)\n  rank  device  address\n +2 +0  192.168.0.1\n", printed)


def test_a_rank_table_is_made_named_checked_and_waited_for(tmp_path, capsys, monkeypatch, status_of):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("glm3kit.setup.hccn.device_addresses", lambda devices, *_: {n: f"10.1.0.{n}" for n in devices})
    assert status_of("rank-table", "make", "--devices", "[0,2)", "--server-ip", "127.0.1.1") == 0
    assert "loopback" in capsys.readouterr().err
    made = "hccl_2p_01_127.0.1.1.json"
    assert status_of("rank-table", "check", made) == 0
    assert status_of("rank-table", "wait", made) == 0
    assert status_of("rank-table", "show", made) == 0
    printed = capsys.readouterr().out
    assert f"{made}: no fault found" in printed and "10.1.0.1" in printed
    Path(made).write_text(Path(made).read_text().replace("10.1.0.0", "x").replace("10.1.0.1", "y"))
    assert status_of("rank-table", "check", made) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert status_of("rank-table", "make", "--devices", "[0,8]") == 1
    assert "half-open" in capsys.readouterr().err
    Path(made).write_text('{"status": "initializing"}')
    assert status_of("rank-table", "wait", made, "--timeout", "0") == 1


def test_without_a_rank_table_show_says_where_it_looked(capsys, monkeypatch, status_of):
    monkeypatch.delenv("RANK_TABLE_FILE", raising=False)
    monkeypatch.setattr("glm3kit.setup.rank_table.find_rank_table", lambda *_: None)
    assert status_of("rank-table", "show") == 1
    assert "RANK_TABLE_FILE" in capsys.readouterr().err
