"""Which share of each parameter a rank holds, and whole parameters from their shares.

Tensor parallelism cuts parameters into slices (https://arxiv.org/abs/1909.08053), optimizer parallelism cuts each slice
into shards (https://arxiv.org/abs/1910.02054); a rank's share is one shard of one slice. A layout says which rank holds
what, in the terms of MindSpore's strategy files (mindspore/parallel/_tensor.py); see strategy.py for those.

    Layout(devices=(2, 2), axes=((0,), ()), shards=2).holders()    # four ranks hold four shares of a matrix
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from math import prod

import numpy as np

from glm3kit.data.batches import prefetch
from glm3kit.errors import CheckpointError
from glm3kit.weights.slices import Slicing
from glm3kit.weights.tensors import BLOCK, Tensors, TensorSpec, cut, release

Share = tuple[tuple[int, ...], int]  # the number of a slice along each axis of its parameter, and of the shard of it
MAX_RANKS = 1 << 16
AHEAD = 8  # blocks of a tensor that are read before they are asked for


@dataclass(frozen=True)
class Layout:
    """Which share of a parameter each rank holds.

    devices: `dev_matrix`. axes: for each axis of the parameter the axes of `devices` that cut it, counted from the
        right, the slowest first; () where it is whole. Further axes of the parameter are whole.
    shards: into how many each slice is cut along its first axis, counted over the ranks that hold it; 1 for none.
    flattened: the shape of a slice whose shards are of its flattened values, padded with zeros; they are `step` ranks
        apart. segments, unit: as in `Slicing`, for the one axis that is cut.
    stage: the pipeline stage; its ranks follow those of the stages before.
    """

    devices: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    shards: int = 1
    segments: tuple[int, ...] = ()
    unit: int = 1
    flattened: tuple[int, ...] = ()
    step: int = 1
    stage: int = 0

    def __post_init__(self) -> None:
        cutting = [axis for axes in self.axes for axis in axes]
        if not self.devices or min(self.devices) < 1 or self.ranks > MAX_RANKS:
            raise ValueError(f"dev_matrix {list(self.devices)} is no layout of 1 to {MAX_RANKS} ranks")
        if len(set(cutting)) < len(cutting) or any(not 0 <= axis < len(self.devices) for axis in cutting):
            raise ValueError(f"tensor_map {self.axes} does not name axes of dev_matrix {list(self.devices)}, each once")
        copies = self.ranks // prod(self.counts())
        if self.shards < 1 or copies % self.shards:
            raise ValueError(f"{copies} ranks that hold the same slice cannot share it as {self.shards} shards")
        cuts = [count for count in self.counts() if count > 1]
        if self.segments and cuts:
            units = [length // self.unit for length in self.segments] if self.unit > 0 else [0]
            if len(cuts) > 1 or any(n < 1 or max(n, cuts[0]) % min(n, cuts[0]) for n in units):
                raise ValueError(f"segments {list(self.segments)} in units of {self.unit} cannot be cut into {cuts}")

    @property
    def ranks(self) -> int:
        """Ranks of a stage."""
        return prod(self.devices)

    def counts(self) -> tuple[int, ...]:
        """Into how many slices each axis of the parameter is cut."""
        return tuple(prod(self.devices[-1 - axis] for axis in axes) for axes in self.axes)

    def share(self, rank: int) -> Share:
        """Which share a rank of the stage holds: the number of its slice along each axis, and of its shard of that."""
        at = np.unravel_index(rank, self.devices)[::-1]  # counted from the right, as axes are

        def number(axes: Sequence[int]) -> int:
            """Counted over some axes of `devices`, the last the fastest."""
            sizes = [self.devices[-1 - axis] for axis in axes]
            return int(np.ravel_multi_index([at[axis] for axis in axes], sizes)) if axes else 0

        cutting = {axis for axes in self.axes for axis in axes}
        copy = number([axis for axis in reversed(range(len(self.devices))) if axis not in cutting])
        shard = rank // self.step if self.flattened else copy
        return tuple(map(number, self.axes)), shard % self.shards

    def holders(self) -> dict[Share, list[int]]:
        """The ranks of the job that hold each share, the shares in the order of their first rank."""
        result: dict[Share, list[int]] = {}
        for rank in range(self.ranks):
            result.setdefault(self.share(rank), []).append(self.stage * self.ranks + rank)
        return result

    def _slice_shape(self, share: tuple[int, ...]) -> tuple[int, ...]:
        if self.flattened:
            if share != (-(-prod(self.flattened) // self.shards),):
                raise ValueError(f"shares {list(share)} are no {self.shards} shards of {list(self.flattened)}")
            return self.flattened
        if self.shards == 1:
            return share
        if not share:
            raise ValueError(f"a scalar cannot be cut into {self.shards} shards")
        return share[0] * self.shards, *share[1:]

    def whole_shape(self, share: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the parameter, by that of a share; raises ValueError with the reason if it does not fit."""
        shape, counts = self._slice_shape(share), self.counts()
        if len(shape) < len(counts):
            raise ValueError(f"slices {list(shape)} have fewer axes than their layout, {len(counts)}")
        whole = [length * count for length, count in zip_longest(shape, counts, fillvalue=1)]
        if (axis := self._cut_axis()) is not None:
            whole[axis] = sum(self.segments)
            if shape[axis] != sum(end - first for first, end in self._ranges(axis, 0)):
                raise ValueError(f"slices {list(shape)} do not make {whole[axis]} along axis {axis}")
        return tuple(whole)

    def _cut_axis(self) -> int | None:
        """The axis that is cut in segments, None if none is."""
        return next((axis for axis, count in enumerate(self.counts()) if count > 1 and self.segments), None)

    def _ranges(self, axis: int, index: int) -> list[tuple[int, int]]:
        return Slicing(axis, self.segments, self.unit).ranges(index, self.counts()[axis])

    def _regions(self, indices: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[list[slice], list[slice]]]:
        """Where a slice of that shape goes, a segment at a time: (region of the slice, region of the whole)."""
        source = [slice(0, length) for length in shape]
        target = [slice(index * length, (index + 1) * length)
                  for index, length in zip_longest(indices, shape, fillvalue=0)]
        if (axis := self._cut_axis()) is None:
            yield source, target
            return
        position = 0
        for first, end in self._ranges(axis, indices[axis]):
            source[axis], target[axis] = slice(position, position + end - first), slice(first, end)
            yield source, target
            position += end - first

    def rows(self, shape: tuple[int, ...], read: Callable[[Share], np.ndarray], first: int, end: int) -> np.ndarray:
        """Rows `first` to `end` of the parameter of that shape, from its shares."""
        result = np.empty((end - first, *shape[1:]), read(((0,) * len(self.axes), 0)).dtype)
        for indices in product(*map(range, self.counts())):
            shards = [read((indices, shard)) for shard in range(self.shards)]
            if self.flattened:
                shards = [np.concatenate(shards)[:prod(self.flattened)].reshape(self.flattened)]
            slice_shape = sum(map(len, shards)), *shards[0].shape[1:]
            for (held, *source), (wanted, *target) in self._regions(indices, slice_shape):
                position = 0  # of the slice: where the shard begins
                offset = wanted.start - held.start  # from rows of the slice to those of the parameter
                for values in shards:
                    start = max(held.start, position, first - offset)
                    stop = min(held.stop, position + len(values), end - offset)
                    if start < stop:
                        result[(slice(start + offset - first, stop + offset - first), *target)] = values[
                            (slice(start - position, stop - position), *source)]
                    position += len(values)
        return result


