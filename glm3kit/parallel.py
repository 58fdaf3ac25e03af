"""Several processes as one: who is who, and the collectives between them.

Tensor parallel (https://arxiv.org/abs/1909.08053): ranks that share a layer's matrices; each holds a slice, and the
same rows of data pass through all. Data parallel with sharded optimizer state (ZeRO, https://arxiv.org/abs/1910.02054):
ranks that hold the same slice and see different rows; each keeps the optimizer state of a shard, a piece of every
flattened parameter.

On CPU, MCCL sums over any group but scatters over none and gathers over all ranks only: sums take their places.

    topology = start_processes(config.parallel)
"""

import os
from dataclasses import dataclass

import mindspore as ms
import numpy as np
import psutil
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, create_group, get_group_size, get_rank, init

from glm3kit.config.groups import ParallelConfig
from glm3kit.errors import ConfigError
from glm3kit.weights.slices import Slicing, copies_of


@dataclass(frozen=True)
class Topology:
    """The place of a rank: rank = data_rank * tensor_parallel + tensor_rank."""

    rank: int = 0
    data_parallel: int = 1
    tensor_parallel: int = 1
    group: str = ""  # of all ranks of the run
    data_group: str = ""  # of the ranks with the same slices
    tensor_group: str = ""  # of the ranks with the same rows
    shard_optimizer: bool = True  # whether ranks with the same slices share the optimizer's state

    @property
    def ranks(self) -> int:
        return self.data_parallel * self.tensor_parallel

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_parallel

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_parallel

    @property
    def shards(self) -> int:
        """How many ranks share the optimizer state of a slice."""
        return self.data_parallel if self.shard_optimizer else 1

    @property
    def shard_rank(self) -> int:
        """Which of the shards is this rank's."""
        return self.data_rank if self.shard_optimizer else 0


ALONE = Topology()


def choose_device(target: str) -> None:
    """Compute on "CPU" or "Ascend"; "auto" leaves MindSpore's own choice, Ascend where there is one."""
    if target not in ("auto", ms.get_context("device_target")):
        ms.set_device(target)  # refused once something has been computed


def start_processes(config: ParallelConfig) -> Topology:
    """Choose the device and join the other processes where a launcher started several.

    Raises ConfigError if their number is not the one the configuration asks for.
    """
    launched = int(os.environ.get("RANK_SIZE", "1"))
    if launched != config.ranks:
        raise ConfigError(f"the configuration asks for data_parallel {config.data_parallel} x tensor_parallel "
                          f"{config.tensor_parallel} = {config.ranks} process(es), {launched} started; "
                          "start it with `glm3kit launch`, or change the numbers under parallel")
    choose_device(config.device_target)
    if launched == 1:
        return ALONE
    init()
    assert get_group_size() == launched, "RANK_SIZE and the process group agree"
    rank, data, tensor = get_rank(), config.data_parallel, config.tensor_parallel
    world = GlobalComm.WORLD_COMM_GROUP
    if tensor == 1 or data == 1:
        return Topology(rank, data, tensor, world, world, world, config.shard_optimizer)
    # Every process makes its own two groups; their names hold the first rank, which no other group of the kind has.
    first, column = rank - rank % tensor, rank % tensor
    create_group(f"tensor-{first}", list(range(first, first + tensor)))
    create_group(f"data-{column}", list(range(column, config.ranks, tensor)))
    return Topology(rank, data, tensor, world, f"data-{column}", f"tensor-{first}", config.shard_optimizer)


def any_rank(flag: bool, topology: Topology) -> bool:
    """Whether `flag` is set on any rank; every rank calls it, waits for the others and hears the same."""
    if topology.ranks == 1:
        return flag
    return float(ops.AllReduce(group=topology.group)(Tensor(np.full(1, flag, np.float32))).asnumpy()[0]) > 0


def barrier(topology: Topology) -> None:
    """Wait until every rank is here."""
    any_rank(False, topology)


def on_ascend() -> bool:
    """Whether this process computes on Ascend, where all collectives exist."""
    return ms.get_context("device_target") == "Ascend"


def memory_in_use() -> int:
    """Bytes: the most that the device has held so far, on a CPU what the process holds now."""
    return ms.runtime.max_memory_allocated() if on_ascend() else psutil.Process().memory_info().rss


# ---- shards of optimizer state, over the ranks of data parallelism ----

