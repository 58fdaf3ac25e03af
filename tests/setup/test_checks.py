"""The checks: every finding on machines that are played by a folder, and one whole run on this one."""

import builtins
import json
import sys

import numpy as np
import pytest

from glm3kit.config.groups import RunConfig
from glm3kit.setup import checks
from glm3kit.setup.checks import Check, Machine, format_checks, run_checks
from glm3kit.setup.rank_table import local_rank_table
from glm3kit.weights.formats.safetensors import write_safetensors
from glm3kit.weights.names import parameter_shapes

SIZES = dict(num_layers=1, padded_vocab_size=32, hidden_size=8, ffn_hidden_size=8, kv_channels=4, num_attention_heads=2,
             multi_query_group_num=2, param_dtype="float32")


def make_config(model=None, parallel=None, **more):
    return RunConfig(model=SIZES | (model or {}), parallel=parallel or {}, **more)


@pytest.fixture
def machine(tmp_path):
    """A machine whose root is a folder: machine(config, cards=8)."""
    def make(config=None, cards=0, **environ):
        (tmp_path / "dev").mkdir(exist_ok=True)
        for card in range(cards):
            (tmp_path / f"dev/davinci{card}").touch()
        return Machine(config, {"PATH": str(tmp_path / "bin")} | environ, tmp_path)
    return make


def test_python_versions_that_mindspore_has_packages_for_are_fine(machine):
    states = {minor: checks.check_python(machine(), (3, minor, 0)).state for minor in (9, 10, 11, 12, 13)}
    assert states == {9: "failed", 10: "ok", 11: "ok", 12: "ok", 13: "failed"}


def test_a_missing_and_a_wrong_package_come_with_the_command_that_installs_them(machine):
    check = checks.check_packages(machine(), ["psutil>=99", "no-such-package", "pyyaml", "other; extra == 'dev'"])
    assert check.state == "failed"
    assert check.finding.startswith("psutil is ") and "no-such-package is missing, expected any" in check.finding
    assert check.next_step == "pip install 'psutil>=99' 'no-such-package'"
    assert checks.check_packages(machine(), ["pyyaml", "psutil>=5"]).state == "ok"


def test_numpy_2_is_a_failure(machine):
    assert checks.check_numpy(machine(), "1.26.4").state == "ok"
    check = checks.check_numpy(machine(), "2.1.0")
    assert check.state == "failed" and "numpy<2" in check.next_step


def test_a_mindspore_that_crashes_hangs_or_raises_is_a_failure(machine):
    crash = checks.check_mindspore(machine(), probe="import os; os.abort()")
    assert (crash.state, "exit code -6" in crash.finding) == ("failed", True)
    hang = checks.check_mindspore(machine(), time_limit_s=0.5, probe="import time; time.sleep(60)")
    assert (hang.state, "did not finish within 0.5 s" in hang.finding) == ("failed", True)
    error = checks.check_mindspore(machine(), probe="raise ImportError('libcann.so')")
    assert "exit code 1: ImportError: libcann.so" in error.finding and error.next_step


def test_mindspore_is_asked_on_the_device_of_the_run(machine):
    probe = "import json, sys; print(json.dumps(['2.9', sys.argv[1]]))"
    cpu = make_config(parallel={"device_target": "CPU"})
    assert "2.9 computes on CPU" in checks.check_mindspore(machine(), probe=probe).finding
    assert "2.9 computes on Ascend" in checks.check_mindspore(machine(cards=1), probe=probe).finding
    assert "2.9 computes on CPU" in checks.check_mindspore(machine(cpu, cards=1), probe=probe).finding


def test_too_few_cards_are_a_failure_with_both_numbers(machine):
    check = checks.check_devices(machine(make_config(parallel={"data_parallel": 8}), cards=4))
    assert check.state == "failed"
    assert "4 Ascend card(s): 0, 1, 2, 3" in check.finding and "asks for 8" in check.finding
    assert checks.check_devices(machine(make_config(parallel={"data_parallel": 4}), cards=4)).state == "ok"


