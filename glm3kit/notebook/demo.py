"""The seven notebooks in one go, on the tiny model: what `make demo` runs.

Each notebook is run by nbclient in a kernel of its own, as JupyterLab would; it writes its files where GLM3KIT_OUTPUT
says.

    glm3kit demo
"""

import html
import os
import re
import shutil
import time
from pathlib import Path
from string import Template

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from tqdm.auto import tqdm

from glm3kit.errors import JobError
from glm3kit.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent.parent
CELL_TIMEOUT_S = 900


def _failure(notebook: NotebookNode, name: str, error: Exception) -> JobError:
    """Which notebook, which cell, which error; without an error output it is the last cell that was started."""
    started = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.get("execution_count")]
    failed = [cell for cell in started if any(output.output_type == "error" for output in cell.outputs)]
    cell = (failed or started or [None])[-1]
    where = f"{name}, cell [{cell.execution_count}]" if cell else f"{name}, before its first cell"
    if isinstance(error, CellExecutionError):
        reason = f"{error.ename}: {error.evalue}"
    elif isinstance(error, CellTimeoutError):
        reason = f"did not end within {CELL_TIMEOUT_S} s"
    else:
        reason = f"its kernel died ({error}); often the machine ran out of memory"
    source = "".join(f"\n    {line}" for line in cell.source.splitlines()) if cell else ""
    return JobError(f"{where}: {reason}{source}\nOpen the notebook with `make lab` and run it there.")


def run_notebook(path: Path, output: Path, bar: tqdm) -> NotebookNode:
    """Run one notebook in its own folder; leave it, as far as it came, and its HTML version under `output`.

    Raises JobError that names notebook, cell and error.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | {"GLM3KIT_OUTPUT": str(output), "GLOG_v": "3"}
    environment.pop("GLM3KIT_CONFIG", None)  # the demo is the tiny setting, whatever the shell has set
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}},
                            extra_arguments=["--log-level=ERROR"],  # each kernel would warn that it listens on TCP
                            on_cell_complete=lambda cell, cell_index: bar.update())
    bar.reset(len(notebook.cells))
    try:
        client.execute(env=environment)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as err:
        raise _failure(notebook, path.name, err) from err
    finally:
        atomic_write(output / path.name, nbformat.writes(notebook))
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    page = re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', page)  # links lead to the other pages
    page = page.replace('href="../', f'href="{os.path.relpath(path.parent.parent, output)}/')  # and to the repository
    atomic_write(output / f"{path.stem}.html", page)
    return notebook


def _index(output: Path, notebooks: dict[str, tuple[str, float]], minutes: float) -> str:
    """The page that links everything; notebooks: file stem -> (title, seconds)."""
    pages = [f'<tr><td><a href="{stem}.html">{html.escape(title)}</a></td><td><a href="{stem}.ipynb">ipynb</a></td>'
             f'<td class="number">{seconds:.0f} s</td></tr>' for stem, (title, seconds) in notebooks.items()]
    made = sorted(path for path in output.iterdir() if path.is_file() and path.stem not in notebooks)
    files = [f'<tr><td><a href="{html.escape(path.name)}">{html.escape(path.name)}</a></td>'
             f'<td class="number">{tqdm.format_sizeof(path.stat().st_size, "B")}</td></tr>' for path in made]
    picture = ""
    if (output / "loss.png").exists():
        picture = '<h2>The loss · 损失曲线</h2>\n<a href="loss.png"><img src="loss.png" alt="loss of every step"></a>\n'
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return page.substitute(minutes=f"{minutes:.1f}", notebooks="\n".join(pages), picture=picture,
                           files="\n".join(files))


def run_demo(notebooks: Path = ROOT / "notebooks", output: Path = ROOT / "output" / "demo") -> Path:
    """Run all notebooks of a folder in order, from nothing; return the path of the index page.

    `output` is emptied first; then it holds the executed notebooks, their HTML versions, index.html and their files.
    Raises JobError if there are no notebooks (they come with the repository, not with the package) or if one fails.
    """
    paths = sorted(notebooks.glob("[0-9]*.ipynb"))
    if not paths:
        raise JobError(f"{notebooks}: no notebooks; run the demo from a clone of the repository: make demo")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    begin, done = time.monotonic(), {}
    for number, path in enumerate(paths, start=1):
        start = time.monotonic()
        with tqdm(desc=f"{number}/{len(paths)} {path.stem}", unit="cell", leave=False, disable=None) as bar:
            notebook = run_notebook(path, output, bar)
        seconds = time.monotonic() - start
        print(f"{number}/{len(paths)} {path.stem:<32}{seconds:6.1f} s", flush=True)
        lines = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
        done[path.stem] = next((line.lstrip("# ") for line in lines if line.startswith("#")), path.stem), seconds
    index = output / "index.html"
    atomic_write(index, _index(output, done, (time.monotonic() - begin) / 60))
    return index
