"""The command line as a whole: help, version, exit statuses, messages."""

import re
import subprocess
import sys

import pytest
from support import ROOT

from glm3kit import __version__
from glm3kit.__main__ import SUBJECTS
from glm3kit.cli.arguments import find_verb

VERBS = [verb.name for verbs in SUBJECTS.values() for verb in verbs]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_that_its_own_parser_accepts(verb, capsys, status_of):
    assert status_of(*verb.split(), "--help") == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    example = re.search(r"example: glm3kit (.*)", text)[1].split()
    found, rest = find_verb(example, SUBJECTS)
    assert found.name == verb
    assert found.parse(rest)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["rank-table", "--help"]])
def test_a_bare_call_prints_every_verb_with_what_it_does_under_its_subject(arguments, capsys, status_of):
    assert status_of(*arguments) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^([a-z ]+):$", printed, re.MULTILINE) == list(SUBJECTS)
    assert re.findall(r"^  (\S+(?: \S+)?) {2,}\S", printed, re.MULTILINE) == VERBS
    assert "\n  launch             train with one process a device; wait for the end unless detached\n" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_the_version_is_that_of_the_package(capsys, status_of):
    assert status_of("--version") == 0
    assert capsys.readouterr().out == f"glm3kit {__version__}\n"


@pytest.mark.parametrize("arguments, status, said", [
    (["--version"], 0, f"glm3kit {__version__}"),
    (["status", "no/such/job"], 1, "no/such/job"),
    (["fly"], 2, "'fly' is no verb"),
])
def test_the_module_ends_with_the_exit_status_of_the_command(arguments, status, said):
    done = subprocess.run([sys.executable, "-m", "glm3kit", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize("call", [
    "fly", "--fly", "convert only-one", "rank-table", "rank-table --json", "launch run.yaml --fly",
    "launch run.yaml --resume --overwrite", "plot x y=1", "plot x -o loss.txt", "predict run.yaml",
    "check run.yaml --json --fly", "merge a b --max-shard-size 2apples"])
def test_a_wrong_call_exits_with_2_and_shows_the_usage(call, capsys, status_of):
    assert status_of(*call.split()) == 2
    assert "usage: glm3kit" in capsys.readouterr().err


def test_a_faulty_configuration_exits_with_2_and_lists_every_fault(tmp_path, capsys, status_of):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  batch_sise: 4\n  epochs: many\n", encoding="utf-8")
    assert status_of("data", str(path)) == 2
    message = capsys.readouterr().err
    assert f"{path}:2: train.batch_sise" in message
    assert f"{path}:3: train.epochs" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("call", ["rank-table show none.json", "convert none x.ckpt", "status none",
                                  "plot none -o x.png", "merge none x"])
def test_a_failed_run_exits_with_1_and_one_message_that_names_the_file(call, capsys, tmp_path, monkeypatch, status_of):
    monkeypatch.chdir(tmp_path)
    assert status_of(*call.split()) == 1
    message = capsys.readouterr().err
    assert "none" in message
    assert "Traceback" not in message


def test_an_interrupted_verb_exits_with_1(monkeypatch, capsys, status_of):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("glm3kit.cli.setup.check_rank_table", interrupt)
    assert status_of("rank-table", "check", "x.json") == 1
    assert capsys.readouterr().err == "interrupted\n"
