"""Launch a run: one process a device, as a job that lives in its folder and not in the notebook.

    job = launch(load_config("configs/tiny.yaml"))                 # waits, with a progress bar
    job = launch(config, rank_table="hccl.json", wait=False)       # then job.wait(), job.stop(), job.log(0)
    print(plan_launch(config, "hccl.json").report())               # what would be started, and why
"""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path

from glm3kit.checkpoint.folder import newest_checkpoint
from glm3kit.config.groups import RunConfig
from glm3kit.errors import JobError, RankTableError
from glm3kit.jobs.environment import FOREIGN, process_variables, rank_environment
from glm3kit.jobs.job import LIVE, Job
from glm3kit.jobs.plan import Plan, own_addresses, plan_run
from glm3kit.jobs.process import JOB_VARIABLE, end_processes, job_processes, last_lines
from glm3kit.setup.rank_table import RankTable, ascend_cards, find_rank_table, local_rank_table, wait_for_rank_table

RESULTS = ("job.json", "metrics.jsonl", "checkpoint", "strategy")  # what a run leaves and another must not mix with
OTHER = ("log", "config.yaml", "rank_table.json")
LOCK_S = 10  # for a supervisor that has written its verdict to be gone


def choose_rank_table(config: RunConfig, given: RankTable | str | Path | None = None,
                      environ: Mapping[str, str] = os.environ, root: str | Path = "/",
                      timeout_s: float = 0) -> RankTable:
    """The table of the ranks of a run: the one given, else the platform's, else one for processes of this machine.

    timeout_s: how long to wait for a table that the platform is still filling.
    Raises RankTableError if it has fewer devices than the run needs, or is not complete in time, JobError if none of
    those ranks is this machine's.
    """
    count, target = config.parallel.ranks, config.parallel.device_target
    if given is None and target != "CPU":
        given = find_rank_table(environ, root)
    if isinstance(given, RankTable):
        table = given
    elif given is not None:
        table = wait_for_rank_table(given, timeout_s)
    else:
        cards = ascend_cards(root)
        if target != "CPU" and len(cards) < count and (cards or target == "Ascend"):
            raise RankTableError(f"this machine shows {len(cards)} Ascend card(s) (/dev/davinci*), but {count} are "
                                 "asked for (data_parallel x tensor_parallel); ask for fewer, or set "
                                 "parallel.device_target to CPU")
        table = local_rank_table(count)
    used = table.first(count)
    names = [server.server_id for server in used.servers]
    here = {address for address in own_addresses() if not ip_address(address).is_loopback}
    if idle := [server for server in table.servers
                if server.server_id not in names and {server.server_id, server.host_ip} & here]:
        raise JobError(f"{table.source}: the {count} ranks asked for are on {', '.join(names)}, none on this machine "
                       f"({idle[0].server_id}); launch there, or raise parallel.data_parallel")
    return used


@dataclass(frozen=True)
class Launch:
    """All that is decided before anything is started."""

    config: RunConfig
    table: RankTable
    plan: Plan
    resume: bool = False

    @property
    def folder(self) -> Path:
        """The folder of this machine's job: that of the run on the first machine, one inside of it on the others."""
        folder, node = self.config.job_dir.resolve(), self.plan.node_rank
        return folder / f"node_{node}" if node else folder

    @property
    def rank_command(self) -> list[str]:
        """What Python runs as a rank."""
        return ["-m", "glm3kit", "train", str(self.folder / "config.yaml"), *(["--resume"] if self.resume else [])]

    def report(self) -> str:
        """What was decided, and from what."""
        return "\n".join([f"job: {self.folder}", *self.plan.reasons])

    def shell(self) -> str:
        """What is started, as a shell would: the changes to the environment, then a line a process."""
        plan, target = self.plan, self.config.parallel.device_target
        environment = rank_environment(plan, target) | {JOB_VARIABLE: str(self.folder)}
        ours = [JOB_VARIABLE, *rank_environment(plan, target, {})]
        command = shlex.join([sys.executable, *self.rank_command])
        processes = [f"{' '.join(f'{key}={value}' for key, value in variables.items())} {command} > {name}.log 2>&1 &"
                     for name, variables in process_variables(plan).items()]
        return "\n".join([*(f"unset {key}" for key in FOREIGN if key in os.environ),
                          *(f"export {key}={shlex.quote(environment[key])}" for key in sorted(ours)),
                          f"cd {shlex.quote(str(self.folder / 'log'))}", *processes, "wait"])


