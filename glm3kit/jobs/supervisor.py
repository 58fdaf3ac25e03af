"""The detached process behind a job: starts its ranks, watches them, and writes what became of them to job.json.

Ranks, and the scheduler where several of them meet, are its children, so it sees how each of them ends. A rank that was
done with its work has said so in a record (`rank_process` in process.py), as has one that ended by an error.

    python -m glm3kit.jobs.supervisor output/run PLAN -m glm3kit train output/run/config.yaml  # PLAN: as JSON
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from glm3kit.checkpoint.folder import clear_unfinished
from glm3kit.config.load import load_config
from glm3kit.files import atomic_write
from glm3kit.jobs.diagnosis import diagnose
from glm3kit.jobs.environment import process_variables
from glm3kit.jobs.plan import Plan
from glm3kit.jobs.process import JOB_VARIABLE, STACKS_SIGNAL, Watch, end_processes, last_lines, now, process_mark

POLL_S = 0.2
GRACE_S = 3  # for a rank that failed to print its traceback, for a rank's own words where the scheduler failed
TEARDOWN_S = 30  # for a rank that is done with its work to leave the cluster
SIGN_OF_LIFE_S = 10  # between two touches of job.json, for readers on other machines


def describe_exit(code: int) -> str:
    """What an exit code says about the end of a rank."""
    if code >= 0:
        return f"ended with exit code {code} before its work was done"
    name = next((known.name for known in signal.Signals if known == -code), "unknown")
    hint = "; the system does that when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}{hint})"


class Supervisor:
    """One run of one job. `run` returns when everything that was started has ended."""

    def __init__(self, folder: Path, plan: Plan, command: list[str], hang_timeout_s: float | None) -> None:
        self.folder, self.plan, self.command = folder, plan, [sys.executable, *command]
        self.stopping = False
        self.children: dict[str, subprocess.Popen] = {}
        self.names = [f"rank_{rank}" for rank in plan.local_ranks]
        self.working = set(self.names)  # ranks that are not done with their work
        # What has failed: whether it yields to others as the cause, when it ended, its name, how, when it was seen.
        self.failed: dict[str, tuple[bool, str, str, str, float]] = {}
        self.looked = now()
        self.heartbeats = Watch(folder, self.names, hang_timeout_s)
        self.written, self.touched = "", 0.0  # the content of job.json, and when it was touched
        self.state: dict = {
            "state": "starting", "reason": None, "started": now(), "ended": None, "rank_size": plan.ranks,
            "host": socket.gethostname(), "plan": asdict(plan),
            "processes": {"supervisor": process_mark(os.getpid())}, "exit_codes": dict.fromkeys(self.names),
            "command": self.command,
        }

    def write(self, **changes: object) -> None:
        """Write job.json if anything is new in it; touch it as a sign of life, which needs no room on the disk."""
        self.state |= changes
        text = json.dumps(self.state, indent=2, ensure_ascii=False) + "\n"
        if text != self.written:
            atomic_write(self.folder / "job.json", text)
        elif time.monotonic() - self.touched > SIGN_OF_LIFE_S:
            os.utime(self.folder / "job.json")
        else:
            return
        self.written, self.touched = text, time.monotonic()

    def start(self) -> None:
        """Start what the launch plan has for this machine."""
        log_folder = self.folder / "log"
        for name, variables in process_variables(self.plan).items():
            environment = os.environ | {JOB_VARIABLE: str(self.folder)} | variables
            with (log_folder / f"{name}.log").open("wb") as output:
                # In the log folder: MindSpore leaves rank_N/ and kernel_meta/ where it works. In sessions of their own:
                # Linux shares a busy machine out by sessions (sched_autogroup), and in one the ranks got a third of it.
                child = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                         env=environment, cwd=log_folder, start_new_session=True)
            self.children[name] = child
            self.state["processes"][name] = process_mark(child.pid)

    def look(self) -> None:
        """Take in which processes have ended, and what they have said of it."""
        codes = {name: child.poll() for name, child in self.children.items()}  # first: a record comes before the end
        before, self.looked, clock = self.looked, now(), time.monotonic()
        for name, code in codes.items():
            path = self.folder / "log" / f"{name}.json"
            record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            said = record.get("exit_code")
            if name in self.names:
                self.state["exit_codes"][name] = said if code is None or said == 0 else code
            if said == 0:  # it has succeeded, however it leaves the cluster
                self.working.discard(name)
            elif said:  # the scheduler also fails when it misses a rank
                how = f"failed with exit code {said}: {record['error']}"
                self.failed.setdefault(name, (name == "scheduler", record["ended"], name, how, clock))
            elif code is not None:  # it may have ended right after the look before this one
                self.failed.setdefault(name, (False, before, name, describe_exit(code), clock))

    def failure(self) -> str | None:
        """Why the job has failed, or None. Of several that ended, the first is the cause of the others' end."""
        if not self.failed or not self.working:  # once the ranks are done the scheduler ends without a record
            return None
        *_, name, how, seen = min(self.failed.values())
        known = name != "scheduler" and self.children[name].poll() is not None
        return self._reason(name, how) if known or time.monotonic() - seen > GRACE_S else None

    def hang(self) -> str | None:
        """Which rank has made no step for too long, or None; what each rank is doing then goes to its log."""
        if not (found := self.heartbeats.silent(self.state["processes"])):
            return None
        for name in self.names:
            self.children[name].send_signal(STACKS_SIGNAL)
        time.sleep(1)
        return self._reason(*found)

    def _reason(self, name: str, what: str) -> str:
        who = f"rank {name[5:]} of {self.plan.ranks}" if name in self.names else name
        lines = last_lines(self.folder / "log" / f"{name}.log", 20).strip()
        advice = "".join(f"\n{line}" for line in diagnose(f"{what}\n{lines}"))
        return f"{who} {what}\nThe end of log/{name}.log:\n{lines or '(empty)'}{advice}"

    def watch(self) -> tuple[str, str | None]:
        """Wait for the end of the ranks -> the final state and its reason."""
        while not self.stopping:
            self.look()
            if reason := self.failure() or self.hang():
                return "failed", reason
            if not self.working:
                return "succeeded", None
            started = all((self.folder / "log" / f"{name}.json").exists() for name in self.names)
            self.write(state="running" if started else "starting")
            time.sleep(POLL_S)
        return "stopped", "stopped on request"

    def run(self) -> None:
        """Start, watch, end what is left, write the verdict."""
        try:
            self.start()
            state, reason = self.watch()
            # A scheduler waits for the ranks of other machines, too; where there are none it is done with ours.
            leaving = [self.children[name] for name in (self.names if self.plan.nodes == 1 else self.children)]
            deadline = time.monotonic() + (TEARDOWN_S if state == "succeeded" else 0)
            while time.monotonic() < deadline and any(child.poll() is None for child in leaving):
                time.sleep(POLL_S)
        except Exception:  # nobody else would hear of it: this process has no parent
            state, reason = "failed", f"the supervisor itself failed:\n{traceback.format_exc()}"
        left = end_processes(self.folder)
        clear_unfinished(self.folder / "checkpoint")  # on a full disk the verdict needs the room
        if left:
            reason = f"{reason or ''}\nProcesses {left} could not be ended.".strip()
        self.write(state=state, reason=reason, ended=now())


def main(folder: str, plan: str, *command: str) -> None:
    """Become a process of its own, say in job.json that the job starts, let the launching process go on, and run."""
    reader, writer = os.pipe()
    if os.fork():  # the launching process waits for this one only, and learns whether job.json is there
        os.close(writer)
        os._exit(0 if os.read(reader, 1) else 1)
    os.close(reader)
    os.setsid()
    hang_timeout_s = load_config(Path(folder, "config.yaml")).train.hang_timeout_s
    supervisor = Supervisor(Path(folder), Plan(**json.loads(plan)), list(command), hang_timeout_s)

    def stop(*_: object) -> None:
        supervisor.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    supervisor.write()
    os.write(writer, b"1")
    os.close(writer)
    supervisor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
