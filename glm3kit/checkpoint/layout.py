"""Which piece of each parameter a rank holds, and whole parameters from their pieces.

Tensor parallelism cuts parameters into slices (https://arxiv.org/abs/1909.08053), optimizer parallelism cuts each slice
into shards (https://arxiv.org/abs/1910.02054). A layout says which rank holds what, in the terms of MindSpore's
strategy files (mindspore/parallel/_tensor.py); see strategy.py for those.

    Layout(devices=(2, 2), axes=((0,), ()), shards=2).holders()    # four ranks hold four pieces of a matrix
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product, zip_longest
from math import prod
from typing import TypeVar

import numpy as np

from glm3kit.errors import CheckpointError
from glm3kit.weights.slices import Slicing
from glm3kit.weights.tensors import BLOCK, Tensors, TensorSpec, cut, release

Region = tuple[slice, ...]
Piece = tuple[tuple[int, ...], int]  # the number of a slice along each axis of its parameter, the number of a shard
MAX_RANKS = 1 << 16
AHEAD = 8  # pieces of a tensor that are read before they are asked for
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Which piece of a parameter each rank holds.

    devices: `dev_matrix`. axes: for each axis of the parameter the axes of `devices` that cut it, counted from the
        right, the slowest first; () where it is whole. Further axes of the parameter are whole.
    shards: pieces of each slice along its first axis, counted over the ranks that hold it; 1 for none.
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

    def piece(self, rank: int) -> Piece:
        """Which piece a rank of the stage holds: the number of its slice along each axis, and its shard of that."""
        coordinates, rest = [0] * len(self.devices), rank
        for axis in reversed(range(len(self.devices))):
            rest, coordinates[axis] = divmod(rest, self.devices[axis])
        cutting = {len(self.devices) - 1 - axis for axes in self.axes for axis in axes}
        copy = 0  # which of the ranks that hold the same slice
        for axis in sorted(set(range(len(self.devices))) - cutting):
            copy = copy * self.devices[axis] + coordinates[axis]
        indices = []
        for axes in self.axes:
            index = 0
            for axis in axes:
                index = index * self.devices[-1 - axis] + coordinates[-1 - axis]
            indices.append(index)
        return tuple(indices), (rank // self.step if self.flattened else copy) % self.shards

    def holders(self) -> dict[Piece, list[int]]:
        """The ranks of the job that hold each piece, the pieces in the order of their first rank."""
        result: dict[Piece, list[int]] = {}
        for rank in range(self.ranks):
            result.setdefault(self.piece(rank), []).append(self.stage * self.ranks + rank)
        return result

    def slice_shape(self, piece: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a slice, by that of a piece. Raises ValueError with the reason if the piece does not fit."""
        if self.flattened:
            if piece != (-(-prod(self.flattened) // self.shards),):
                raise ValueError(f"pieces {list(piece)} are no {self.shards} shards of {list(self.flattened)}")
            return self.flattened
        if self.shards == 1:
            return piece
        if not piece:
            raise ValueError(f"a scalar cannot be cut into {self.shards} shards")
        return piece[0] * self.shards, *piece[1:]

    def whole_shape(self, piece: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the parameter, by that of a piece. Raises ValueError as `slice_shape` does."""
        shape, counts = self.slice_shape(piece), self.counts()
        if len(shape) < len(counts):
            raise ValueError(f"slices {list(shape)} have fewer axes than their layout, {len(counts)}")
        whole = [length * count for length, count in zip_longest(shape, counts, fillvalue=1)]
        if self.segments and (axis := self._cut_axis()) is not None:
            whole[axis] = sum(self.segments)
            if shape[axis] != sum(end - first for first, end in self._ranges(axis, 0)):
                raise ValueError(f"slices {list(shape)} do not make {whole[axis]} along axis {axis}")
        return tuple(whole)

    def _cut_axis(self) -> int | None:
        return next((axis for axis, count in enumerate(self.counts()) if count > 1), None)

    def _ranges(self, axis: int, index: int) -> list[tuple[int, int]]:
        return Slicing(axis, self.segments, self.unit).ranges(index, self.counts()[axis])

    def _places(self, indices: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[Region, Region]]:
        """Where a slice of that shape goes, a segment at a time: (region of the slice, region of the whole)."""
        source = tuple(slice(0, length) for length in shape)
        target = tuple(slice(index * length, (index + 1) * length)
                       for index, length in zip_longest(indices, shape, fillvalue=0))
        axis = self._cut_axis() if self.segments else None
        if axis is None:
            yield source, target
            return
        position = 0
        for first, end in self._ranges(axis, indices[axis]):
            yield ((*source[:axis], slice(position, position + end - first), *source[axis + 1:]),
                   (*target[:axis], slice(first, end), *target[axis + 1:]))
            position += end - first

    def _blocks(self, read: Callable[[Piece], np.ndarray]) -> Iterator[tuple[int, Region, np.ndarray]]:
        """Blocks of values that lie together in the parameter: (first row, region along the other axes, values)."""
        for indices in product(*map(range, self.counts())):
            pieces = [read((indices, shard)) for shard in range(self.shards)]
            if self.flattened:
                pieces = [np.concatenate(pieces)[:prod(self.flattened)].reshape(self.flattened)]
            shape = (sum(map(len, pieces)), *pieces[0].shape[1:])
            for (rows, *source), (target, *across) in self._places(indices, shape):
                position = 0
                for values in pieces:
                    start, stop = max(rows.start, position), min(rows.stop, position + len(values))
                    if start < stop:
                        block = values[(slice(start - position, stop - position), *source)]
                        yield target.start + start - rows.start, tuple(across), block
                    position += len(values)

    def rows(self, shape: tuple[int, ...], read: Callable[[Piece], np.ndarray], first: int, end: int) -> np.ndarray:
        """Rows `first` to `end` of the parameter of that shape, from its pieces."""
        result = None
        for row, across, values in self._blocks(read):
            if result is None:
                result = np.empty((end - first, *shape[1:]), values.dtype)
            start, stop = max(row, first), min(row + len(values), end)
            if start < stop:
                result[(slice(start - first, stop - first), *across)] = values[start - row:stop - row]
        assert result is not None, "every layout has a slice"
        return result

    def whole(self, shape: tuple[int, ...], read: Callable[[Piece], np.ndarray]) -> np.ndarray:
        """The parameter of that shape from its pieces; the piece itself where it is the only one."""
        if self._cut_axis() is None and self.shards == 1:
            return read(((0,) * len(self.axes), 0))
        return self.rows(shape, read, 0, shape[0])


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, some of them made beside their use: reading goes on while a writer waits for its disk."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        waiting = deque(pool.submit(next, items, None) for _ in range(AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item


def whole_tensors(ranks: Mapping[int, Tensors], layouts: Mapping[str, Layout], source: str) -> Tensors:
    """The whole parameters whose pieces the files of `ranks` hold, each put together when it is asked for.

    source: where the files are, for messages. A piece that several ranks hold is read from the first that is there.
    Raises CheckpointError for pieces that are missing or of shapes that do not fit, and for tensors without a layout.
    """
    held = set().union(*(tensors.specs for tensors in ranks.values()))
    if unknown := sorted(held - set(layouts)):
        raise CheckpointError(f"{source}: the strategy file is of another run: it does not know {unknown[:3]}; name "
                              "that of the run that wrote the checkpoint")
    specs: dict[str, TensorSpec] = {}
    places: dict[str, dict[Piece, int]] = {}  # piece -> rank
    faults, missing = [], {}
    for name in (name for name in layouts if name in held):
        layout, found = layouts[name], {}
        for piece, holders in layout.holders().items():
            rank = next((rank for rank in holders if rank in ranks and name in ranks[rank].specs), None)
            if rank is None:
                missing.setdefault(tuple(holders), []).append(name)
            else:
                found[piece] = rank
        pieces = [ranks[rank].specs[name] for rank in found.values()]
        try:
            if any(piece != pieces[0] for piece in pieces):
                raise ValueError(f"pieces {[[piece.dtype, *piece.shape] for piece in pieces]} differ")
            specs[name] = TensorSpec(pieces[0].dtype, layout.whole_shape(pieces[0].shape))
        except ValueError as err:
            faults.append(f"'{name}': {err}")
        places[name] = found
    for holders, names in missing.items():
        faults.append(f"missing: rank {' or '.join(map(str, holders))}, for pieces of {len(names)} parameters such as "
                      f"'{names[0]}'")
    if faults:
        raise CheckpointError(f"{source}: cannot be put together:\n  " + "\n  ".join(faults) +
                              "\ncopy the files of all ranks into one folder, with the strategy file of their run")

    def reader(name: str) -> Callable[[Piece], np.ndarray]:
        return lambda piece: ranks[places[name][piece]][name]

    def read(name: str) -> np.ndarray:
        return layouts[name].whole(specs[name].shape, reader(name))

    def blocks(name: str) -> Iterator[np.ndarray]:
        shape, held = specs[name].shape, [ranks[rank][name] for rank in places[name].values()]
        if len(held) == 1:
            yield from cut(held[0])
        else:
            step = max(1, BLOCK * shape[0] // specs[name].nbytes)  # rows
            for first in range(0, shape[0], step):
                yield layouts[name].rows(shape, reader(name), first, min(first + step, shape[0])).reshape(-1)
        for array in held:
            release(array)

    return Tensors(specs, read, blocks=lambda name: _ahead(blocks(name)))
