"""Several processes as one: who is who, and the collectives between them.

Tensor parallel (https://arxiv.org/abs/1909.08053): ranks that share a layer's matrices; each holds a slice, and the
same rows of data pass through all. Data parallel with sharded optimizer state (ZeRO, https://arxiv.org/abs/1910.02054):
ranks that hold the same slice and see different rows; each keeps the optimizer state of a shard of every flattened
parameter.

On CPU, MCCL sums over any group but scatters over none and gathers over all ranks only: sums take their places.

    topology = start_processes(config.parallel)
"""

import os
from collections.abc import Callable
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

    def slice_of(self, values: np.ndarray, cut: Slicing | None) -> np.ndarray:
        """The slice of a whole parameter that this rank holds."""
        if cut is None or self.tensor_parallel == 1:
            return values
        return cut.slice_of(values, self.tensor_rank, self.tensor_parallel)


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
    if on_ascend():  # the host launches thousands of kernels a step; after `init`, which knows how many share its cores
        ms.runtime.set_cpu_affinity(True)
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
    return float(world_sum(topology)(Tensor(np.full(1, flag, np.float32))).asnumpy()[0]) > 0


def barrier(topology: Topology) -> None:
    """Wait until every rank is here."""
    any_rank(False, topology)


def on_ascend() -> bool:
    """Whether this process computes on Ascend, where all collectives exist."""
    return ms.get_context("device_target") == "Ascend"


def memory_in_use() -> int:
    """Bytes: the most that the device has held so far, on a CPU what the process holds now."""
    return ms.runtime.max_memory_allocated() if on_ascend() else psutil.Process().memory_info().rss


def all_reduce(group: str, ranks: int) -> Callable[[Tensor], Tensor]:
    """What sums over the ranks of a group; where there is one alone, its value is the sum."""
    return ops.AllReduce(group=group) if ranks > 1 else nn.Identity()


def world_sum(topology: Topology) -> Callable[[Tensor], Tensor]:
    """What sums over all ranks of the run."""
    return all_reduce(topology.group, topology.ranks)


def among_zeros(x: Tensor, place: int, places: int) -> tuple[Tensor, ...]:
    """x at its place and zeros of its shape at the others: a sum over the ranks then holds the x of every place."""
    parts = ()
    for other in range(places):
        parts += (x if other == place else ops.zeros_like(x),)
    return parts


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
        self.rank, self.ranks = topology.shard_rank, topology.shards
        self.native = on_ascend() and self.ranks > 1
        self.collective = (ops.ReduceScatter(group=topology.data_group) if self.native else
                           all_reduce(topology.data_group, topology.data_parallel))

    def construct(self, gradient: Tensor) -> Tensor:
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
        self.native = self.ranks > 1 and (on_ascend() or topology.data_group == GlobalComm.WORLD_COMM_GROUP)
        self.collective = (ops.AllGather(group=topology.data_group) if self.native else
                           all_reduce(topology.data_group, self.ranks))

    def construct(self, shard: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.ranks == 1:
            return shard
        if not self.native:
            shard = ops.concat(among_zeros(shard, self.rank, self.ranks))
        size = 1
        for length in shape:
            size *= length
        return self.collective(shard)[:size].reshape(shape)


# ---- slices of a layer, over the ranks of tensor parallelism ----

class SumOfCopies(nn.Cell):
    """Sum the gradient of what several slices hold alike, each with the part that its own heads made of it.

    A slice cut along axis 0 -> the same shape, where the rows that `copies_of` counts as copies are sums over them.
    """

    def __init__(self, topology: Topology, cut: Slicing):
        super().__init__()
        self.own, copies = copies_of(cut, topology.tensor_parallel)  # rows that no other rank holds come first
        self.place, self.places = topology.tensor_rank // copies, topology.tensor_parallel // copies
        self.sum = all_reduce(topology.tensor_group, topology.tensor_parallel)

    def construct(self, gradient: Tensor) -> Tensor:
        shared = gradient[self.own:]
        rows = shared.shape[0]
        summed = self.sum(ops.concat(among_zeros(shared, self.place, self.places)))  # only copies add up
        return ops.concat((gradient[:self.own], summed[self.place * rows:(self.place + 1) * rows]))


class CopyToSlices(nn.Cell):
    """Before a column-parallel matrix: the same input for every slice; their gradients add up."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.sum = all_reduce(topology.tensor_group, topology.tensor_parallel)

    def construct(self, x: Tensor) -> Tensor:
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.sum(dout),)


class SumOfSlices(nn.Cell):
    """After a row-parallel matrix: the slices' outputs add up; the gradient is the same for every slice."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.sum = all_reduce(topology.tensor_group, topology.tensor_parallel)

    def construct(self, x: Tensor) -> Tensor:
        return self.sum(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (dout,)


class GatherSlices(nn.Cell):
    """Each rank's x (..., n) side by side: (..., n * ranks), without a gradient."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.rank, self.ranks = topology.tensor_rank, topology.tensor_parallel
        self.sum = all_reduce(topology.tensor_group, self.ranks)

    def construct(self, x: Tensor) -> Tensor:
        return x if self.ranks == 1 else self.sum(ops.concat(among_zeros(x, self.rank, self.ranks), -1))
