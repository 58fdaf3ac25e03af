"""The command line: exit statuses, messages, and the whole workflow on a model of a few thousand parameters."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from glm3kit.__main__ import main, parser
from glm3kit.config.load import load_config
from glm3kit.setup.rank_table import Device, RankTable, Server
from glm3kit.weights.random import write_random_hub_weights

TINY = str(ROOT / "configs" / "tiny.yaml")
VERBS = ["check", "rank-table show", "rank-table check", "rank-table wait", "rank-table make",
         "rank-table merge", "convert", "data", "launch", "status", "wait", "stop", "logs", "train",
         "plot", "merge", "evaluate", "predict", "chat", "demo"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "glm3kit", *arguments], cwd=ROOT, capture_output=True, text=True)


def status_of(*arguments: str) -> int:
    """The exit status of a call in this process."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_that_its_own_parser_accepts(verb, capsys):
    assert status_of(*verb.split(), "--help") == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    example = re.search(r"example: glm3kit (.*)", text)[1].split()
    assert " ".join(example).startswith(verb)
    assert callable(parser().parse_args(example).run)


def test_the_module_and_its_exit_status_are_those_of_the_command():
    assert run("--help").returncode == 0
    wrong = run("fly")
    assert wrong.returncode == 2
    assert "invalid choice: 'fly'" in wrong.stderr


@pytest.mark.parametrize("arguments", [[], ["fly"], ["convert", "only-one"], ["rank-table"], ["launch", TINY, "--fly"],
                                       ["plot", "x", "y=1"], ["predict", TINY], ["check", TINY, "--json", "--fly"]])
def test_a_wrong_call_exits_with_2(arguments, capsys):
    assert status_of(*arguments) == 2
    assert "usage: glm3kit" in capsys.readouterr().err


def test_a_faulty_configuration_exits_with_2_and_lists_every_fault(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  batch_sise: 4\n  epochs: many\n", encoding="utf-8")
    assert status_of("data", str(path)) == 2
    message = capsys.readouterr().err
    assert f"{path}:2: train.batch_sise" in message
    assert f"{path}:3: train.epochs" in message
    assert "Traceback" not in message


def test_a_faulty_override_exits_with_2_wherever_it_stands(capsys):
    assert status_of("launch", TINY, "--detach", "train.epochs=0") == 2
    assert "train.epochs" in capsys.readouterr().err
    assert status_of("launch", TINY, "train.epochs=0", "--detach") == 2
    assert "train.epochs" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["rank-table", "show", "none.json"], ["convert", "none", "x.ckpt"],
                                       ["status", "none"], ["plot", "none", "-o", "x.png"], ["merge", "none", "x"]])
def test_a_failed_run_exits_with_1_and_one_message_that_names_the_file(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status_of(*arguments) == 1
    message = capsys.readouterr().err
    assert "none" in message
    assert "Traceback" not in message


def test_check_prints_json_and_exits_by_what_failed(capsys):
    status = status_of("check", TINY, "--json")
    checks = json.loads(capsys.readouterr().out)
    assert {"name", "state", "finding", "next_step"} <= set(checks[0])
    assert status == int(any(check["state"] == "failed" for check in checks))


def test_check_names_the_failed_file_and_exits_with_1(capsys):
    assert status_of("check", TINY, "model.tokenizer_path=none/tokenizer.model") == 1
    assert "none/tokenizer.model" in capsys.readouterr().out


def test_rank_tables_are_merged_in_the_order_given_and_shown(tmp_path, capsys):
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


def test_a_dry_run_prints_what_would_be_started_and_starts_nothing(tmp_path, capsys):
    assert status_of("launch", TINY, f"output_dir={tmp_path}", "--dry-run", "--port", "8765") == 0
    printed = capsys.readouterr().out
    assert "ranks here: 0 on device 0, 1 on device 1" in printed
    assert "--worker_num=2" in printed and "--master_port=8765" in printed and "export GLM3KIT_JOB=" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_rank_table_is_made_named_checked_and_waited_for(tmp_path, capsys, monkeypatch):
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


def test_without_a_rank_table_show_says_where_it_looked(capsys, monkeypatch):
    monkeypatch.delenv("RANK_TABLE_FILE", raising=False)
    monkeypatch.setattr("glm3kit.setup.rank_table.find_rank_table", lambda: None)
    assert status_of("rank-table", "show") == 1
    assert "RANK_TABLE_FILE" in capsys.readouterr().err


@pytest.mark.ranks
def test_the_verbs_run_the_whole_workflow(tmp_path, capfd):
    held_out = Path(load_config(TINY).data.eval_path[0]).read_text(encoding="utf-8").splitlines(keepends=True)
    dev = tmp_path / "dev.json"
    dev.write_text("".join(held_out[:4]), encoding="utf-8")
    small = ["model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.kv_channels=8",
             "train.total_steps=3", "train.batch_size=2", "generate.max_new_tokens=4",
             f"data.eval_path={dev}", f"output_dir={tmp_path}"]
    hub = write_random_hub_weights(load_config(TINY, small).model, tmp_path / "hub")
    start, merged, job = (str(tmp_path / name) for name in ("start.safetensors", "merged.safetensors", "tiny"))
    assert status_of("convert", str(hub), start) == 0
    assert status_of("data", TINY, *small) == 0
    assert status_of("launch", TINY, *small, f"model.checkpoint_name_or_path={start}") == 0
    assert status_of("plot", job, "-o", str(tmp_path / "loss.png")) == 0
    assert status_of("logs", job, "--rank", "1", "--lines", "3") == 0
    assert status_of("wait", job) == status_of("logs", job, "--follow") == 0
    assert status_of("merge", job, merged) == 0
    capfd.readouterr()
    assert status_of("status", job) == 0
    assert json.loads(capfd.readouterr().out)["state"] == "succeeded"
    trained = f"model.checkpoint_name_or_path={merged}"
    assert status_of("evaluate", TINY, *small, trained, "--answers", str(tmp_path / "answers.jsonl")) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 4
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert status_of("predict", TINY, *small, trained, "--prompt", "类型#裙") == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
