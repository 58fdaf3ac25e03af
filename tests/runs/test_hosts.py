"""Several machines for real: two network namespaces, joined by a virtual cable, run the same command each."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from support import ROOT, SMALL, TINY, until

from glm3kit.checkpoint.folder import checkpoints
from glm3kit.jobs.job import Job
from glm3kit.jobs.metrics import read_metrics
from glm3kit.jobs.process import job_processes
from glm3kit.setup.rank_table import Device, RankTable, Server, merge_rank_tables

STEPS = 24
NODE_TIMEOUT_S = 10  # without a heartbeat; MindSpore's default is 30
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """The names of two network namespaces with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command (package iproute2): network namespaces cannot be made")
    names = [f"glm3kit-{os.getpid()}-{n}" for n in range(2)]
    made = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as err:
                pytest.skip(f"making a network namespace is not permitted here: {err.stderr.strip()}")
            made.append(name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


@pytest.fixture
def rank_table(tmp_path):
    """One table for both hosts, merged from one a host, as hccl_tools would make them."""
    tables = []
    for n, address in enumerate(ADDRESSES):
        devices = tuple(Device(str(d), f"192.168.{n}.{d}", str(d)) for d in range(2))
        tables.append(RankTable((Server(address, devices),)))
    merge_rank_tables(tables).save(tmp_path / "hccl.json")
    return tmp_path / "hccl.json"


def ended(jobs, timeout_s=120):
    """The states of jobs once all of them have ended."""
    until(lambda: all(job.state()["state"] not in ("starting", "running") for job in jobs), timeout_s)
    return [job.state() for job in jobs]


def launch_on(hosts, *arguments):
    """Run the same command on every host."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MS_NODE_TIMEOUT": str(NODE_TIMEOUT_S)}
    command = [sys.executable, "-m", "glm3kit", "launch", str(TINY), *SMALL, f"train.total_steps={STEPS}", "--detach",
               *arguments]
    started = [subprocess.Popen(["ip", "netns", "exec", host, *command], stdout=subprocess.PIPE, text=True,
                                stderr=subprocess.STDOUT, env=environment) for host in hosts]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return said


@pytest.fixture
def stopped_at_the_end(tmp_path):
    """No job outlives the test, whatever fails."""
    yield
    for name in ("run", "run/node_1", "alone"):
        if (tmp_path / name / "job.json").exists():
            Job(tmp_path / name).stop()


@pytest.mark.ranks
@pytest.mark.usefixtures("stopped_at_the_end")
def test_two_hosts_train_as_one_fail_when_their_link_is_cut_and_go_on_when_it_is_back(hosts, rank_table, tmp_path):
    run = [f"output_dir={tmp_path}", "name=run", "parallel.data_parallel=4", "train.batch_size=1", "train.save_steps=4",
           "--rank-table", str(rank_table)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    alone = [sys.executable, "-m", "glm3kit", "launch", str(TINY), *SMALL, f"train.total_steps={STEPS}",
             f"output_dir={tmp_path}", "name=alone", "parallel.data_parallel=1", "train.batch_size=4", "--detach"]
    subprocess.run(alone, check=True, stdout=subprocess.DEVNULL, env=environment)
    said = launch_on(hosts, *run)
    jobs = [Job.attach(tmp_path / "run"), Job.attach(tmp_path / "run/node_1")]
    for n, address in enumerate(ADDRESSES):
        assert f"this machine: {address}, node {n} of 2 (from its address in the table)" in said[n]
    assert "scheduler: here, port 8118" in said[0] and "scheduler: on 10.77.0.1" in said[1]

    until(lambda: checkpoints(tmp_path / "run"), 120)
    ip("-n", hosts[1], "link", "set", "cable", "down")
    cut = time.monotonic()
    states = ended(jobs)
    took_s = time.monotonic() - cut
    assert [state["state"] for state in states] == ["failed", "failed"]
    assert took_s < 3 * NODE_TIMEOUT_S + 30, "a few heartbeats, and the time of a busy machine"
    for job, state in zip(jobs, states, strict=True):
        assert "The connection between ranks broke" in state["reason"], state["reason"]
        assert not job_processes(job.folder)

    ip("-n", hosts[1], "link", "set", "cable", "up")
    launch_on(hosts, *run, "--resume")
    states = ended(jobs)
    assert [state["state"] for state in states] == ["succeeded", "succeeded"], [s["reason"] for s in states]
    assert [state["exit_codes"] for state in states] == [{"rank_0": 0, "rank_1": 0}, {"rank_2": 0, "rank_3": 0}]
    Job.attach(tmp_path / "alone").wait(120)
    two, one = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "alone")
    assert [record["step"] for record in two] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], rtol=1e-4)
