"""The processes of a job: what tells them apart, the signs that a rank leaves in the job's folder, how they are ended.

A rank leaves two files beside its log: `rank_N.json`, how it ended, and `rank_N.step`, whose time of change marks its
steps. A mark is set when a batch is drawn and when its step, with the checkpoint that may be due, is done. When one
rank hangs the others wait for it inside the next step: the oldest mark tells them apart.

    with rank_process("output/run"): run_rank(config)
"""

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import psutil

from glm3kit.files import FULL, atomic_write

T = TypeVar("T")
JOB_VARIABLE = "GLM3KIT_JOB"  # in the environment of every process that a job starts: the job's folder
STACKS_SIGNAL = signal.SIGUSR1  # makes a rank write to its log where each of its threads is
ASK_S = 5  # between SIGTERM and SIGKILL: a card that is not given back is held for a while (EJ0001)
LINE_BYTES = 512  # of a line of a log, at most as a rule
HELD = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP)  # the system does not run it
FIRST_STEP_S = 3600  # the least that ranks have for data, weights and compiling, before their first step


def now() -> str:
    """The time as job.json writes it: UTC, with the zone, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def process_mark(pid: int) -> dict | None:
    """What identifies a process beyond the reuse of its id; None if there is none."""
    try:
        return {"pid": pid, "create_time": psutil.Process(pid).create_time()}
    except psutil.Error:
        return None


def process_state(mark: dict | None) -> str:
    """What the system says of the process of a mark, in psutil's words; "gone" if it has ended."""
    with suppress(psutil.Error):
        # psutil adds the boot time, which moves by a second when the clock is set
        if mark and abs((process := psutil.Process(mark["pid"])).create_time() - mark["create_time"]) < 2:
            return "gone" if (state := process.status()) == psutil.STATUS_ZOMBIE else state
    return "gone"


def is_running(mark: dict | None) -> bool:
    """Whether the process of a mark still runs, and is the same."""
    return process_state(mark) != "gone"


def job_processes(folder: Path) -> list[psutil.Process]:
    """Every process that a job started and that still runs: scheduler, ranks and what those started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone meanwhile, or another user's
            if process.environ().get(JOB_VARIABLE) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_processes(folder: Path, timeout_s: float = 10) -> list[int]:
    """End every process of a job: SIGTERM, some seconds, SIGKILL; returns the ids of those that outlived it.

    Found by their environment and not by parent: what a rank has started outlives it, and ranks a killed supervisor.
    """
    def signal_all(what: int) -> list[psutil.Process]:
        for process in (left := job_processes(folder)):
            with suppress(psutil.Error):  # gone meanwhile
                process.send_signal(what)
        return left

    psutil.wait_procs(signal_all(signal.SIGTERM), timeout=ASK_S)
    deadline = time.monotonic() + timeout_s
    while left := signal_all(signal.SIGKILL):
        if time.monotonic() > deadline:
            return [process.pid for process in left]
        psutil.wait_procs(left, timeout=1)
    return []


def last_lines(path: Path, count: int) -> str:
    """The last lines of a log; "" if there is no log."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LINE_BYTES * count))
        return "\n".join(file.read().decode("utf-8", errors="replace").splitlines()[-count:])


@contextmanager
def rank_process(folder: str | Path) -> Iterator[None]:
    """Wrap the work of a rank: leaves `log/rank_N.json` with process id, exit code and the error, if any.

    From it the supervisor knows that a rank had done its work before it ended, and the words of its error. The
    scheduler, which runs the same command, leaves `log/scheduler.json`.
    """
    scheduler = os.environ.get("MS_ROLE") == "MS_SCHED"
    name = "scheduler" if scheduler else f"rank_{os.environ.get('RANK_ID', '0')}"
    path = Path(folder) / "log" / f"{name}.json"
    record = {"pid": os.getpid(), "started": now()}
    faulthandler.register(STACKS_SIGNAL, file=sys.__stderr__)
    atomic_write(path, json.dumps(record))
    exit_code, error = 0, None
    try:
        yield
    except BaseException as err:  # a rank that is interrupted has failed too
        said, *_ = str(err).partition("\n\n----")  # below it MindSpore prints where it is in its own C++
        exit_code, error = 1, f"{type(err).__name__}: {said}"
        if isinstance(err, SystemExit):
            exit_code = err.code if isinstance(err.code, int) else int(err.code is not None)
            error = error if exit_code else None
        raise
    finally:
        record |= {"ended": now(), "exit_code": exit_code, "error": error}
        for tries_left in range(10, -1, -1):
            try:
                atomic_write(path, json.dumps(record, ensure_ascii=False))
                break
            except OSError as err:
                if err.errno not in FULL or not tries_left:
                    raise
                time.sleep(0.2)  # another rank is about to remove what it could not write whole


class Heartbeat:
    """The marks of one rank of the job in `folder`."""

    def __init__(self, folder: str | Path, rank: int) -> None:
        self.path = Path(folder) / "log" / f"rank_{rank}.step"
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
        clock = time.monotonic()
        for name, (before, _) in self.seen.items():
            path = self.folder / "log" / f"{name}.step"
            mark = path.stat().st_mtime if path.exists() else None
            if mark != before:
                self.seen[name] = mark, clock
        marked = all(mark is not None for mark, _ in self.seen.values())
        limit = self.limit_s if marked else max(self.limit_s, FIRST_STEP_S)
        if clock - min(since for _, since in self.seen.values()) <= limit:
            return None
        states = {name: process_state(processes.get(name)) for name in self.seen}
        name = min(self.seen, key=lambda name: (states[name] not in HELD, self.seen[name][0] or 0))
        return name, (f"hangs: no step for {clock - self.seen[name][1]:.0f} s (train.hang_timeout_s is "
                      f"{self.limit_s:g}), its process is {states[name]}")
