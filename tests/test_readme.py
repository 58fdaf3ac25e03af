"""The two READMEs: the same code in both, calls that parse, links that lead somewhere, Python that runs."""

import re
import runpy
import shlex
from math import prod

import pytest
from support import ROOT, SMALL, TINY
from test_house import ROOMS

from glm3kit.__main__ import SUBJECTS
from glm3kit.cli.arguments import find_verb
from glm3kit.config.load import load_config
from glm3kit.weights.names import parameter_shapes

READMES = ("README.md", "README.zh-CN.md")
PAGES = (*READMES, "CONTRIBUTING.md")  # the links of the notebooks: tests/notebooks


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a language, without the indentation that a list gives them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text_of(name), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def test_both_languages_have_the_same_code_and_as_many_sections():
    english, chinese = READMES
    for language in ("bash", "python"):
        assert blocks(english, language) == blocks(chinese, language) != []
    assert text_of(english).count("\n## ") == text_of(chinese).count("\n## ")


def test_every_call_in_a_code_block_is_a_call():
    calls = [shlex.split(line) for block in blocks("README.md", "bash") for line in block.splitlines()]
    for call in (call for call in calls if call[0] == "glm3kit"):
        verb, rest = find_verb(call[1:], SUBJECTS)
        assert verb.parse(rest)
    targets = re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE)
    assert {call[1] for call in calls if call[0] == "make"} <= set(targets)


@pytest.mark.parametrize("name", READMES)
def test_every_verb_is_named(name):
    verbs = {verb.name.partition(" ")[0] for verbs in SUBJECTS.values() for verb in verbs}
    assert [verb for verb in verbs if f"`{verb}" not in text_of(name) and f"`glm3kit {verb}" not in text_of(name)] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_link_and_configuration_leads_somewhere(name):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text_of(name)) if "://" not in link]
    named = re.findall(r"configs/\w+\.yaml", text_of(name))
    assert links and [path for path in [*links, *named] if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", READMES)
def test_every_file_that_is_named_after_its_room_is_there(name):
    named = re.findall(r"\[`(\w+)`\]\(glm3kit/\1\)[:：] ?(`\w+`(?:(?:, |、)`\w+`)*)", text_of(name))
    paths = [f"glm3kit/{room}/{file}.py" for room, files in named for file in re.findall(r"\w+", files)]
    assert len(paths) > 15 and [path for path in paths if not (ROOT / path).exists()] == []


def test_the_rooms_stand_in_their_order():
    table = text_of("CONTRIBUTING.md").partition("| room |")[2].partition("\n\n")[0]
    rooms = re.findall(r"`(\w+)(?:/|\.py)`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert [room for room in rooms if room != "__init__"] == list(ROOMS)


def test_the_size_of_the_tiny_model_is_the_one_named():
    count = sum(map(prod, parameter_shapes(load_config(TINY).model).values()))
    english = re.search(r"([\d.]+) million parameters", text_of("README.md"))[1]
    chinese = re.search(r"(\d+) 万参数", text_of("README.zh-CN.md"))[1]
    assert float(english) * 1e6 == pytest.approx(count, rel=0.05)
    assert int(chinese) * 1e4 == pytest.approx(count, rel=0.05)


def test_the_ten_lines_of_python_train_and_answer(tmp_path, monkeypatch, capsys):
    (code,) = blocks("README.md", "python")
    overrides = '["train.total_steps=50"]'
    assert code.count(overrides) == 1
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "ten_lines.py").write_text(
        code.replace(overrides, repr([*SMALL, "train.total_steps=2", f"output_dir={tmp_path}"])), encoding="utf-8")
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(tmp_path / "ten_lines.py"))
    assert float(capsys.readouterr().out.split()[0]) > 0