@pytest.mark.parametrize("script, told", [
    (None, "npu-smi is not on PATH"),
    ("#!/bin/sh\nexit 0\n", "npu-smi sees them"),
    ("#!/bin/sh\nexit 7\n", "npu-smi ended with 7: in a container it needs root"),
    ("no program", "npu-smi cannot be run"),
])
def test_cards_are_fine_even_where_npu_smi_cannot_be_asked(machine, tmp_path, script, told):
    if script:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/npu-smi").write_text(script)
        (tmp_path / "bin/npu-smi").chmod(0o755)
    check = checks.check_devices(machine(cards=2))
    assert check.state == "ok" and told in check.finding


def test_a_run_for_ascend_without_cards_is_a_failure(machine):
    check = checks.check_devices(machine(make_config(parallel={"device_target": "Ascend"})))
    assert check.state == "failed" and "no Ascend card" in check.finding


def test_weights_that_cannot_fit_the_memory_are_a_warning(machine, tmp_path):
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("12000000000\n")  # a container of 12 GB; the weights of 6B take 12.49 GB
    check = checks.check_devices(machine(RunConfig()))
    assert check.state == "warning"
    assert "12.0 GB of memory; the weights alone take 12.5 GB" in check.finding
    assert checks.check_devices(machine(make_config())).state == "ok"
    (folder / "memory.max").write_text("max\n")
    assert checks.check_devices(machine()).state == "ok"


def test_a_rank_table_is_found_counted_and_compared(machine, tmp_path):
    assert checks.check_rank_table(machine()).state == "skipped"
    (tmp_path / "user/config").mkdir(parents=True)
    local_rank_table(4).save(tmp_path / "user/config/jobstart_hccl.json")
    check = checks.check_rank_table(machine(make_config(parallel={"data_parallel": 4})))
    assert check.state == "ok" and "jobstart_hccl.json: 4 device(s) on 1 server(s)" in check.finding
    cpu = make_config(parallel={"data_parallel": 8, "device_target": "CPU"})
    assert checks.check_rank_table(machine(cpu)).state == "skipped"


@pytest.mark.parametrize("content, finding, next_step", [
    ('{"status": "initializing"}', "initializing",
     'wait until status is "completed" (`glm3kit rank-table wait`), then try again'),
    ("no json", "is no JSON", "correct that line or make the table again"),
    (json.dumps(local_rank_table(1).to_dict()), "lists 1 device(s), but 2 are asked for", "ask for fewer"),
])
def test_a_rank_table_that_cannot_be_used_is_a_failure_with_its_next_step(tmp_path, monkeypatch, content, finding,
                                                                          next_step):
    (tmp_path / "hccl.json").write_text(content)
    monkeypatch.setattr(checks, "CHECKS", {"rank table": checks.check_rank_table})
    [check] = run_checks(make_config(parallel={"data_parallel": 2}), {"RANK_TABLE_FILE": str(tmp_path / "hccl.json")},
                         tmp_path)
    assert check.state == "failed" and finding in check.finding and check.next_step.startswith(next_step)


def test_the_disk_is_measured_where_the_output_will_be(machine, tmp_path):
    check = checks.check_disk(machine(make_config(output_dir=str(tmp_path / "not/there/yet"))))
    assert check.state == "ok" and f"free for {tmp_path}/not/there/yet" in check.finding
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").touch()
    check = checks.check_disk(machine(make_config(output_dir=str(tmp_path / "file/output"))))
    assert check.state == "failed" and "no folder that can be written" in check.finding


def test_a_disk_too_small_for_the_checkpoints_is_a_warning(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100e9}))
    check = checks.check_disk(machine(RunConfig(output_dir=str(tmp_path))))
    # 6.2436 billion parameters: twice (2 + 12) bytes each for checkpoints, 2 bytes for the merged weights
    assert check.state == "warning" and "about 187.3 GB" in check.finding