def _put_together(ranks: Mapping[int, Tensors], layouts: Mapping[str, Layout], specs: Mapping[str, TensorSpec],
                  readers: Mapping[str, Mapping[Share, int]]) -> Tensors:
    """Whole parameters from the files of ranks, `readers` says which rank's for each share."""
    def rows(name: str, first: int, end: int) -> np.ndarray:
        return layouts[name].rows(specs[name].shape, lambda share: ranks[readers[name][share]][name], first, end)

    def held(name: str) -> list[np.ndarray]:
        return [ranks[rank][name] for rank in readers[name].values()]

    def read(name: str) -> np.ndarray:
        return held(name)[0] if len(readers[name]) == 1 else rows(name, 0, specs[name].shape[0])

    def blocks(name: str) -> Iterator[np.ndarray]:
        if len(readers[name]) == 1:
            yield from cut(read(name))
            return
        length = specs[name].shape[0]
        step = max(1, BLOCK * length // specs[name].nbytes)  # rows
        # Reading goes on while a writer waits for its disk.
        yield from prefetch(lambda first: rows(name, first, min(first + step, length)).reshape(-1),
                            range(0, length, step), AHEAD)
        for array in held(name):
            release(array)

    return Tensors(specs, read, blocks=blocks)


def whole_tensors(ranks: Mapping[int, Tensors], layouts: Mapping[str, Layout], source: str) -> Tensors:
    """The whole parameters whose shares the files of `ranks` hold, each put together when it is asked for.

    source: where the files are, for messages. A share that several ranks hold is read from the first that is there.
    Raises CheckpointError for shares that are missing or of shapes that do not fit, and for tensors without a layout.
    """
    stored = set().union(*ranks.values())
    if unknown := sorted(stored - set(layouts)):
        raise CheckpointError(f"{source}: the strategy file is of another run: it does not know {unknown[:3]}; name "
                              "that of the run that wrote the checkpoint")
    specs: dict[str, TensorSpec] = {}
    readers: dict[str, dict[Share, int]] = {}  # which rank's file a share is read from
    faults, missing = [], {}
    for name in (name for name in layouts if name in stored):
        readers[name] = {}
        for share, holders in layouts[name].holders().items():
            rank = next((rank for rank in holders if name in ranks.get(rank, ())), None)
            if rank is None:
                missing.setdefault(tuple(holders), []).append(name)
            else:
                readers[name][share] = rank
        found = [ranks[rank].specs[name] for rank in readers[name].values()]
        if not found:
            continue
        try:
            if any(spec != found[0] for spec in found):
                raise ValueError(f"shares {[[spec.dtype, *spec.shape] for spec in found]} differ")
            specs[name] = TensorSpec(found[0].dtype, layouts[name].whole_shape(found[0].shape))
        except ValueError as err:
            faults.append(f"'{name}': {err}")
    for holders, names in missing.items():
        faults.append(f"missing: rank {' or '.join(map(str, holders))}, for shares of {len(names)} parameters such as "
                      f"'{names[0]}'")
    if faults:
        raise CheckpointError(f"{source}: cannot be put together:\n  " + "\n  ".join(faults) +
                              "\ncopy the files of all ranks into one folder, with the strategy file of their run")
    return _put_together(ranks, layouts, specs, readers)
