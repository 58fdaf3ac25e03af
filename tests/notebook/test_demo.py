"""The demo: notebooks run in order, pages and index are left behind, a failure names notebook and cell."""

import io
import re
from contextlib import redirect_stdout

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from glm3kit.errors import JobError
from glm3kit.notebook.demo import run_demo

WRITE = "import os, pathlib\nout = pathlib.Path(os.environ['GLM3KIT_OUTPUT'])"


def write_notebook(folder, name, *cells, title="A title <b>"):
    folder.mkdir(exist_ok=True)
    notebook = new_notebook(cells=[new_markdown_cell(f"# {title}"), *map(new_code_cell, cells)])
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Two notebooks run where an earlier demo has left a file; what was printed."""
    folder = tmp_path_factory.mktemp("demo")
    notebooks, output = folder / "notebooks", folder / "output" / "demo"
    (folder / "library.py").touch()
    output.mkdir(parents=True)
    (output / "stale.png").touch()
    write_notebook(notebooks, "01_first", WRITE, "(out / 'note.txt').write_text('kept')",
                   title="First <b>, [next](02_second.ipynb), [library](../library.py)")
    write_notebook(notebooks, "02_second", WRITE, "assert 'GLM3KIT_CONFIG' not in os.environ",
                   "(out / 'loss.png').write_bytes(b'x' * len((out / 'note.txt').read_text()))")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as told:
        patch.setenv("GLM3KIT_CONFIG", "run_glm3_6b.yaml")
        index = run_demo(notebooks, output)
    assert index == output / "index.html"
    return output, told.getvalue()


def test_notebooks_run_in_order_and_leave_pages_an_index_and_their_files(demo):
    output, told = demo
    page = (output / "index.html").read_text(encoding="utf-8")
    for name in ("01_first.html", "02_second.html", "note.txt", "loss.png"):
        assert f'href="{name}"' in page
    assert "First &lt;b&gt;" in page
    assert "First <b>" not in page
    executed = nbformat.read(output / "02_second.ipynb", as_version=4)
    assert [cell.execution_count for cell in executed.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert [line.split()[:2] for line in told.splitlines()] == [["1/2", "01_first"], ["2/2", "02_second"]]


def test_what_an_earlier_demo_left_is_gone(demo):
    assert {path.name for path in demo[0].iterdir()} == {
        "01_first.ipynb", "01_first.html", "02_second.ipynb", "02_second.html", "index.html", "note.txt", "loss.png"}


def test_links_lead_from_the_pages_to_pages_and_files(demo):
    output, _ = demo
    links = re.findall(r'<a href="([^"#]+)"', (output / "01_first.html").read_text(encoding="utf-8"))
    assert links == ["02_second.html", "../../library.py"]
    assert all((output / link).is_file() for link in links)


def test_a_failing_notebook_is_named_with_its_cell_and_error(tmp_path):
    notebooks, output = tmp_path / "notebooks", tmp_path / "output"
    write_notebook(notebooks, "01_first", "x = 1", "x / 0", "print('never')")
    write_notebook(notebooks, "02_second", "print('never')")
    with pytest.raises(JobError, match=r"01_first\.ipynb, cell \[2\]: ZeroDivisionError: division by zero\n    x / 0"):
        run_demo(notebooks, output)
    assert [path.name for path in output.iterdir()] == ["01_first.ipynb"]


def test_a_dying_kernel_is_named_with_its_cell(tmp_path):
    notebooks = tmp_path / "notebooks"
    write_notebook(notebooks, "01_first", "import os; os._exit(1)")
    with pytest.raises(JobError, match=r"01_first\.ipynb.*kernel died"):
        run_demo(notebooks, tmp_path / "output")


def test_a_folder_without_notebooks_is_an_error_and_nothing_is_removed(tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "kept.png").touch()
    with pytest.raises(JobError, match="make demo"):
        run_demo(tmp_path, tmp_path / "output")
    assert (tmp_path / "output" / "kept.png").exists()
