"""The token file: ids and labels of all rows one after the other, memory-mapped, and the batches drawn from it.

A token file is a folder: `ids.bin` and `labels.bin` (int32), `offsets.bin` (int64, where each row begins, and the end),
all little-endian, and `tokens.json` with format version, digest and report. Rows are stored as long as they are and are
padded when a batch is drawn (the way of nanoGPT's `train.bin`).

    tokens = TokenFile.open("output/tokens/train-0123456789ab"); ids, labels = tokens[0]
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm3kit.errors import DataError
from glm3kit.files import atomic_write, sync

FORMAT = 1
IGNORE_INDEX = -100  # a label that does not count in the loss
_TYPES = {"ids": np.dtype("<i4"), "labels": np.dtype("<i4"), "offsets": np.dtype("<i8")}


def shift_labels(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Labels of ids: the next id where the prediction counts, -100 elsewhere.

    ids: int32 (N,), one row or several; mask: (N,), not zero where the prediction made at that id counts. The last
    prediction of a row must not count: there is nothing to compare it with.
    """
    return np.where(mask, np.roll(ids, -1), IGNORE_INDEX).astype(np.int32)


class TokenFile:
    """Encoded rows on disk: `len(tokens)` rows, `tokens[i]` -> (ids, labels), int32 arrays without padding.

    digest: of the data files, the tokenizer and the settings that they were encoded with.
    report: what was read, kept, skipped and cut; see `encode_files`.
    longest: tokens of the longest row.
    """

    def __init__(self, folder: Path, digest: str, report: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.folder, self.digest, self.report = folder, digest, report
        self._ids, self._labels, self._offsets = arrays["ids"], arrays["labels"], arrays["offsets"]
        self.longest = int(np.diff(self._offsets).max())

    @classmethod
    def open(cls, folder: str | Path) -> "TokenFile":
        """Map a token file into memory; DataError if it is missing, incomplete or of another format."""
        folder = Path(folder)
        advice = "encode the data again: python -m glm3kit data CONFIG"
        try:
            header = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
            version, digest, report = header["format"], header["digest"], header["report"]
            arrays = {name: np.memmap(folder / f"{name}.bin", dtype, mode="r") for name, dtype in _TYPES.items()}
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise DataError(f"{folder}: not a token file ({type(err).__name__}: {err}); {advice}") from err
        if version != FORMAT:
            raise DataError(f"{folder}: a token file of format {version}, expected {FORMAT}; {advice}")
        sizes, offsets = (len(arrays["ids"]), len(arrays["labels"])), arrays["offsets"]
        if len(offsets) < 2 or offsets[0] != 0 or np.any(np.diff(offsets) <= 0) or sizes != (offsets[-1], offsets[-1]):
            raise DataError(f"{folder}: damaged: {sizes[0]:,} ids and {sizes[1]:,} labels, the offsets end at "
                            f"{int(offsets[-1]):,}; {advice}")
        return cls(folder, digest, report, arrays)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        index = range(len(self))[index]  # IndexError past the end, negative ones from the end
        row = slice(self._offsets[index], self._offsets[index + 1])
        return np.asarray(self._ids[row]), np.asarray(self._labels[row])


def has_digest(folder: Path, digest: str) -> bool:
    """Whether `folder` is a whole token file with this digest."""
    try:
        return TokenFile.open(folder).digest == digest
    except DataError:
        return False


def _publish(temporary: Path, destination: Path, digest: str) -> None:
    """Give a finished folder its name; what stood there before is moved aside until then."""
    old = temporary.with_suffix(".old")
    if destination.exists() and not has_digest(destination, digest):
        os.rename(destination, old)
    try:
        os.rename(temporary, destination)
    except OSError:
        if not has_digest(destination, digest):  # else another process has finished the same work first
            raise
    sync(destination.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_token_file(
    destination: str | Path, digest: str, batches: Iterable[tuple[np.ndarray, np.ndarray, list[int]]],
    report: dict[str, Any]
) -> TokenFile:
    """Write a token file whole or not at all, and open it.

    batches: (ids, mask, lengths) of some rows each, the rows one after the other; see `shift_labels`.
    report: stored at the end, so that drawing the batches may fill it.
    Raises DataError if there are no rows.
    """
    destination = Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        lengths = [0]
        with open(temporary / "ids.bin", "wb") as ids_file, open(temporary / "labels.bin", "wb") as labels_file:
            for ids, mask, row_lengths in batches:
                ids_file.write(ids.astype(_TYPES["ids"]).tobytes())
                labels_file.write(shift_labels(ids, mask).astype(_TYPES["labels"]).tobytes())
                lengths += row_lengths
        if len(lengths) == 1:
            raise DataError(f"no row to encode for {destination}: {report.get('rows_read', 0)} rows were read, none of "
                            "them usable; check the data files")
        (temporary / "offsets.bin").write_bytes(np.cumsum(lengths, dtype=_TYPES["offsets"]).tobytes())
        for name in _TYPES:
            sync(temporary / f"{name}.bin")
        header = {"format": FORMAT, "digest": digest, "report": report}
        atomic_write(temporary / "tokens.json", json.dumps(header, ensure_ascii=False, indent=1))
        _publish(temporary, destination, digest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenFile.open(destination)


class Batches:
    """Batches of a token file: (input_ids, labels), int32 (batch_size, seq_length), padded with pad_id and -100.

    The rows of an epoch are a permutation seeded by (seed, epoch), cut into global batches of batch_size * ranks rows;
    rank r takes rows r * batch_size to (r + 1) * batch_size of each. So every rank has the same number of steps, the
    order does not depend on the number of ranks, and a position in the data is one number, the step.

    len(): steps of all epochs. start_step: where iteration begins, to resume.
    drop_last: leave the rows of an incomplete global batch out (others take their place in the next epoch); otherwise
        it is filled up with rows of padding whose labels are all -100.
    Raises DataError if a row is longer than seq_length, or the rows do not fill one global batch.
    Example: 10 rows, batch_size 2, 2 ranks -> 2 steps an epoch; with drop_last=False 3.
    """

    def __init__(
        self, tokens: TokenFile, batch_size: int, seq_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1,
        epochs: int = 1, shuffle: bool = True, drop_last: bool = True, start_step: int = 0, pad_id: int = 0
    ):
        assert 0 <= rank < ranks and batch_size > 0
        if tokens.longest > seq_length:
            raise DataError(
                f"{tokens.folder}: rows have up to {tokens.longest} tokens, but seq_length is {seq_length}; make "
                "max_source_length + max_target_length + 1 (or max_seq_length) in data equal to the model's seq_length "
                "and encode again")
        self.global_batch = batch_size * ranks  # rows
        self.steps_per_epoch = (math.floor if drop_last else math.ceil)(len(tokens) / self.global_batch)
        if not self.steps_per_epoch:
            raise DataError(
                f"{tokens.folder}: {len(tokens)} rows do not fill one batch of {batch_size} rows on each of {ranks} "
                f"devices ({self.global_batch} rows); lower train.batch_size or give more data")
        if not 0 <= start_step <= self.steps_per_epoch * epochs:
            raise DataError(f"{tokens.folder}: start_step is {start_step}, but {epochs} epochs have "
                            f"{self.steps_per_epoch * epochs} steps; raise train.epochs to train on")
        self.tokens, self.batch_size, self.seq_length, self.pad_id = tokens, batch_size, seq_length, pad_id
        self.seed, self.rank, self.epochs, self.shuffle, self.start_step = seed, rank, epochs, shuffle, start_step
        self._order_of: tuple[int, np.ndarray] | None = None  # the epoch that was drawn from last, and its order

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for step in range(self.start_step, len(self)):
            yield self.batch(step)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step from 0 belongs to."""
        return step // self.steps_per_epoch

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of is None or self._order_of[0] != epoch:
            rows = len(self.tokens)
            order = np.random.default_rng([self.seed, epoch]).permutation(rows) if self.shuffle else np.arange(rows)
            self._order_of = epoch, order
        return self._order_of[1]

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of this rank at a step from 0: input_ids and labels, (batch_size, seq_length)."""
        first = (step % self.steps_per_epoch) * self.global_batch + self.rank * self.batch_size
        rows = self._order(self.epoch_of(step))[first : first + self.batch_size]
        input_ids = np.full((self.batch_size, self.seq_length), self.pad_id, np.int32)
        labels = np.full((self.batch_size, self.seq_length), IGNORE_INDEX, np.int32)
        for i, row in enumerate(rows):
            ids, row_labels = self.tokens[int(row)]
            input_ids[i, : len(ids)], labels[i, : len(ids)] = ids, row_labels
        return input_ids, labels
