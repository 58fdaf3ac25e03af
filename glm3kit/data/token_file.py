"""The token file: ids and labels of all rows one after the other, memory-mapped.

A token file is a folder: `ids.bin` and `labels.bin` (int32), `offsets.bin` (int64, where each row begins, and the end),
`origins.bin` (int32, five numbers a row: see `Origins`), all little-endian, and `tokens.json` with format version,
digest and report. Rows are stored as long as they are and are padded when a batch is drawn (the way of nanoGPT's
`train.bin`).

    tokens = TokenFile.open("output/tokens/train-0123456789ab"); ids, labels = tokens[0]
"""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glm3kit.errors import DataError
from glm3kit.files import atomic_folder, atomic_write

FORMAT = 2
IGNORE_INDEX = -100  # a label that does not count in the loss
ADGEN, CONVERSATION = 0, 1  # kinds of rows
_TYPES = {"ids": np.dtype("<i4"), "labels": np.dtype("<i4"), "offsets": np.dtype("<i8"), "origins": np.dtype("<i4")}


class EncodedRows(NamedTuple):
    """Some rows, one after the other, on their way into a token file."""

    ids: np.ndarray  # int32 (N,)
    mask: np.ndarray  # (N,), not zero where the prediction made there counts; see `shift_labels`
    lengths: list[int]  # tokens of each row
    origins: list[tuple[int, int, int, int, int]]  # the fields of `Origins` of each row


class Origins(NamedTuple):
    """Where rows come from, and their lengths in tokens before cutting; int32 (rows,) each.

    source + target + 1 is the whole length: target counts what carries loss but for eos, source the rest.
    """

    file: np.ndarray  # from 0, as in report["files"]
    line: np.ndarray  # from 1
    kind: np.ndarray  # ADGEN or CONVERSATION
    source: np.ndarray
    target: np.ndarray


def shift_labels(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Labels of ids: the next id where the prediction counts, -100 elsewhere.

    ids: int32 (N,), one row or several; mask: (N,), not zero where the prediction made at that id counts. The last
    prediction of a row must not count: there is nothing to compare it with.
    """
    return np.where(mask, np.roll(ids, -1), IGNORE_INDEX).astype(np.int32)


def pad_row(ids: np.ndarray, labels: np.ndarray, length: int, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A row filled up to `length` with pad_id and -100."""
    room = (0, length - len(ids))
    return np.pad(ids, room, constant_values=pad_id), np.pad(labels, room, constant_values=IGNORE_INDEX)


class TokenFile:
    """Encoded rows on disk: `len(tokens)` rows, `tokens[i]` -> (ids, labels), int32 arrays without padding.

    digest: of the data files, the tokenizer and the settings that they were encoded with.
    report: what was read, kept, skipped and cut; see `encode_files`.
    lengths: tokens of each row, int64 (rows,); longest: the largest of them.
    origins: where the rows come from.
    """

    def __init__(self, folder: Path, digest: str, report: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.folder, self.digest, self.report = folder, digest, report
        self._ids, self._labels, self._offsets = arrays["ids"], arrays["labels"], arrays["offsets"]
        self.origins = Origins(*arrays["origins"].reshape(-1, len(Origins._fields)).T)
        self.lengths: np.ndarray = np.diff(self._offsets)
        self.longest = int(self.lengths.max())

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
        sizes, offsets = (len(arrays["ids"]), len(arrays["labels"]), len(arrays["origins"])), arrays["offsets"]
        if (len(offsets) < 2 or offsets[0] != 0 or np.any(np.diff(offsets) <= 0)
                or sizes != (offsets[-1], offsets[-1], len(Origins._fields) * (len(offsets) - 1))):
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


def _write_rows(folder: Path, batches: Iterable[EncodedRows]) -> int:
    """Write the arrays of some rows into `folder`; return how many ids they have."""
    end = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in _TYPES}

        def write(name: str, values: Any) -> None:
            files[name].write(np.asarray(values, _TYPES[name]).tobytes())

        write("offsets", [0])
        for ids, mask, lengths, origins in batches:
            write("ids", ids)
            write("labels", shift_labels(ids, mask))
            write("origins", origins)
            ends = end + np.cumsum(lengths)
            write("offsets", ends)
            end = int(ends[-1])
    return end


def write_token_file(destination: str | Path, digest: str, batches: Iterable[EncodedRows],
                     report: dict[str, Any]) -> TokenFile:
    """Open the token file at `destination`, written first unless it is there with this digest.

    It is written whole or not at all; memory holds one batch at a time.
    report: stored at the end, so that drawing the batches may fill it.
    Raises DataError if there are no rows.
    """
    destination = Path(destination)
    if has_digest(destination, digest):
        return TokenFile.open(destination)
    try:
        with atomic_folder(destination) as temporary:
            if not _write_rows(temporary, batches):
                raise DataError(f"no row to encode for {destination}: {report.get('rows_read', 0)} rows were read, "
                                "none of them usable; check the data files")
            header = {"format": FORMAT, "digest": digest, "report": report}
            atomic_write(temporary / "tokens.json", json.dumps(header, ensure_ascii=False, indent=1))
            if has_digest(destination, digest):  # whoever reads it shall not miss it for a moment
                raise FileExistsError(destination)
    except OSError:
        if not has_digest(destination, digest):  # else another process has finished the same work first
            raise
    return TokenFile.open(destination)
