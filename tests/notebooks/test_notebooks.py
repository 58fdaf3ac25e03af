"""The notebooks as they are committed: complete, executed in order, in two languages, with outputs fit to commit.

That they run, and give these outputs, is nbval's part: see `make test`.
"""

import json
import re

import nbformat
import pytest
from support import ROOT

from glm3kit.notebook.html import NOTEBOOKS

FOLDER = ROOT / "notebooks"
PATHS = [FOLDER / f"{name}.ipynb" for name, _, _ in NOTEBOOKS]
CHINESE = re.compile(r"[\u4e00-\u9fff]")
LATIN = re.compile(r"[A-Za-z]{2}")
FENCED = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
LINK = re.compile(r'\]\(([^)#]+)\)|href="([^"#]+)"')
# Folders of this and other machines, a kernel's temporary files, durations; not the address of ModelArts' rank table.
ABSOLUTE = re.compile(r"(?<![\w.])/(home|root|work|tmp|usr|opt|mnt|Users)/|[A-Z]:\\\\")
DURATION = re.compile(r"\d(\.\d+)? ?(ms|s|it/s|tokens/s)\b|\d+:\d\d[:<]")

every_notebook = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def outputs_as_text(path):
    """All outputs but pictures, as JSON text."""
    texts = []
    for cell in cells(path, "code"):
        for output in cell.outputs:
            data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
            texts.append(json.dumps({**output, "data": data}, ensure_ascii=False))
    return "\n".join(texts)


def test_the_folder_holds_the_seven_notebooks_of_the_strip():
    assert sorted(FOLDER.glob("*.ipynb")) == PATHS


@every_notebook
def test_every_code_cell_was_executed_in_order_from_a_fresh_kernel(path):
    counts = [cell.execution_count for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_no_cell_ended_in_an_error(path):
    failed = [cell.source for cell in cells(path, "code")
              if any(output.output_type == "error" for output in cell.outputs)
              and "raises-exception" not in cell.metadata.get("tags", [])]
    assert failed == []


@every_notebook
def test_the_first_cells_are_imports_with_versions_and_the_common_parameters(path):
    first, second = cells(path, "code")[:2]
    assert first.source.startswith("import ") and "version(name)" in first.source
    assert f"workflow_strip({int(path.stem[:2])})" in first.source
    assert second.source == cells(PATHS[0], "code")[1].source
    assert "GLM3KIT_CONFIG" in second.source and "GLM3KIT_OUTPUT" in second.source


@every_notebook
def test_a_cell_does_one_thing_in_at_most_eight_lines(path):
    for cell in cells(path, "code")[1:]:
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
        assert len(lines) <= 8, cell.source


@every_notebook
def test_headings_and_paragraphs_are_in_both_languages(path):
    for cell in cells(path, "markdown"):
        text = FENCED.sub("", cell.source)
        assert CHINESE.search(text) and LATIN.search(text), cell.source
        for heading in re.findall(r"^#+ .*$", cell.source, re.MULTILINE):
            assert CHINESE.search(heading) and LATIN.search(heading), heading


@every_notebook
def test_links_lead_to_files_of_the_repository(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    links = [first or second for first, second in LINK.findall(text)]
    assert links and all((FOLDER / link).is_file() for link in links)
    number = NOTEBOOKS.index(next(entry for entry in NOTEBOOKS if entry[0] == path.stem))
    assert f"{NOTEBOOKS[(number + 1) % len(NOTEBOOKS)][0]}.ipynb" in links  # the next one; the last leads to the first


@every_notebook
def test_a_notebook_shows_a_mistake_and_checks_itself(path):
    sources = [cell.source for cell in cells(path, "code")]
    assert any("except " in source and "print(err)" in source for source in sources)
    assert any("assert " in source for source in sources)
    assert "self-check passed" in outputs_as_text(path)


@every_notebook
def test_outputs_hold_no_path_of_a_machine_no_duration_and_no_widget(path):
    text = outputs_as_text(path)
    text = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    assert [match[0] for match in ABSOLUTE.finditer(text)] == []
    assert [text[max(match.start() - 30, 0):match.end()] for match in DURATION.finditer(text)] == []
    assert "jupyter.widget" not in text
    assert "widgets" not in nbformat.read(path, as_version=4).metadata


@every_notebook
def test_a_notebook_is_small(path):
    assert path.stat().st_size < 200_000
