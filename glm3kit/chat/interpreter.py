"""The code interpreter, the notebook way: code becomes a new cell, and what the user's run of it printed is kept.

Nothing here runs code. IPython tells when a cell begins and ends; in between its output is copied, not held back.

    watch(); insert_cell("print(1 + 1)")   # the user runs the new cell; then
    last_run("print(1 + 1)")               # -> "2\\n"
"""

import io
import sys
import threading
from collections import deque
from typing import Any

from glm3kit.errors import Glm3KitError

KEPT = 20  # runs of cells
MAX_KEPT = 1_000_000  # characters of one run


class _Copy:
    """A stream that passes on what is written to it, and keeps a copy."""

    def __init__(self, stream: Any, copy: io.StringIO):
        self._stream, self._kept = stream, copy

    def write(self, text: str) -> int:
        if self._kept.tell() < MAX_KEPT:
            self._kept.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Watch:
    """What the cells of one IPython shell print, from now on."""

    def __init__(self, shell: Any):
        self.runs: deque[tuple[str, str]] = deque(maxlen=KEPT)  # source; all printed, with the value or the exception
        self._streams: tuple[Any, Any] | None = None  # sys.stdout and sys.stderr, while a cell runs
        shell.events.register("pre_run_cell", self._begin)
        shell.events.register("post_run_cell", self._end)

    def _begin(self, info: Any) -> None:
        self._kept, self._streams = io.StringIO(), (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = (_Copy(stream, self._kept) for stream in self._streams)

    def _end(self, result: Any) -> None:
        if self._streams is None:  # the cell in which the watch began
            return
        (sys.stdout, sys.stderr), self._streams = self._streams, None
        output = self._kept.getvalue()
        error = result.error_before_exec or result.error_in_exec
        ending = "" if result.result is None else repr(result.result)
        if error is not None:
            ending = f"{type(error).__name__}: {error}"
        if not output.rstrip().endswith(ending):  # IPython in a terminal has printed it already
            output += f"{ending}\n"
        self.runs.append((result.info.raw_cell, output))


_lock = threading.Lock()
_watch: Watch | None = None


def _shell() -> Any:
    """The running IPython shell; None outside of IPython, which is not imported for that."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def watch() -> Watch | None:
    """Begin to keep what cells print, once; None outside of IPython."""
    global _watch
    with _lock:
        if _watch is None and (shell := _shell()) is not None:
            _watch = Watch(shell)
        return _watch


def insert_cell(source: str) -> None:
    """Put a new code cell below the running one, not run. Raises Glm3KitError outside of a notebook."""
    shell = _shell()
    if shell is None:
        raise Glm3KitError("there is no notebook to put a cell into; call this in a cell of a notebook")
    shell.set_next_input(source, replace=False)


def last_run(source: str) -> str:
    """What the newest run of a cell of this source printed, or if it was changed, the newest run of any cell.

    Raises Glm3KitError if no cell has been run since `watch`.
    """
    watched = watch()
    runs = list(watched.runs) if watched else []
    if not runs:
        raise Glm3KitError("no cell was run since the model wrote its code; run the new cell first")
    return next((output for run, output in reversed(runs) if run.strip() == source.strip()), runs[-1][1])