def test_the_tokenizer_must_be_there_and_fit_the_vocabulary(machine, shared):
    path = str(shared / "data/tokenizer/tokenizer.model")
    assert checks.check_tokenizer(machine(make_config())).state == "failed"
    small = checks.check_tokenizer(machine(make_config({"tokenizer_path": path})))
    assert small.state == "failed" and "64,798 ids, but model.padded_vocab_size is 32" in small.finding
    published = make_config({"tokenizer_path": path, "padded_vocab_size": 65024})
    assert checks.check_tokenizer(machine(published)).state == "ok"


def test_a_missing_tokenizer_file_is_told_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", {"tokenizer": checks.check_tokenizer})
    [check] = run_checks(make_config({"tokenizer_path": str(tmp_path / "none.model")}))
    assert check.state == "failed" and "there is no tokenizer file" in check.finding and "download" in check.next_step


def test_data_files_must_hold_rows(machine, tmp_path, monkeypatch):
    rows = tmp_path / "rows.json"
    rows.write_text('{"content": "类型#裙", "summary": "好看的裙子"}\n', encoding="utf-8")
    (tmp_path / "empty.json").touch()
    good = machine(make_config(data={"train_path": str(rows)}))
    assert checks.check_data(good, "train_path").state == "ok"
    assert checks.check_data(good, "eval_path").state == "skipped"
    paths = [str(rows), str(tmp_path / "empty.json")]
    empty = checks.check_data(machine(make_config(data={"train_path": paths})), "train_path")
    assert empty.state == "failed" and "empty.json: holds no row" in empty.finding
    rows.write_text("no json\n")
    monkeypatch.setattr(checks, "CHECKS", {"data.train_path": checks.CHECKS["data.train_path"]})
    [check] = run_checks(good.config)
    assert check.state == "failed" and "rows.json:1: not JSON" in check.finding


def test_weights_are_compared_with_the_configuration(machine, tmp_path):
    path = tmp_path / "w.safetensors"
    config = make_config({"checkpoint_name_or_path": str(path)})
    assert checks.check_weights(machine(make_config())).state == "skipped"
    missing = checks.check_weights(machine(config))
    assert missing.state == "warning" and "glm3kit convert SRC" in missing.next_step
    tensors = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(config.model).items()}
    write_safetensors(path, tensors)
    assert checks.check_weights(machine(config)).state == "ok"
    wider = make_config({"checkpoint_name_or_path": str(path), "ffn_hidden_size": 16})
    check = checks.check_weights(machine(wider))
    assert check.state == "failed" and "2 do not fit the configuration, such as" in check.finding
    assert check.finding.endswith("layers.0.mlp.dense_h_to_4h.weight")


def test_nothing_is_raised_where_packages_are_missing(tmp_path, monkeypatch):
    def no_package(name, *args, **kwargs):
        packages = ("packaging", "psutil", "numpy", "sentencepiece")
        if name.partition(".")[0] in packages or name == "glm3kit.setup.memory":
            raise ModuleNotFoundError(f"No module named '{name}'")
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(checks, "CHECKS", {n: c for n, c in checks.CHECKS.items() if n != "MindSpore"})
    monkeypatch.setattr(builtins, "__import__", no_package)
    found = run_checks(make_config(), {}, tmp_path)
    monkeypatch.undo()
    assert [check.name for check in found if check.state == "failed"] == ["packages", "devices", "disk", "tokenizer"]
    assert "No module named 'packaging" in found[1].finding


def test_the_text_shows_state_finding_and_next_step():
    text = format_checks([Check("disk", "ok", "77 GB free"), Check("NumPy", "failed", "2.1.0", "install 1.26")])
    assert text.splitlines() == ["ok       disk             77 GB free", "failed   NumPy            2.1.0",
                                 "                          -> install 1.26"]


def test_this_machine_passes_its_own_checks():
    found = {check.name: check for check in run_checks()}
    assert list(found) == list(checks.CHECKS)
    assert {found[name].state for name in ("Python", "packages", "NumPy", "MindSpore", "devices")} == {"ok"}
    assert {found[name].state for name in checks.NEED_CONFIG} == {"skipped"}
    assert sys.executable in found["Python"].finding
