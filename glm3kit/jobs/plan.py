"""Which part of a run is this machine's, and how do its processes find the others?

Several machines run the same command; each finds its place from the rank table and its own addresses, or from the
variables of a ModelArts training job. msrun (`mindspore/parallel/cluster`) starts the processes; one of the machines,
the master, runs the scheduler besides, where all of them meet.

    plan = plan_run(read_rank_table("hccl.json")); print("\\n".join(plan.reasons))
"""

import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from glm3kit.errors import JobError
from glm3kit.setup.rank_table import RankTable, find_rank_table, wait_for_rank_table
from glm3kit.setup.rank_table_forms import Server, is_address

MASTER_PORT = 8118  # with several machines, which must agree without talking; msrun's own default
CLUSTER_TIMEOUT_S = 300  # for all ranks to have joined


@dataclass(frozen=True)
class Plan:
    """What this machine starts of a run, and where its processes meet the others."""

    ranks: int  # of the whole run
    devices: tuple[str, ...]  # the device ids of this machine's ranks, in their order
    node_rank: int = 0
    nodes: int = 1
    master: str = "127.0.0.1"
    port: int = 0
    schedules: bool = True  # whether the scheduler runs here
    own_address: str | None = None  # of this machine on the network between the machines
    reasons: tuple[str, ...] = ()  # what was decided, and from what

    @property
    def local_ranks(self) -> range:
        """The ranks that this machine starts; msrun counts them so, with as many on every machine."""
        first = self.node_rank * len(self.devices)
        return range(first, first + len(self.devices))


def own_addresses() -> set[str]:
    """Every IP address of this machine's network interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {entry.address.partition("%")[0]  # IPv6 may have a zone after it
            for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in families}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refuse_busy_port(address: str, port: int) -> None:
    """Raise JobError, with who listens there where the system tells, if a port of this machine is in use."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the scheduler: a closed one may linger
        try:
            probe.bind((address, port))
        except OSError as err:
            raise JobError(f"port {port} of {address} cannot be used ({err.strerror}){_listener(port)}; end what uses "
                           "it, or give another with --port, the same on every machine") from err


def _listener(port: int) -> str:
    try:
        pids = {c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid}
        named = [f"{psutil.Process(pid).name()} (process {pid})" for pid in sorted(pids)]
    except psutil.Error:  # another user's, or gone meanwhile
        return ""
    return f": {', '.join(named)} has it" if named else ""


