"""Signs of life: ranks mark their steps, and the supervisor finds the one that has stopped doing so.

A mark is the time of change of `log/rank_N.step`: set when a batch is drawn and when its step, with the checkpoint that
may be due, is done. When one rank hangs the others wait for it inside the next step: the oldest mark tells them apart.

    heartbeat = Heartbeat("output/run", rank=0); heartbeat.mark()
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")
HELD = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP)  # the system does not run it
FIRST_STEP_S = 3600  # the least that ranks have for data, weights and compiling, before their first step


def _mark_file(folder: Path, name: str) -> Path:
    return folder / "log" / f"{name}.step"


class Heartbeat:
    """The marks of one rank."""

    def __init__(self, folder: str | Path, rank: int) -> None:
        self.path = _mark_file(Path(folder), f"rank_{rank}")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def mark(self) -> None:
        """Say that a step is done."""
        self.path.touch()

    def drawing(self, batches: Iterable[T]) -> Iterator[T]:
        """Give the batches on, marking that each was drawn; the first step compiles and is marked when it is done."""
        for batch in batches:
            if self.path.exists():
                self.path.touch()
            yield batch


class Watch:
    """The supervisor's look at the marks of `names`; limit_s: how long a rank may make no step, None: for ever."""

    def __init__(self, folder: Path, names: list[str], limit_s: float | None) -> None:
        self.folder, self.limit_s = folder, limit_s
        # Seconds of this process's own clock, which nobody sets, when the mark was last seen to change.
        self.seen: dict[str, tuple[float | None, float]] = {name: (None, time.monotonic()) for name in names}

    def silent(self, processes: dict[str, dict | None]) -> tuple[str, str] | None:
        """The rank that hangs, if one does, and what is known of it. processes: as in job.json."""
        if self.limit_s is None:
            return None
        now = time.monotonic()
        for name, (before, _) in self.seen.items():
            path = _mark_file(self.folder, name)
            mark = path.stat().st_mtime if path.exists() else None
            if mark != before:
                self.seen[name] = mark, now
        marked = all(mark is not None for mark, _ in self.seen.values())
        limit = self.limit_s if marked else max(self.limit_s, FIRST_STEP_S)
        if now - min(since for _, since in self.seen.values()) <= limit:
            return None
        states = {name: _process_state(processes.get(name)) for name in self.seen}
        name = min(self.seen, key=lambda name: (states[name] not in HELD, self.seen[name][0] or 0))
        return name, (f"hangs: no step for {now - self.seen[name][1]:.0f} s (train.hang_timeout_s is "
                      f"{self.limit_s:g}), its process is {states[name]}")


def _process_state(mark: dict | None) -> str:
    try:
        return psutil.Process(mark["pid"]).status() if mark else "unknown"
    except psutil.Error:
        return "gone"
