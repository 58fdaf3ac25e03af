"""The variables that make a process a rank: those of MindSpore's dynamic cluster, cores, cards, addresses.

Several ranks meet at a scheduler, a process that runs the same command as they do
(https://www.mindspore.cn/tutorials/en/master/parallel/dynamic_cluster.html). Whoever starts them, the supervisor here
or a platform, names it to them.

    process_variables(plan_run(local_rank_table(2))).keys() -> "scheduler", "rank_0", "rank_1"
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from glm3kit.errors import JobError
from glm3kit.jobs.plan import MASTER_PORT, Plan, address_of, find_master, refuse_busy_port, worker_hosts
from glm3kit.setup.rank_table import ascend_cards, find_rank_table, wait_for_rank_table

# Set by whoever started us, a platform or another launcher: each process gets its own.
FOREIGN = ("MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_WORKER_NUM", "MS_NODE_ID", "RANK_ID", "RANK_SIZE",
           "DEVICE_ID", "RANK_TABLE_FILE")
CLUSTER_TIMEOUT_S = 300  # for all ranks to have joined


def visible_devices(devices: Sequence[str], cards: Sequence[int]) -> str | None:
    """ASCEND_RT_VISIBLE_DEVICES for ranks on other cards than the first of a machine, else None.

    devices: device ids in the order of the ranks. The N-th rank of a machine takes the N-th visible card; cards are
        counted in the order in which the machine shows them.
    Example: devices 4 and 5 of cards 0 to 7 -> "4,5"
    """
    places = [cards.index(int(device)) for device in devices if int(device) in cards]
    if len(places) < len(devices) or places == list(range(len(places))):
        return None
    return ",".join(map(str, places))


def rank_environment(plan: Plan, target: str, environ: Mapping[str, str] = os.environ,
                     root: str | Path = "/") -> dict[str, str]:
    """What all ranks have: the caller's variables, without those of another launcher, and a share of the cores."""
    environment = {key: value for key, value in environ.items() if key not in FOREIGN}
    environment.setdefault("GLOG_v", "3")  # MindSpore: errors only
    environment["PYTHONUNBUFFERED"] = "1"  # a log that can be followed
    source = Path(__file__).resolve().parents[2]
    if source.name not in ("site-packages", "dist-packages"):  # ranks run in another folder: a checkout must be found
        paths = [str(source), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    cards = [] if target == "CPU" else ascend_cards(root)
    if not cards:
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(plan.devices))))
    elif (visible := visible_devices(plan.devices, cards)) and "ASCEND_RT_VISIBLE_DEVICES" not in environment:
        environment["ASCEND_RT_VISIBLE_DEVICES"] = visible
    if plan.own_address:  # else MindSpore and HCCL each take the first interface that they find
        environment.setdefault("MS_WORKER_IP", plan.own_address)
        if "HCCL_SOCKET_IFNAME" not in environment:
            environment.setdefault("HCCL_IF_IP", plan.own_address)
    return environment


def process_variables(plan: Plan) -> dict[str, dict[str, str]]:
    """What runs on this machine, by name, the scheduler first -> the variables that a process has for itself."""
    if plan.ranks == 1:  # it meets nobody
        return {"rank_0": {"RANK_ID": "0", "RANK_SIZE": "1", "DEVICE_ID": "0"}}
    cluster = {"MS_WORKER_NUM": str(plan.ranks), "MS_SCHED_HOST": plan.master, "MS_SCHED_PORT": str(plan.port),
               "MS_TOPO_TIMEOUT": str(CLUSTER_TIMEOUT_S), "RANK_SIZE": str(plan.ranks)}
    processes = {"scheduler": cluster | {"MS_ROLE": "MS_SCHED", "RANK_ID": "0"}} if plan.schedules else {}
    for place, rank in enumerate(map(str, plan.local_ranks)):
        processes[f"rank_{rank}"] = cluster | {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": rank, "RANK_ID": rank,
                                               "DEVICE_ID": str(place)}
    return processes


def joining_variables(environ: Mapping[str, str], root: str | Path = "/") -> dict[str, str]:
    """What a process that a platform started as one of several needs to meet the others; {} for any other process.

    ModelArts' preset engines start the boot file once a card, with RANK_ID, RANK_SIZE, ASCEND_DEVICE_ID and
    RANK_TABLE_FILE. MindSpore's own start-up from a rank table is deprecated and wants version "1.0"; so the processes
    meet at a scheduler instead, which rank 0 must start.
    Raises JobError if the variables do not fit each other.
    """
    if "MS_ROLE" in environ or environ.get("RANK_SIZE", "1") == "1":
        return {}
    rank, size = environ.get("RANK_ID", ""), environ["RANK_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise JobError(f"RANK_ID is '{rank}', RANK_SIZE '{size}'; expected numbers, the first below the second; "
                       "`glm3kit launch` sets them")
    path, hosts = find_rank_table(environ, root), worker_hosts(environ)
    master = hosts[0] if hosts else "127.0.0.1"
    if path and not hosts:
        table = wait_for_rank_table(path)
        if len(table.servers) > 1:
            master, _ = find_master(table, environ)
    device = environ.get("DEVICE_ID") or environ.get("ASCEND_DEVICE_ID")
    return {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": size, "MS_NODE_ID": rank, "MS_SCHED_HOST": master,
            "MS_SCHED_PORT": environ.get("MS_SCHED_PORT", str(MASTER_PORT))} | ({"DEVICE_ID": device} if device else {})


@contextmanager
def joined() -> Iterator[None]:
    """Wrap the work of a rank: under a launcher that has not done so, set what it needs to meet the others.

    Rank 0 starts the scheduler as a process of its own. It ends by itself once every rank has left, so nobody waits for
    it here; where rank 0 fails it is ended, and the others hear of it.
    """
    variables, scheduler = joining_variables(os.environ), None
    if variables:
        variables["MS_SCHED_HOST"] = address_of(variables["MS_SCHED_HOST"])
        os.environ.update(variables)
        os.environ.pop("RANK_TABLE_FILE", None)  # with it MindSpore would start up from the table
    if variables.get("MS_NODE_ID") == "0":
        refuse_busy_port(variables["MS_SCHED_HOST"], int(variables["MS_SCHED_PORT"]))
        scheduler = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=os.environ | {"MS_ROLE": "MS_SCHED"},
                                     stdin=subprocess.DEVNULL)
    try:
        yield
    except BaseException:
        if scheduler:
            scheduler.kill()
        raise
