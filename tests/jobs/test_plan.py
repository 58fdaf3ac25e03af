"""Which part of a run is a machine's: from the table, from ModelArts' variables, by hand; ports."""

import os
import re
import socket

import pytest

from glm3kit.errors import JobError
from glm3kit.jobs.plan import free_port, own_addresses, plan_run
from glm3kit.setup.rank_table import Device, RankTable, Server, local_rank_table

HOSTS = ("10.0.0.1", "10.0.0.2", "10.0.0.3")


def table_of(*sizes, names=HOSTS, hosts=(None,) * 3):
    """A table of several servers with so many devices each, ranks counted on."""
    servers, rank = [], 0
    for n, (size, name, host) in enumerate(zip(sizes, names, hosts, strict=False)):
        devices = tuple(Device(str(d), f"192.168.{n}.{d}", str(rank + d)) for d in range(size))
        servers.append(Server(name, devices, host_ip=host))
        rank += size
    return RankTable(tuple(servers))


def plan(table, *addresses, **more):
    return plan_run(table, **{"environ": {}, "addresses": {"127.0.0.1", *addresses}} | more)


def test_one_machine_starts_every_rank_behind_a_loopback_address():
    alone = plan(local_rank_table(3))
    assert (alone.ranks, list(alone.local_ranks), alone.nodes, alone.master) == (3, [0, 1, 2], 1, "127.0.0.1")
    assert alone.schedules and alone.own_address is None and alone.port > 0


@pytest.mark.parametrize("node", [0, 1, 2])
def test_a_machine_finds_its_place_by_its_own_address(node, monkeypatch):
    monkeypatch.setattr("glm3kit.jobs.plan.refuse_busy_port", lambda *_: None)  # none of our addresses, in truth
    here = plan(table_of(2, 2, 2), HOSTS[node], "172.17.0.1", port=9000)
    assert (here.node_rank, here.nodes, here.master, here.port) == (node, 3, "10.0.0.1", 9000)
    assert list(here.local_ranks) == [2 * node, 2 * node + 1] and here.devices == ("0", "1")
    assert here.own_address == HOSTS[node]


def test_the_scheduler_runs_where_the_master_is(monkeypatch):
    probed = []
    monkeypatch.setattr("glm3kit.jobs.plan.refuse_busy_port", lambda *place: probed.append(place))
    assert plan(table_of(1, 1), "10.0.0.1").schedules and not plan(table_of(1, 1), "10.0.0.2").schedules
    assert probed == [("10.0.0.1", 8118)]


def test_servers_called_by_name_are_found_by_their_host_address():
    table = table_of(1, 1, names=("node_0", "node_1"), hosts=("10.0.0.8", "10.0.0.9"))
    assert plan(table, "10.0.0.9").node_rank == 1
    assert plan(table, "10.0.0.9").master == "10.0.0.8"


def test_modelarts_variables_place_a_pod_whose_address_is_not_in_the_table():
    variables = {"VC_WORKER_HOSTS": "10.1.0.7, 10.1.0.8", "VC_TASK_INDEX": "1", "MA_CURRENT_IP": "10.1.0.8"}
    here = plan(table_of(8, 8), "10.1.0.8", environ=variables)
    assert (here.node_rank, here.master, here.own_address) == (1, "10.1.0.7", "10.1.0.8")
    assert any("from VC_TASK_INDEX" in reason for reason in here.reasons)
    assert any("master: 10.1.0.7 (from VC_WORKER_HOSTS)" in reason for reason in here.reasons)


def test_what_is_given_by_hand_counts():
    here = plan(table_of(1, 1), "10.0.0.1", node_rank=1, master="192.168.7.7", port=7000,
                environ={"MA_CURRENT_IP": "192.168.7.8"})
    assert (here.node_rank, here.master, here.port, here.own_address) == (1, "192.168.7.7", 7000, "192.168.7.8")


def test_a_master_that_is_given_by_name_is_known_by_its_address():
    here = plan(table_of(1, 1), node_rank=0, master="localhost", port=free_port())
    assert here.master in ("127.0.0.1", "::1") and any("master: localhost (from --master)" in r for r in here.reasons)


def test_without_a_listed_address_the_one_towards_the_master_is_taken():
    assert plan(table_of(1, 1), node_rank=1, master="127.0.0.1", port=free_port()).own_address == "127.0.0.1"
    with pytest.raises(JobError, match="the master no.such.host.invalid cannot be reached from here"):
        plan(table_of(1, 1), node_rank=1, master="no.such.host.invalid")


@pytest.mark.parametrize("table, addresses, more, message", [
    (table_of(1, 1), [], {}, "which of its servers (10.0.0.1, 10.0.0.2) is this machine? 0 of them"),
    (table_of(1, 1), ["10.0.0.1", "10.0.0.2"], {}, "2 of them have one of its addresses"),
    (table_of(1, 1), [], {"environ": {"VC_TASK_INDEX": "1", "VC_WORKER_HOSTS": "a,b,c"}}, "give --node-rank"),
    (table_of(1, 1, names=("127.0.0.1", "10.0.0.2")), [], {}, "which of its servers"),
    (table_of(1, 1), ["10.0.0.1"], {"node_rank": 2}, "--node-rank 2: rank table has 2 server(s); expected 0 to 1"),
    (table_of(1, 1, names=("a", "b")), [], {"node_rank": 0}, "the first server is called a, which is no address"),
    (table_of(2, 1), ["10.0.0.1"], {}, "server 10.0.0.2 has ranks 2; expected 2 on every server"),
])
def test_what_cannot_be_decided_is_asked_for(table, addresses, more, message):
    with pytest.raises(JobError, match=re.escape(message)):
        plan(table, *addresses, **more)


def test_ranks_that_change_between_servers_are_refused():
    servers = (Server("10.0.0.1", (Device("0", "1.0.0.1", "0"), Device("1", "1.0.0.2", "2"))),
               Server("10.0.0.2", (Device("0", "1.0.0.3", "1"), Device("1", "1.0.0.4", "3"))))
    with pytest.raises(JobError, match="server 10.0.0.1 has ranks 0, 2; expected 2 on every server, counted on"):
        plan(RankTable(servers), "10.0.0.1")


def test_a_busy_port_is_explained_before_anything_starts():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(JobError, match=rf"port {port} of 127.0.0.1 cannot be used \(Address already in use\).*"
                                           rf"process {os.getpid()}\) has it; end what uses it, or .* --port"):
            plan(local_rank_table(2), port=port)


def test_own_addresses_are_those_of_the_interfaces():
    assert "127.0.0.1" in own_addresses()