def _route_address(target: str) -> str:
    """The address that this machine reaches another from; nothing is sent."""
    try:
        family, _, _, _, place = socket.getaddrinfo(target, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return probe.getsockname()[0]
    except OSError as err:
        raise JobError(f"the master {target} cannot be reached from here ({err}); correct its address or name, or "
                       "give one that every machine reaches with --master") from err


def _servers_in_order(table: RankTable) -> list[Server]:
    """Servers by their ranks; raises JobError if msrun could not count them so: as many on each, one by one."""
    def ranks(server: Server) -> list[int]:
        return sorted(int(device.rank_id) for device in server.devices)

    servers = sorted(table.servers, key=ranks)
    size = len(servers[0].devices)
    wrong = [server for n, server in enumerate(servers) if ranks(server) != list(range(n * size, (n + 1) * size))]
    if wrong:
        raise JobError(f"{table.source}: server {wrong[0].server_id} has ranks "
                       f"{', '.join(map(str, ranks(wrong[0])))}; msrun wants {size} on every server, counted on from "
                       "server to server; `glm3kit rank-table merge` writes such a table, and data_parallel x "
                       "tensor_parallel must use every server as much")
    return servers


def _find_node(servers: list[Server], environ: Mapping[str, str], addresses: Collection[str],
               source: str) -> tuple[int, str]:
    """The place of this machine among the servers, and from what it is known."""
    own = {address for address in addresses if not ipaddress.ip_address(address).is_loopback}
    own |= {environ["MA_CURRENT_IP"]} if "MA_CURRENT_IP" in environ else set()
    found = [n for n, server in enumerate(servers) if {server.server_id, server.host_ip} & own]
    if len(found) == 1:
        return found[0], "its address in the table"
    index, hosts = environ.get("VC_TASK_INDEX", ""), _worker_hosts(environ)
    if index.isdecimal() and int(index) < len(servers) == len(hosts):
        return int(index), "VC_TASK_INDEX"
    names = ", ".join(server.host_ip or server.server_id for server in servers)
    raise JobError(f"{source}: which of its servers ({names}) is this machine? {len(found)} of them have one of its "
                   f"addresses ({', '.join(sorted(own)) or 'none'}), and VC_WORKER_HOSTS and VC_TASK_INDEX do not say "
                   f"it for {len(servers)} servers; give --node-rank, from 0 in the order of the ranks")


def _worker_hosts(environ: Mapping[str, str]) -> list[str]:
    """The machines of a ModelArts training job, the master first."""
    return [host.strip() for host in environ.get("VC_WORKER_HOSTS", "").split(",") if host.strip()]


def _find_master(servers: list[Server], environ: Mapping[str, str], source: str) -> tuple[str, str]:
    """An address or name of the machine where the scheduler runs, and from what it is known."""
    hosts = _worker_hosts(environ)
    if len(hosts) == len(servers):
        return hosts[0], "VC_WORKER_HOSTS"
    for name in (servers[0].host_ip, servers[0].server_id):
        if name and is_address(name):
            return name, "the first server of the table"
    raise JobError(f"{source}: the first server is called {servers[0].server_id}, which is no address; give one that "
                   "every machine reaches with --master")


def _is_own(host: str, addresses: Collection[str]) -> bool:
    try:
        return any(place[0] in addresses for *_, place in socket.getaddrinfo(host, None))
    except OSError:  # a name that has no address yet, such as that of a pod that is starting
        return False


def _place(servers: list[Server], source: str, environ: Mapping[str, str], addresses: Collection[str],
           node_rank: int | None, master: str | None) -> tuple[int, str, str, list[str]]:
    """This machine's place among several: node rank, master, own address, and from what they are known."""
    if node_rank is None:
        node_rank, why = _find_node(servers, environ, addresses, source)
    else:
        why = "--node-rank"
    host, whence = (master, "--master") if master else _find_master(servers, environ, source)
    server = servers[node_rank]
    listed = sorted({server.server_id, server.host_ip} & set(addresses))
    own = listed[0] if listed else environ.get("MA_CURRENT_IP") or _route_address(host)
    return node_rank, host, own, [
        f"this machine: {server.server_id}, node {node_rank} of {len(servers)} (from {why}), reached at {own}",
        f"master: {host} (from {whence})"]


def plan_run(table: RankTable, environ: Mapping[str, str] = os.environ, addresses: Collection[str] | None = None,
             node_rank: int | None = None, master: str | None = None, port: int | None = None) -> Plan:
    """Decide what this machine starts of a run on the devices of `table`.

    addresses: this machine's; default: those of its interfaces. node_rank, master, port: by hand, else from the table
        and the addresses, or from VC_TASK_INDEX, VC_WORKER_HOSTS and MA_CURRENT_IP of a ModelArts training job.
    Raises JobError if that does not say which server this machine is, if servers differ in their number of ranks, or
    if the port is in use.
    """
    addresses = own_addresses() if addresses is None else addresses
    servers = _servers_in_order(table)
    nodes = len(servers)
    if node_rank is not None and not 0 <= node_rank < nodes:
        raise JobError(f"--node-rank {node_rank}: {table.source} has {nodes} server(s); expected 0 to {nodes - 1}")
    if nodes == 1:
        node_rank, host, own, reasons, schedules = 0, "127.0.0.1", None, [], True
        port = port or free_port()
    else:
        node_rank, host, own, reasons = _place(servers, table.source, environ, addresses, node_rank, master)
        port, schedules = port or MASTER_PORT, _is_own(host, addresses)
        reasons.append(f"scheduler: {'here' if schedules else f'on {host}, by the same command there'}, port {port}")
    if schedules:
        refuse_busy_port(host, port)
    devices = sorted(servers[node_rank].devices, key=lambda device: int(device.rank_id))
    ranks = ", ".join(f"{device.rank_id} on device {device.device_id}" for device in devices)
    reasons = [f"devices: {table.source}, {table.rank_size} on {nodes} machine(s)", *reasons, f"ranks here: {ranks}"]
    return Plan(table.rank_size, tuple(device.device_id for device in devices), node_rank, nodes, host, port, schedules,
                own, tuple(reasons))


def msrun_command(plan: Plan, log_folder: Path, command: list[str]) -> list[str]:
    """The call of msrun that starts `python command...` once a rank of this machine, with logs rank_N.log."""
    # msrun takes the interpreter from PATH and knows it by one of two names
    python = "python" if (Path(sys.executable).parent / "python").exists() else "python3"
    node = [f"--node_rank={plan.node_rank}"] if plan.nodes > 1 else []
    return [sys.executable, "-m", "mindspore.parallel.cluster.run", f"--worker_num={plan.ranks}",
            f"--local_worker_num={len(plan.devices)}", *node, f"--master_addr={plan.master}",
            f"--master_port={plan.port}", f"--log_dir={log_folder}", "--worker_log_name=rank",
            f"--cluster_time_out={CLUSTER_TIMEOUT_S}",
            f"--tail_worker_log={plan.ranks}",  # no such rank: no `tail` processes
            "--join=True", python, *command]


def joining_variables(environ: Mapping[str, str], root: str | Path = "/") -> dict[str, str]:
    """What a process that a platform started as one of several needs to meet the others; {} for any other process.

    ModelArts' preset engines start the boot file once a card, with RANK_ID, RANK_SIZE, ASCEND_DEVICE_ID and
    RANK_TABLE_FILE. MindSpore's own start-up from a rank table is deprecated and wants version "1.0"; so the processes
    meet at a scheduler instead, as under msrun, which rank 0 must start.
    Raises JobError if the variables do not fit each other.
    """
    if "MS_ROLE" in environ or environ.get("RANK_SIZE", "1") == "1":
        return {}
    rank, size = environ.get("RANK_ID", ""), environ["RANK_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise JobError(f"RANK_ID is '{rank}', RANK_SIZE '{size}'; expected numbers, the first below the second; "
                       "`glm3kit launch` sets them")
    path, hosts = find_rank_table(environ, root), _worker_hosts(environ)
    master = hosts[0] if hosts else "127.0.0.1"
    if path and not hosts:
        table = wait_for_rank_table(path)
        if len(table.servers) > 1:
            master, _ = _find_master(_servers_in_order(table), environ, table.source)
    device = environ.get("DEVICE_ID") or environ.get("ASCEND_DEVICE_ID")
    return {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": size, "MS_NODE_ID": rank, "MS_SCHED_HOST": master,
            "MS_SCHED_PORT": environ.get("MS_SCHED_PORT", str(MASTER_PORT))} | ({"DEVICE_ID": device} if device else {})


@contextmanager
def joined() -> Iterator[None]:
    """Wrap the work of a rank: under a launcher that has not done so, set what it needs to meet the others.

    Rank 0 starts the scheduler as a process of its own, which runs the same command as under msrun. It ends by itself
    once every rank has left, so nobody waits for it here; where rank 0 fails it is ended, and the others hear of it.
    """
    variables = joining_variables(os.environ)
    if not variables:
        yield
        return
    os.environ.update(variables)
    os.environ.pop("RANK_TABLE_FILE", None)  # with it MindSpore would start up from the table
    if variables["MS_NODE_ID"] != "0":
        yield
        return
    refuse_busy_port(variables["MS_SCHED_HOST"], int(variables["MS_SCHED_PORT"]))
    scheduler = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=os.environ | {"MS_ROLE": "MS_SCHED"},
                                 stdin=subprocess.DEVNULL)
    try:
        yield
    except BaseException:
        scheduler.kill()
        raise
