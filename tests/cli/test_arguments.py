"""How calls are read: which verb is meant, overrides before and after options, sizes and pictures."""

import pytest
from support import TINY

from glm3kit.__main__ import SUBJECTS
from glm3kit.cli.arguments import find_verb


def parsed(*words):
    verb, rest = find_verb(words, SUBJECTS)
    return verb.parse(rest)


@pytest.mark.parametrize("call, meant", [
    ("lanch configs/tiny.yaml", "'lanch' is no verb; did you mean 'launch'?"),
    ("evalute x.yaml", "did you mean 'evaluate'?"),
    ("rank-table shwo x.json", "'rank-table shwo' is no verb; did you mean 'rank-table show'?"),
    ("data tool-alpca a.json b.jsonl", "tool-alpca no file; did you mean 'data tool-alpaca'?"),
    ("rank-table", "a word is missing after rank-table: show, check, wait, make, merge"),
    ("xyzzy", "'xyzzy' is no verb\n"),
])
def test_a_misspelt_verb_is_answered_with_the_one_that_was_meant(call, meant, capsys, status_of):
    assert status_of(*call.split()) == 2
    assert meant in capsys.readouterr().err


def test_a_configuration_named_like_a_second_word_is_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tool-alpca").touch()
    assert parsed("data", "tool-alpca").config == "tool-alpca"
    assert parsed("data", "run.yaml", "--skip-bad").config == "run.yaml"


def test_overrides_stand_before_and_after_options():
    args = parsed("launch", "run.yaml", "a=1", "--detach", "b=2", "--port", "8765", "c=-3")
    assert (args.config, args.overrides, args.detach, args.port) == ("run.yaml", ["a=1", "b=2", "c=-3"], True, 8765)
    assert parsed("launch", "--detach", "run.yaml").overrides == []


def test_a_faulty_override_exits_with_2_wherever_it_stands(capsys, status_of):
    for words in (("--detach", "train.epochs=0"), ("train.epochs=0", "--detach")):
        assert status_of("launch", str(TINY), *words) == 2
        assert "override 'train.epochs=0': train.epochs" in capsys.readouterr().err


def test_sizes_are_read_in_bytes():
    assert parsed("convert", "a", "b", "--max-shard-size", "2GB").max_shard_size == 2 * 10**9
