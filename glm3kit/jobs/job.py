"""A training job as its folder shows it: state, log, metrics; waiting for it, stopping it, finding it again.

The folder is the job: `job.json` (written by the supervisor, see supervisor.py), `config.yaml`, `rank_table.json`,
`log/rank_N.log`, `metrics.jsonl`. Nothing is kept in the process that started it, so a job outlives its notebook.

    job = Job.attach("output/run"); print(job.state()["state"]); print(job.log(rank=0))
"""

import codecs
import faulthandler
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import psutil
from tqdm.auto import tqdm

from glm3kit.config.load import load_config
from glm3kit.errors import JobError
from glm3kit.files import FULL, atomic_write

LIVE = ("starting", "running")  # the other states are final: succeeded, failed, stopped
JOB_VARIABLE = "GLM3KIT_JOB"  # in the environment of every process that a job starts: the job's folder
POLL_S = 0.5
LINE_BYTES = 512  # of a line of a log, at most as a rule
SILENT_S = 60  # without a touch of job.json by a supervisor on another machine, which touches it every 10 s
STACKS_SIGNAL = signal.SIGUSR1  # makes a rank write to its log where each of its threads is


def now() -> str:
    """The time as job.json writes it: UTC, with the zone, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def process_mark(pid: int) -> dict | None:
    """What identifies a process beyond the reuse of its id; None if there is none."""
    try:
        return {"pid": pid, "create_time": psutil.Process(pid).create_time()}
    except psutil.Error:
        return None


def is_running(mark: dict | None) -> bool:
    """Whether the process of a mark still runs, and is the same."""
    if not mark:
        return False
    try:
        process = psutil.Process(mark["pid"])
        # psutil adds the boot time, which moves by a second when the clock is set
        same = abs(process.create_time() - mark["create_time"]) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def job_processes(folder: Path) -> list[psutil.Process]:
    """Every process that a job started and that still runs: msrun, scheduler, ranks and what those started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(JOB_VARIABLE) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # gone meanwhile, or another user's
            continue
    return found


def end_processes(folder: Path, timeout_s: float = 10) -> list[int]:
    """Kill every process of a job; returns the ids of those that outlived it.

    Found by their environment rather than by parent: msrun's workers lead their own sessions and outlive msrun.
    """
    deadline = time.monotonic() + timeout_s
    while left := job_processes(folder):
        if time.monotonic() > deadline:
            return [process.pid for process in left]
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=1)
    return []