def shard_of(values: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """The shard of one rank: any shape -> (ceil(size / ranks),), the last padded with zeros; alone, the whole array."""
    if ranks == 1:
        return values
    size = -(-values.size // ranks)
    flat = np.zeros(size * ranks, values.dtype)
    flat[:values.size] = values.reshape(-1)
    return flat[rank * size:(rank + 1) * size]


class ReduceScatter(nn.Cell):
    """Sum a gradient over the data group and keep this rank's shard, as `shard_of` cuts it; unsharded, all of it."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.rank, self.ranks, self.native = topology.shard_rank, topology.shards, on_ascend()
        self.alone = topology.data_parallel == 1
        if not self.alone:
            scatters = self.native and self.ranks > 1
            self.collective = (ops.ReduceScatter if scatters else ops.AllReduce)(group=topology.data_group)

    def construct(self, gradient: Tensor) -> Tensor:
        if self.alone:
            return gradient
        if self.ranks == 1:
            return self.collective(gradient)
        flat = gradient.reshape(-1)
        size = -(-flat.shape[0] // self.ranks)
        padding = size * self.ranks - flat.shape[0]
        if padding:
            flat = ops.concat((flat, ops.zeros(padding, flat.dtype)))
        summed = self.collective(flat)
        return summed if self.native else summed[self.rank * size:(self.rank + 1) * size]


class AllGather(nn.Cell):
    """Put the shards of the data group together again: (shard size,) -> shape; unsharded, the shard is the array."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.rank, self.ranks = topology.shard_rank, topology.shards
        self.native = on_ascend() or topology.data_group == GlobalComm.WORLD_COMM_GROUP
        if self.ranks > 1:
            self.collective = (ops.AllGather if self.native else ops.AllReduce)(group=topology.data_group)

    def construct(self, shard: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.ranks == 1:
            return shard
        if not self.native:
            before = ops.zeros(self.rank * shard.shape[0], shard.dtype)
            after = ops.zeros((self.ranks - 1 - self.rank) * shard.shape[0], shard.dtype)
            shard = ops.concat((before, shard, after))
        size = 1
        for length in shape:
            size *= length
        return self.collective(shard)[:size].reshape(shape)


class WorldSum(nn.Cell):
    """Sum over all ranks of the run."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.alone = topology.ranks == 1
        self.collective = None if self.alone else ops.AllReduce(group=topology.group)

    def construct(self, x: Tensor) -> Tensor:
        return x if self.alone else self.collective(x)


# ---- slices of a layer, over the ranks of tensor parallelism ----

class SumOfCopies(nn.Cell):
    """Sum the gradient of what several slices hold alike, each with the part that its own heads made of it.

    A slice cut along axis 0 -> the same shape, where the rows that `copies_of` counts as copies are sums over them.
    """

    def __init__(self, topology: Topology, cut: Slicing):
        super().__init__()
        self.alone, copies = copies_of(cut, topology.tensor_parallel)
        self.place, self.places = topology.tensor_rank // copies, topology.tensor_parallel // copies
        self.collective = ops.AllReduce(group=topology.tensor_group)

    def construct(self, gradient: Tensor) -> Tensor:
        shared = gradient[self.alone:]
        rows = shared.shape[0]
        parts = ()
        for place in range(self.places):  # zeros but for our place, so that only copies add up
            parts += (shared if place == self.place else ops.zeros_like(shared),)
        summed = self.collective(ops.concat(parts))[self.place * rows:(self.place + 1) * rows]
        return ops.concat((gradient[:self.alone], summed))


class CopyToSlices(nn.Cell):
    """Before a column-parallel matrix: the same input for every slice; their gradients add up."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.alone = topology.tensor_parallel == 1
        self.collective = None if self.alone else ops.AllReduce(group=topology.tensor_group)

    def construct(self, x: Tensor) -> Tensor:
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (dout if self.alone else self.collective(dout),)


class SumOfSlices(nn.Cell):
    """After a row-parallel matrix: the slices' outputs add up; the gradient is the same for every slice."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.alone = topology.tensor_parallel == 1
        self.collective = None if self.alone else ops.AllReduce(group=topology.tensor_group)

    def construct(self, x: Tensor) -> Tensor:
        return x if self.alone else self.collective(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (dout,)


class GatherSlices(nn.Cell):
    """Each rank's x (..., n) side by side: (..., n * ranks), without a gradient."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.rank, self.ranks = topology.tensor_rank, topology.tensor_parallel
        self.collective = None if self.ranks == 1 else ops.AllReduce(group=topology.tensor_group)

    def construct(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return x
        parts = ()
        for rank in range(self.ranks):  # zeros but for our place, summed
            parts += (x if rank == self.rank else ops.zeros_like(x),)
        return self.collective(ops.concat(parts, -1))
