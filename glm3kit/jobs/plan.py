"""The launch plan: which part of a run is this machine's, and how do its processes find the others?

Several machines run the same command; each finds its place from the rank table and its own addresses, or from the
variables of a ModelArts training job. One of them, the master, runs the scheduler besides, where all processes meet.

    plan = plan_run(read_rank_table("hccl.json")); print("\\n".join(plan.reasons))
"""

import ipaddress
import os
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from glm3kit.errors import JobError
from glm3kit.setup.rank_table import RankTable
from glm3kit.setup.rank_table_forms import Server, is_address

MASTER_PORT = 8118  # with several machines, which must agree without talking; MindSpore's own default


@dataclass(frozen=True)
class Plan:
    """The launch plan of this machine: what it starts of a run, and where its processes meet the others."""

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
        """The ranks that this machine starts, as many as every other; they are counted on from machine to machine."""
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
            users = ""
            with suppress(psutil.Error):  # another user's, or gone meanwhile
                pids = {c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid}
                named = [f"{psutil.Process(pid).name()} (process {pid})" for pid in sorted(pids)]
                users = f": {', '.join(named)} has it" if named else ""
            raise JobError(f"port {port} of {address} cannot be used ({err.strerror}){users}; end what uses "
                           "it, or give another with --port, the same on every machine") from err


def address_of(master: str, own: bool = False) -> str:
    """The address of the master, which may be given by name: MindSpore takes no name.

    own: instead this machine's own, from which it reaches the master; nothing is sent.
    """
    try:
        family, *_, place = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        if not own:
            return place[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return probe.getsockname()[0]
    except OSError as err:
        raise JobError(f"the master {master} cannot be reached from here ({err}); correct its address or name, or give "
                       "one that every machine reaches with --master") from err


def servers_in_order(table: RankTable) -> list[Server]:
    """Servers by their ranks; raises JobError unless each has as many, counted on from server to server."""
    def ranks(server: Server) -> list[int]:
        return sorted(int(device.rank_id) for device in server.devices)

    servers = sorted(table.servers, key=ranks)
    size = len(servers[0].devices)
    wrong = [server for n, server in enumerate(servers) if ranks(server) != list(range(n * size, (n + 1) * size))]
    if wrong:
        raise JobError(f"{table.source}: server {wrong[0].server_id} has ranks "
                       f"{', '.join(map(str, ranks(wrong[0])))}; expected {size} on every server, counted on from "
                       "server to server; `glm3kit rank-table merge` writes such a table, and data_parallel x "
                       "tensor_parallel must use every server as much")
    return servers


def _find_node(table: RankTable, environ: Mapping[str, str], addresses: Collection[str]) -> tuple[int, str]:
    """The place of this machine among the servers, and from what it is known."""
    servers = servers_in_order(table)
    own = {address for address in addresses if not ipaddress.ip_address(address).is_loopback}
    own |= {environ["MA_CURRENT_IP"]} if "MA_CURRENT_IP" in environ else set()
    found = [n for n, server in enumerate(servers) if {server.server_id, server.host_ip} & own]
    if len(found) == 1:
        return found[0], "its address in the table"
    index, hosts = environ.get("VC_TASK_INDEX", ""), worker_hosts(environ)
    if index.isdecimal() and int(index) < len(servers) == len(hosts):
        return int(index), "VC_TASK_INDEX"
    names = ", ".join(server.host_ip or server.server_id for server in servers)
    raise JobError(f"{table.source}: which of its servers ({names}) is this machine? {len(found)} of them have one of "
                   f"its addresses ({', '.join(sorted(own)) or 'none'}), and VC_WORKER_HOSTS and VC_TASK_INDEX do not "
                   f"say it for {len(servers)} servers; give --node-rank, from 0 in the order of the ranks")


def worker_hosts(environ: Mapping[str, str]) -> list[str]:
    """The machines of a ModelArts training job, the master first."""
    return [host.strip() for host in environ.get("VC_WORKER_HOSTS", "").split(",") if host.strip()]


def find_master(table: RankTable, environ: Mapping[str, str]) -> tuple[str, str]:
    """An address or name of the machine where the scheduler runs, and from what it is known."""
    servers, hosts = servers_in_order(table), worker_hosts(environ)
    if len(hosts) == len(servers):
        return hosts[0], "VC_WORKER_HOSTS"
    for name in (servers[0].host_ip, servers[0].server_id):
        if name and is_address(name):
            return name, "the first server of the table"
    raise JobError(f"{table.source}: the first server is called {servers[0].server_id}, which is no address; give one "
                   "that every machine reaches with --master")


def plan_run(table: RankTable, environ: Mapping[str, str] = os.environ, addresses: Collection[str] | None = None,
             node_rank: int | None = None, master: str | None = None, port: int | None = None) -> Plan:
    """Decide what this machine starts of a run on the devices of `table`.

    addresses: this machine's; default: those of its interfaces. node_rank, master, port: by hand, else from the table
        and the addresses, or from VC_TASK_INDEX, VC_WORKER_HOSTS and MA_CURRENT_IP of a ModelArts training job.
    Raises JobError if that does not say which server this machine is, if servers differ in their number of ranks, or
    if the port is in use.
    """
    addresses = own_addresses() if addresses is None else addresses
    servers = servers_in_order(table)
    nodes = len(servers)
    if node_rank is not None and not 0 <= node_rank < nodes:
        raise JobError(f"--node-rank {node_rank}: {table.source} has {nodes} server(s); expected 0 to {nodes - 1}")
    if nodes == 1:
        node_rank, host, own, reasons, schedules = 0, "127.0.0.1", None, [], True
        port = port or free_port()
    else:
        why, whence = "--node-rank", "--master"
        if node_rank is None:
            node_rank, why = _find_node(table, environ, addresses)
        if not master:
            master, whence = find_master(table, environ)
        server, host = servers[node_rank], address_of(master)
        listed = sorted({server.server_id, server.host_ip} & set(addresses))
        own = listed[0] if listed else environ.get("MA_CURRENT_IP") or address_of(master, own=True)
        port, schedules = port or MASTER_PORT, host in addresses
        reasons = [f"this machine: {server.server_id}, node {node_rank} of {nodes} (from {why}), reached at {own}",
                   f"master: {master} (from {whence})",
                   f"scheduler: {'here' if schedules else f'on {host}, by the same command there'}, port {port}"]
    if schedules:
        refuse_busy_port(host, port)
    devices = sorted(servers[node_rank].devices, key=lambda device: int(device.rank_id))
    ranks = ", ".join(f"{device.rank_id} on device {device.device_id}" for device in devices)
    reasons = [f"devices: {table.source}, {table.rank_size} on {nodes} machine(s)", *reasons, f"ranks here: {ranks}"]
    return Plan(table.rank_size, tuple(device.device_id for device in devices), node_rank, nodes, host, port, schedules,
                own, tuple(reasons))