def last_lines(path: Path, count: int) -> str:
    """The last lines of a log; "" if there is no log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LINE_BYTES * count))
            return "\n".join(file.read().decode("utf-8", errors="replace").splitlines()[-count:])
    except FileNotFoundError:
        return ""


@contextmanager
def rank_process(folder: str | Path) -> Iterator[None]:
    """Wrap the work of a rank: leaves `log/rank_N.json` with process id, exit code and the error, if any.

    That file is what decides over the job: msrun's exit code is 0 for a job that was interrupted, and comes 30 s late
    for one that failed. The scheduler, which runs the same command, leaves `log/scheduler.json`.
    Example: with rank_process("output/run"): run_rank(config)
    """
    scheduler = os.environ.get("MS_ROLE") == "MS_SCHED"
    name = "scheduler" if scheduler else f"rank_{os.environ.get('RANK_ID', '0')}"
    path = Path(folder) / "log" / f"{name}.json"
    record = {"pid": os.getpid(), "started": now()}

    def leave(exit_code: int, error: str | None) -> None:
        text = json.dumps(record | {"ended": now(), "exit_code": exit_code, "error": error}, ensure_ascii=False)
        for _ in range(10):
            try:
                return atomic_write(path, text)
            except OSError as err:
                if err.errno not in FULL:
                    raise
                time.sleep(0.2)  # another rank is about to remove what it could not write whole
        atomic_write(path, text)

    faulthandler.register(STACKS_SIGNAL, file=sys.__stderr__)
    atomic_write(path, json.dumps(record))
    try:
        yield
    except SystemExit as err:
        code = err.code if isinstance(err.code, int) else int(err.code is not None)
        leave(code, f"SystemExit: {err.code}" if code else None)
        raise
    except BaseException as err:  # a rank that is interrupted has failed too
        said, *_ = str(err).partition("\n\n----")  # below it MindSpore prints where it is in its own C++
        leave(1, f"{type(err).__name__}: {said}")
        raise
    leave(0, None)


def elsewhere(state: dict) -> str | None:
    """The name of the machine that a job runs on, if that is another one: its folder is on a disk that both see."""
    host = state.get("host")
    return host if host != socket.gethostname() else None


class Job:
    """A job, by its folder. `launch` returns one; `Job.attach(folder)` finds it again from any process."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()

    def __repr__(self) -> str:
        return f"Job({str(self.folder)!r})"

    @classmethod
    def attach(cls, folder: str | Path) -> "Job":
        """The job that was launched into `folder`. Raises JobError if none was."""
        job = cls(folder)
        job._read()
        return job

    def _read(self) -> dict:
        path = self.folder / "job.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as err:
            raise JobError(f"{self.folder}: no job was launched here (no job.json); "
                           "give the folder output_dir/name of a configuration that was launched") from err
        except (OSError, ValueError) as err:
            raise JobError(f"{path}: cannot be read: {err}") from err

    def state(self) -> dict:
        """The content of job.json: state, reason, processes, exit_codes (by rank), started, ended, rank_size.

        state is "starting", "running", "succeeded", "failed" or "stopped". A job whose supervisor was killed cannot
        say so itself: it is given as failed here. So is one that runs on another machine, in a folder that both see,
        and has given no sign of life for a minute.
        """
        state = self._read()
        if state["state"] in LIVE and elsewhere(state):
            silent_s = time.time() - (self.folder / "job.json").stat().st_mtime
            if silent_s > SILENT_S:
                state |= {"state": "failed", "reason": f"no sign of life from the job's machine {state['host']} for "
                                                       f"{silent_s:.0f} s; see there, or launch again with --resume"}
        elif state["state"] in LIVE and not is_running(state["processes"]["supervisor"]):
            state = self._read()  # it may have ended just before we looked
            if state["state"] in LIVE:
                left = [process.pid for process in job_processes(self.folder)]
                advice = f"its processes {left} still run: stop() ends them" if left else "none of its processes runs"
                state |= {"state": "failed", "reason": f"the supervisor of the job was killed; {advice}"}
        return state

    def log(self, rank: int = 0, lines: int = 20) -> str:
        """The last lines of a rank's log. Raises JobError for a rank that has none."""
        path = self.folder / "log" / f"rank_{rank}.log"
        if not path.is_file():
            found = sorted(file.name for file in path.parent.glob("*.log"))
            raise JobError(f"{path}: no such log; there are {', '.join(found) or 'none yet'}")
        return last_lines(path, lines)

    def follow(self, rank: int = 0, lines: int = 20) -> Iterator[str]:
        """The last lines of a rank's log, then what is added to it, until the job ends.

        Raises JobError if the job ends without a log of that rank.
        """
        path = self.folder / "log" / f"rank_{rank}.log"
        while not path.exists() and self.state()["state"] in LIVE:
            time.sleep(POLL_S)
        self.log(rank)  # raises where there is none
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode  # a character may be half written
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LINE_BYTES * lines))
            yield "".join(decode(file.read()).splitlines(keepends=True)[-lines:])
            ended = False
            while not ended:
                ended = self.state()["state"] not in LIVE  # asked before the last look
                if added := file.read():
                    yield decode(added)
                if not ended:
                    time.sleep(POLL_S)

    def stop(self, timeout_s: float = 20) -> dict:
        """End the job and every process of it; returns the final state. A job that has ended stays as it is.

        Raises JobError if processes are left after `timeout_s` seconds.
        """
        state = self._read()
        if state["state"] in LIVE and (host := elsewhere(state)):
            raise JobError(f"{self.folder}: the job runs on {host}; stop it there")
        supervisor = state["processes"]["supervisor"]
        if is_running(supervisor):
            os.kill(supervisor["pid"], signal.SIGTERM)
            deadline = time.monotonic() + timeout_s
            while is_running(supervisor) and time.monotonic() < deadline:
                time.sleep(0.1)
        left = end_processes(self.folder, timeout_s)
        if left or is_running(supervisor):
            raise JobError(f"{self.folder}: processes {left or [supervisor['pid']]} do not end; "
                           "look at them with ps, they may wait for a device or a disk")
        state = self._read()
        if state["state"] in LIVE:  # there was no supervisor to write it
            state |= {"state": "stopped", "reason": "stopped; its supervisor had been killed", "ended": now()}
            atomic_write(self.folder / "job.json", json.dumps(state, indent=2, ensure_ascii=False))
        return state

    def wait(self, timeout_s: float | None = None, progress: bool = False) -> "Job":
        """Wait until the job succeeds; with `progress`, a bar over its steps.

        Raises JobError with the reason if the job fails or is stopped, or if it still runs after `timeout_s` seconds.
        Ctrl-C ends the waiting, not the job.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        steps = _Steps(self.folder, progress)
        try:
            while (state := self.state())["state"] in LIVE:
                steps.update()
                if deadline is not None and time.monotonic() > deadline:
                    raise JobError(f"{self.folder}: still {state['state']} after {timeout_s} s; "
                                   "wait() goes on waiting, stop() ends it")
                time.sleep(POLL_S)
            steps.update()
        finally:
            steps.close()
        if state["state"] != "succeeded":
            raise JobError(f"{self.folder}: the job {state['state']}: {state['reason']}")
        return self


class NewRecords:
    """The records of a metrics.jsonl that were not read before; only what was added to the file is read."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0  # bytes read so far

    def read(self) -> list[dict]:
        """The new records of steps; [] for a file that does not exist. A damaged line is left to `read_metrics`."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self.offset:  # a new run has replaced it
                    self.offset = 0
                file.seek(self.offset)
                lines = file.readlines()
        except FileNotFoundError:
            return []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # still being written
        self.offset += sum(map(len, lines))
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "step" in record and "loss" in record:
                records.append(record)
        return records


class _Steps:
    """A progress bar over the steps that metrics.jsonl tells of."""

    def __init__(self, folder: Path, progress: bool) -> None:
        total = load_config(folder / "config.yaml").train.total_steps if progress else None
        self.records = NewRecords(folder / "metrics.jsonl")
        self.bar = tqdm(total=total, unit="step", disable=not progress, desc=folder.name)

    def update(self) -> None:
        if self.bar.disable:
            return
        for record in self.records.read():
            self.bar.total = record.get("total_steps", self.bar.total)
            self.bar.n = record["step"]
            self.bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()
