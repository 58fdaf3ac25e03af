"""Several processes as one: who is who, and the collectives that share gradients and optimizer state.

Data parallel with sharded optimizer state (ZeRO, https://arxiv.org/abs/1910.02054): every rank holds all weights, but the
optimizer state of only its shard of each parameter. A shard is a slice of the flattened parameter, padded so that all
ranks have the same size. On CPU, MCCL has no reduce-scatter: an all-reduce and a slice take its place.

    topology = start_processes(config.parallel)
"""

import os
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, get_group_size, get_rank, init

from glm3kit.config import ParallelConfig
from glm3kit.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """Which rank this process is, of how many that train on different rows."""

    rank: int = 0
    data_parallel: int = 1


ALONE = Topology()


def start_processes(config: ParallelConfig) -> Topology:
    """Choose the device and join the other processes where a launcher started several.

    Raises ConfigError if their number is not the one the configuration asks for.
    """
    if config.device_target != "auto":
        ms.set_device(config.device_target)
    if int(os.environ.get("RANK_SIZE", "1")) > 1:
        init()
        rank, ranks = get_rank(), get_group_size()
    else:
        rank, ranks = 0, 1
    if ranks != config.data_parallel:
        raise ConfigError(f"parallel.data_parallel is {config.data_parallel}, but {ranks} process(es) were started; "
                          "start as many as the configuration asks for, or change data_parallel")
    return Topology(rank, ranks)


def shard_size(size: int, ranks: int) -> int:
    """Values of a flattened parameter that each of `ranks` holds; the last shard may end in padding."""
    return -(-size // ranks)


def shard_of(values: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """The shard of one rank: any shape -> (shard_size,), padded with zeros."""
    flat = np.zeros(shard_size(values.size, ranks) * ranks, values.dtype)
    flat[:values.size] = values.reshape(-1)
    return flat.reshape(ranks, -1)[rank]


class AllReduce(nn.Cell):
    """Sum over all ranks; nothing to do for one."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.alone = topology.data_parallel == 1
        self.all_reduce = None if self.alone else ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        return x if self.alone else self.all_reduce(x)


class ReduceScatter(nn.Cell):
    """Sum a gradient over all ranks and keep this rank's shard: any shape -> (shard_size,); alone, the gradient."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.rank, self.ranks = topology.rank, topology.data_parallel
        self.native = ms.get_context("device_target") == "Ascend"
        if self.ranks > 1:
            self.collective = ops.ReduceScatter() if self.native else ops.AllReduce()

    def construct(self, gradient: Tensor) -> Tensor:
        if self.ranks == 1:
            return gradient
        flat = gradient.reshape(-1)
        size = -(-flat.shape[0] // self.ranks)
        padding = size * self.ranks - flat.shape[0]
        if padding:
            flat = ops.concat((flat, ops.zeros(padding, flat.dtype)))
        if self.native:
            return self.collective(flat)
        return self.collective(flat)[self.rank * size:(self.rank + 1) * size]


class AllGather(nn.Cell):
    """Put the shards of all ranks together: (shard_size,) -> the given shape; alone, the shard is the parameter."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.alone = topology.data_parallel == 1
        self.all_gather = None if self.alone else ops.AllGather(GlobalComm.WORLD_COMM_GROUP)

    def construct(self, shard: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.alone:
            return shard
        size = 1
        for length in shape:
            size *= length
        return self.all_gather(shard)[:size].reshape(shape)
