"""A training job as its folder shows it: state, log, metrics; waiting for it, stopping it, finding it again.

The folder is the job: `job.json` (written by the supervisor, see supervisor.py), `config.yaml`, `rank_table.json`,
`log/rank_N.log`, `metrics.jsonl`. Nothing is kept in the process that started it, so a job outlives its notebook.

    job = Job.attach("output/run"); print(job.state()["state"]); print(job.log(rank=0))
"""

import codecs
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from glm3kit.config.load import load_config
from glm3kit.errors import JobError
from glm3kit.files import atomic_write
from glm3kit.jobs.metrics import METRICS_FILE, NewRecords
from glm3kit.jobs.process import LINE_BYTES, end_processes, is_running, job_processes, last_lines, now

LIVE = ("starting", "running")  # the other states are final: succeeded, failed, stopped
POLL_S = 0.5
SILENT_S = 60  # without a touch of job.json by a supervisor on another machine, which touches it every 10 s


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
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        total = load_config(self.folder / "config.yaml").train.total_steps if progress else None
        records = NewRecords(self.folder / METRICS_FILE)
        with tqdm(total=total, unit="step", disable=not progress, desc=self.folder.name) as bar:
            ended = False
            while not ended:
                state = self.state()
                ended = state["state"] not in LIVE  # asked before the last look
                if progress and (new := records.read()):
                    bar.total, bar.n = new[-1].get("total_steps", bar.total), new[-1]["step"]
                    bar.set_postfix(loss=f"{new[-1]['loss']:.3f}")
                if not ended:
                    if time.monotonic() > deadline:
                        raise JobError(f"{self.folder}: still {state['state']} after {timeout_s} s; "
                                       "wait() goes on waiting, stop() ends it")
                    time.sleep(POLL_S)
        if state["state"] != "succeeded":
            raise JobError(f"{self.folder}: the job {state['state']}: {state['reason']}")
        return self