def plan_launch(config: RunConfig, rank_table: RankTable | str | Path | None = None, resume: bool = False,
                table_timeout_s: float = 600, **by_hand: str | int | None) -> Launch:
    """Decide what to start, without starting it; see `launch` for the arguments.

    Raises RankTableError or JobError for what would keep a launch from starting: devices, addresses, ports.
    """
    if os.environ.get("RANK_SIZE", "1") != "1" and "MS_ROLE" not in os.environ:
        raise JobError(f"RANK_SIZE={os.environ['RANK_SIZE']} is set: a platform starts this once a device. Let it run "
                       "`glm3kit train` instead, which joins the others; or unset RANK_ID and RANK_SIZE")
    table = choose_rank_table(config, rank_table, timeout_s=table_timeout_s)
    return Launch(config, table, plan_run(table, **by_hand), resume)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Take the folder for one job; the supervisor inherits the lock and the system frees it when that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "job.lock").open("a")
    except OSError as err:
        raise JobError(f"{folder}: cannot be written ({err}); set output_dir to a folder of yours") from err
    deadline = time.monotonic() + LOCK_S
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as err:
                with suppress(JobError):  # no job.json: another launch is about to start one
                    if Job(folder).state()["state"] not in LIVE and time.monotonic() < deadline:
                        time.sleep(0.05)  # its supervisor is about to let the folder go
                        continue
                raise JobError(f"{folder}: a job is running here; Job.attach() finds it, its stop() ends it, "
                               "or give the run another name") from err
            except OSError as err:
                raise JobError(f"{folder}: no lock can be taken there ({err}); set output_dir to a local disk") from err
        yield lock.fileno()


def _clear(start: Launch, overwrite: bool) -> None:
    """Remove an earlier run, if asked to; to go on from it, only what tells how it ended. Refuse one that is in use."""
    folder, log = start.folder, start.folder / "log"
    if overwrite and not start.resume:
        end_processes(folder)
    elif left := [process.pid for process in job_processes(folder)]:
        raise JobError(f"{folder}: processes {left} of an earlier job still run; "
                       "Job.attach(folder).stop() ends them")
    old = [folder / name for name in (*RESULTS, *OTHER)]
    if start.resume:
        newest_checkpoint(start.config.job_dir)  # raises where there is none to go on from
        old = [folder / "job.json", *log.glob("*.json"), *log.glob("*.step")]
    elif not overwrite and (found := [name for name in RESULTS if (folder / name).exists()]):
        raise JobError(f"{folder}: holds an earlier run ({', '.join(found)}); give this one another name, or "
                       "overwrite=True to remove its log, metrics and checkpoints")
    for path in old:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def start_job(start: Launch, overwrite: bool = False, command: Sequence[str] | None = None) -> Job:
    """Fill the folder and start the supervisor. command: what Python runs as a rank, by default `train`."""
    job = Job(start.folder)
    with _locked(job.folder) as lock:  # the supervisor has its own hold on it
        _clear(start, overwrite)
        (job.folder / "log").mkdir(exist_ok=True)
        start.config.save(job.folder / "config.yaml")
        start.table.save(job.folder / "rank_table.json")
        log = job.folder / "log" / "supervisor.log"
        with log.open("wb") as output:
            started = subprocess.run(
                [sys.executable, "-m", "glm3kit.jobs.supervisor", str(job.folder), json.dumps(asdict(start.plan)),
                 *(command or start.rank_command)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=job.folder, pass_fds=[lock], check=False,
                env=rank_environment(start.plan, start.config.parallel.device_target))
    if started.returncode:
        raise JobError(f"{job.folder}: the job did not start; the end of log/supervisor.log:\n{last_lines(log, 20)}")
    return job


def launch(config: RunConfig, rank_table: RankTable | str | Path | None = None, wait: bool = True,
           progress: bool = True, overwrite: bool = False, resume: bool = False, table_timeout_s: float = 600,
           node_rank: int | None = None, master: str | None = None, port: int | None = None) -> Job:
    """Train as `config` says, one process a device, in the folder output_dir/name.

    rank_table: the devices, as a table or its file; by default the platform's (RANK_TABLE_FILE, /user/config), else
        processes of this machine. The first ranks of it are used, as many as `parallel` asks for. Where it lists
        several machines, run the same on each, with an output_dir that all of them see.
    wait: return when the job has succeeded; Ctrl-C stops the job then. Without, return at once: the job goes on even
        when this process ends, and Job.attach(folder) finds it again.
    overwrite: remove an earlier run of the same name, with its checkpoints.
    resume: go on from its newest complete checkpoint instead.
    table_timeout_s: how long to wait for a table that is still being filled.
    node_rank, master, port: what is otherwise found from the table and this machine's addresses, see `plan_run`.
    Raises RankTableError for too few devices, JobError if a job runs in that folder or has left results there, and,
    when waiting, JobError with the reason if the job fails: rank, exit code or signal, the end of its log.
    """
    start = plan_launch(config, rank_table, resume, table_timeout_s, node_rank=node_rank, master=master, port=port)
    return run_launch(start, wait, progress, overwrite)


def run_launch(start: Launch, wait: bool = True, progress: bool = True, overwrite: bool = False) -> Job:
    """Start what was planned, see `launch`."""
    job = start_job(start, overwrite)
    try:
        return job.wait(progress=progress) if wait else job
    except KeyboardInterrupt:
        job.stop()
        raise
