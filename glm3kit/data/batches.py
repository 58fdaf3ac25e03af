"""Batches of a token file: shuffled, shared out among the ranks, packed or padded, drawn ahead of their use.

    for input_ids, labels in Batches(TokenFile.open(folder), batch_size=4, seq_length=192): ...
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np

from glm3kit.data.token_file import IGNORE_INDEX, TokenFile
from glm3kit.errors import DataError


def prefetch(draw: Callable[[Any], Any], steps: Iterable[Any], ahead: int = 2) -> Iterator[Any]:
    """draw(step) for each step, in order, by a thread that works `ahead` steps before they are asked for.

    An error in `draw` is raised where its result is asked for. The thread ends with the iterator, also if that is
    closed or thrown away before its end.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="glm3kit-batches")
    try:
        waiting: deque[Future] = deque()
        for step in steps:
            waiting.append(pool.submit(draw, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def pack_rows(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Share rows out among packs of at most `capacity` tokens: the longest first, each where it fits best.

    Best-fit decreasing needs at most 11/9 of the fewest packs possible, and one more (Johnson, 1973).
    lengths: tokens of each row, none longer than capacity. Returns the row numbers of each pack.
    Example: pack_rows([3, 5, 2], 5) -> [[1], [0, 2]]
    """
    lengths = np.asarray(lengths)
    assert lengths.max(initial=0) <= capacity
    packs: list[list[int]] = []
    rooms: list[int] = []  # free tokens of packs that are not full, rising
    open_packs: list[list[int]] = []  # these packs, in the same order
    for row in np.argsort(-lengths, kind="stable").tolist():
        at = bisect_left(rooms, lengths[row])
        if at == len(rooms):
            room, pack = capacity, []
            packs.append(pack)
        else:
            room, pack = rooms.pop(at), open_packs.pop(at)
        pack.append(row)
        room -= int(lengths[row])
        if room:
            at = bisect_left(rooms, room)
            rooms.insert(at, room)
            open_packs.insert(at, pack)
    return packs


class Batches:
    """Batches of a token file: (input_ids, labels), int32 (batch_size, length), padded with pad_id and -100.

    The rows of an epoch are a permutation seeded by (seed, epoch), cut into global batches of batch_size * ranks rows;
    rank r takes rows r * batch_size to (r + 1) * batch_size of each. So every rank has the same number of steps, the
    order does not depend on the number of ranks, and a position in the data is one number, the step.

    len(): steps of all epochs. start_step: where iteration begins, to resume. Iterating draws ahead (see `prefetch`).
    drop_last: leave the rows of an incomplete global batch out (others take their place in the next epoch); otherwise
        it is filled up with rows of padding whose labels are all -100.
    bucket_lengths: tokens; a global batch is padded to the first of these, then seq_length, that its longest row fits
        into. All ranks see the same length, and a graph is compiled once for each.
    packing: put several rows into one, as `pack_rows` does; the packs stay, their order changes. A batch then has
        segment_ids too, int32 as the others: 1 and up for the rows in each row, 0 for padding.
    Raises DataError if a row is longer than seq_length, or the rows do not fill one global batch.
    Example: 10 rows, batch_size 2, 2 ranks -> 2 steps an epoch; with drop_last=False 3.
    """

    def __init__(self, tokens: TokenFile, batch_size: int, seq_length: int, *, seed: int = 0, rank: int = 0,
                 ranks: int = 1, epochs: int = 1, shuffle: bool = True, drop_last: bool = True, start_step: int = 0,
                 pad_id: int = 0, bucket_lengths: Sequence[int] = (), packing: bool = False):
        assert 0 <= rank < ranks and batch_size > 0
        if tokens.longest > seq_length:
            raise DataError(f"{tokens.folder}: rows have up to {tokens.longest} tokens, but seq_length is "
                            f"{seq_length}; make max_source_length + max_target_length + 1 (or max_seq_length) in data "
                            "equal to the model's seq_length and encode again")
        self.packs = pack_rows(tokens.lengths, seq_length) if packing else None
        # Tokens of what stands in one row of a batch.
        self.sizes = np.array([tokens.lengths[pack].sum() for pack in self.packs]) if self.packs else tokens.lengths
        self.global_batch = batch_size * ranks  # rows
        steps = len(self.sizes) / self.global_batch
        self.steps_per_epoch = math.floor(steps) if drop_last else math.ceil(steps)
        if not self.steps_per_epoch:
            kind = "packed rows" if packing else "rows"
            raise DataError(f"{tokens.folder}: {len(self.sizes)} {kind} do not fill one batch of {batch_size} rows on "
                            f"each of {ranks} devices ({self.global_batch} rows); lower train.batch_size or give more "
                            "data")
        if not 0 <= start_step <= self.steps_per_epoch * epochs:
            raise DataError(f"{tokens.folder}: start_step is {start_step}, but {epochs} epochs have "
                            f"{self.steps_per_epoch * epochs} steps; raise train.epochs to train on")
        self.tokens, self.batch_size, self.seq_length, self.pad_id = tokens, batch_size, seq_length, pad_id
        self.seed, self.rank, self.epochs, self.shuffle, self.start_step = seed, rank, epochs, shuffle, start_step
        self.lengths = np.array([*sorted(n for n in bucket_lengths if n < seq_length), seq_length])
        self._order = lru_cache(maxsize=1)(self._draw_order)  # of the epoch that was drawn from last

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        return prefetch(self.batch, range(self.start_step, len(self)))

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step from 0 belongs to."""
        return step // self.steps_per_epoch

    def _draw_order(self, epoch: int) -> np.ndarray:
        rows = len(self.sizes)
        return np.random.default_rng([self.seed, epoch]).permutation(rows) if self.shuffle else np.arange(rows)

    def batch(self, step: int) -> tuple[np.ndarray, ...]:
        """The batch of this rank at a step from 0: input_ids, labels and, if packed, segment_ids."""
        first = (step % self.steps_per_epoch) * self.global_batch
        drawn = self._order(self.epoch_of(step))[first:first + self.global_batch]  # by all ranks
        length = self.lengths[np.searchsorted(self.lengths, self.sizes[drawn].max())]
        shape = self.batch_size, length
        input_ids = np.full(shape, self.pad_id, np.int32)
        labels, segment_ids = np.full(shape, IGNORE_INDEX, np.int32), np.zeros(shape, np.int32)
        for i, number in enumerate(drawn[self.rank * self.batch_size:(self.rank + 1) * self.batch_size]):
            start = 0
            for segment, row in enumerate(self.packs[number] if self.packs else [int(number)], 1):
                ids, row_labels = self.tokens[row]
                end = start + len(ids)
                input_ids[i, start:end], labels[i, start:end], segment_ids[i, start:end] = ids, row_labels, segment
                start = end
        return (input_ids, labels, segment_ids) if self.packs else (input_ids, labels)
