"""Joining the other processes, with stand-ins for the device and the launcher."""

import mindspore as ms
import pytest

from glm3kit import parallel
from glm3kit.config.groups import ParallelConfig


@pytest.mark.parametrize("target, bound", [("Ascend", [True]), ("CPU", [])])
def test_the_cores_of_a_rank_are_bound_on_ascend_once_it_has_joined_the_others(target, bound, monkeypatch):
    calls, joined = [], []

    def bind(enable):
        assert joined, "before, MindSpore does not know how many ranks share the machine, and binds nothing"
        calls.append(enable)

    monkeypatch.setenv("RANK_SIZE", "2")
    monkeypatch.setattr(ms, "get_context", lambda name: target)
    monkeypatch.setattr(ms.runtime, "set_cpu_affinity", bind)
    monkeypatch.setattr(parallel, "init", lambda: joined.append(True))
    monkeypatch.setattr(parallel, "get_group_size", lambda: 2)
    monkeypatch.setattr(parallel, "get_rank", lambda: 1)
    assert parallel.start_processes(ParallelConfig(data_parallel=2, device_target=target)).rank == 1
    assert calls == bound
