"""The detached process behind a job: starts its ranks, watches them, and writes what became of them to job.json.

One rank is started directly, several by msrun, MindSpore's launcher (`mindspore/parallel/cluster`). Of msrun only the
starting is used. Its exit code is 0 after an interruption and comes 30 s late after a failure, and on SIGTERM it leaves
its workers behind. So the verdict is taken from the records that the ranks leave (`rank_process` in job.py), and what
is left of a job is found and ended here.

    python -m glm3kit.jobs.supervisor output/run PLAN -m glm3kit train output/run/config.yaml  # PLAN: as JSON
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import psutil

from glm3kit.checkpoint.folder import clear_unfinished
from glm3kit.config.load import load_config
from glm3kit.files import atomic_write
from glm3kit.jobs.diagnosis import diagnose
from glm3kit.jobs.heartbeat import Watch
from glm3kit.jobs.job import JOB_VARIABLE, STACKS_SIGNAL, end_processes, is_running, last_lines, now, process_mark
from glm3kit.jobs.plan import Plan, msrun_command

POLL_S = 0.2
GRACE_S = 3  # for a rank that failed to print its traceback, for msrun (which looks once a second) to log an exit code
TEARDOWN_S = 30  # for a rank that is done with its work to leave the cluster
SIGN_OF_LIFE_S = 10  # between two touches of job.json, for readers on other machines
LOG_LINES = 20


def describe_exit(code: int | None) -> str:
    """What an exit code says about the end of a rank; None where nobody saw it."""
    if code is None:
        return "ended without a word"
    if code >= 0:
        return f"ended with exit code {code} before its work was done"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = "; the system does that when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}{hint})"


class Supervisor:
    """One run of one job. `run` returns when everything that was started has ended."""

    def __init__(self, folder: Path, plan: Plan, command: list[str], hang_timeout_s: float | None) -> None:
        self.folder, self.plan, self.command = folder, plan, command
        self.stopping = False
        self.launcher: subprocess.Popen | None = None
        self.launcher_name = "msrun" if plan.ranks > 1 else "rank_0"
        self.names = [f"rank_{rank}" for rank in plan.local_ranks]
        self.expected = {*self.names, *(["scheduler"] if plan.ranks > 1 and plan.schedules else [])}
        self.suspected: dict[str, float] = {}  # name -> when it was first seen to have failed
        self.culprit: str | None = None  # what ended by itself, without a word
        self.heartbeats = Watch(folder, self.names, hang_timeout_s)
        self.written, self.touched = "", 0.0  # the content of job.json, and when it was touched
        self.state: dict = {
            "state": "starting", "reason": None, "started": now(), "ended": None, "rank_size": plan.ranks,
            "host": socket.gethostname(), "plan": asdict(plan),
            "processes": {"supervisor": process_mark(os.getpid())}, "exit_codes": dict.fromkeys(self.names),
            "command": [sys.executable, *command],
        }

    def write(self, **changes: object) -> None:
        """Write job.json if anything is new in it."""
        self.state |= changes
        text = json.dumps(self.state, indent=2, ensure_ascii=False) + "\n"
        if text != self.written:
            atomic_write(self.folder / "job.json", text)
            self.written, self.touched = text, time.monotonic()
        elif time.monotonic() - self.touched > SIGN_OF_LIFE_S:
            os.utime(self.folder / "job.json")
            self.touched = time.monotonic()

    def start(self) -> None:
        """Start the rank, or msrun for several."""
        log_folder = self.folder / "log"
        environment = os.environ | {JOB_VARIABLE: str(self.folder)}
        command = [sys.executable, *self.command]
        if self.plan.ranks > 1:
            command = msrun_command(self.plan, log_folder, self.command)
        with (log_folder / f"{self.launcher_name}.log").open("wb") as output:
            # MindSpore leaves rank_N/ and kernel_meta/ in the working folder
            self.launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                             env=environment, cwd=log_folder)
        self.state["processes"][self.launcher_name] = process_mark(self.launcher.pid)

    def look(self) -> dict[str, dict]:
        """Find new processes; returns the records that ranks and scheduler have left."""
        processes = self.state["processes"]
        if self.plan.ranks > 1 and not processes.keys() >= self.expected:
            for child in self._children():
                try:
                    variables = child.environ()
                    name = {"MS_SCHED": "scheduler", "MS_WORKER": f"rank_{variables.get('RANK_ID')}"}.get(
                        variables.get("MS_ROLE", ""))
                    if name and name not in processes:
                        processes[name] = {"pid": child.pid, "create_time": child.create_time()}
                except psutil.Error:  # ended before we looked
                    continue
        records = {}
        for name in (*self.names, "scheduler"):
            path = self.folder / "log" / f"{name}.json"
            if path.exists():
                records[name] = json.loads(path.read_text(encoding="utf-8"))
                processes.setdefault(name, process_mark(records[name]["pid"]))
                if name in self.names:
                    self.state["exit_codes"][name] = records[name].get("exit_code")
        return records

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.launcher.pid).children()
        except psutil.Error:
            return []

    def failure(self) -> str | None:
        """Why the job has failed, or None. Of several ranks that ended, the first is the cause of the others' end."""
        # In this order: what is gone before msrun tells of a failure was not ended by msrun; and a rank leaves its
        # record before it goes.
        gone = [name for name, mark in self.state["processes"].items() if not is_running(mark)]
        codes, records = self.exit_codes(), self.look()
        unfinished = [name for name in (*self.names, "scheduler") if "exit_code" not in records.get(name, {})]
        failed = [name for name, record in records.items() if record.get("exit_code")]
        if not failed and unfinished in ([], ["scheduler"]):  # it ends without a record once the ranks are done
            return None
        silent = [name for name in unfinished if name in gone]
        if not codes and self.culprit not in unfinished:
            # The scheduler may end without a record because a rank has failed; it is the cause where none has.
            self.culprit = next((name for name in silent if name in self.names or not failed), None)
        own_death = [name for name in unfinished if name in codes or name == self.culprit]
        by_time = sorted(failed, key=lambda name: (name == "scheduler", records[name]["ended"]))
        name = next(iter(own_death + by_time + silent), None)
        if name is None:
            return None if "msrun" not in codes else self._reason(
                "msrun", f"ended with exit code {codes['msrun']} before the ranks did")
        if name not in (gone if name in failed else codes) and not self._waited(name):
            return None
        if name in failed:
            return self._reason(name, f"failed with exit code {records[name]['exit_code']}: {records[name]['error']}")
        if name in self.names:
            self.state["exit_codes"][name] = codes.get(name)
        return self._reason(name, describe_exit(codes.get(name)))

    def hang(self) -> str | None:
        """Which rank has made no step for too long, or None; what each rank is doing then goes to its log."""
        processes = self.state["processes"]
        if not (found := self.heartbeats.silent(processes)):
            return None
        for name in self.names:
            if is_running(processes.get(name)):
                os.kill(processes[name]["pid"], STACKS_SIGNAL)
        time.sleep(1)
        return self._reason(*found)

    def _waited(self, name: str) -> bool:
        """Whether a process was first suspected long enough ago for all about its end to be known."""
        return time.monotonic() - self.suspected.setdefault(name, time.monotonic()) > GRACE_S

    def exit_codes(self) -> dict[str, int]:
        """Exit codes as the parent saw them: this process, or msrun, which logs that of the first rank to fail."""
        code = self.launcher.poll()
        codes = {} if code is None else {self.launcher_name: code}
        lines = last_lines(self.folder / "log" / "msrun.log", 200)
        by_pid = dict(re.findall(r"Worker process (\d+) exit with exception. Error code: (-?\d+)", lines))
        return codes | {name: int(by_pid[str(mark["pid"])]) for name, mark in self.state["processes"].items()
                        if mark and str(mark["pid"]) in by_pid}

    def _reason(self, name: str, what: str) -> str:
        who = f"rank {name[5:]} of {self.plan.ranks}" if name in self.names else name
        lines = last_lines(self.folder / "log" / f"{name}.log", LOG_LINES).strip()
        advice = "".join(f"\n{line}" for line in diagnose(f"{what}\n{lines}"))
        return f"{who} {what}\nThe end of log/{name}.log:\n{lines or '(empty)'}{advice}"

    def watch(self) -> tuple[str, str | None]:
        """Wait for the end of the ranks -> the final state and its reason."""
        while not self.stopping:
            if reason := self.failure() or self.hang():
                return "failed", reason
            if all(code == 0 for code in self.state["exit_codes"].values()):
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
            deadline = time.monotonic() + (TEARDOWN_S if state == "succeeded" else 0)
            while time.monotonic() < deadline and any(is_running(self.state["processes"].get(n)) for n in self.names):
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
