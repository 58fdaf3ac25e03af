"""Training rows to input_ids and labels, one at a time or whole files at once into a token file.

Two forms of rows, also mixed in one file of JSON lines or a JSON array: ADGEN's (a source and a target text) and
conversations. Knowledge: MindFormers 1.1's ADGEN and multi-turn data sets, whose values these are element by element.

    python -m glm3kit data configs/tiny.yaml
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm

from glm3kit.config import DataConfig, RunConfig
from glm3kit.errors import ConfigError, DataError, PromptError
from glm3kit.prompt import conversation_ids, conversation_messages
from glm3kit.token_file import FORMAT, IGNORE_INDEX, Batches, TokenFile, has_digest, shift_labels, write_token_file
from glm3kit.tokenizer import ChatGLM3Tokenizer, check_text

__all__ = ["IGNORE_INDEX", "Batches", "TokenFile", "encode_adgen", "encode_conversation", "encode_files",
           "prepare_data", "read_rows"]

ROWS_AT_ONCE = 512  # rows handed to SentencePiece's threads together
_SPACE = re.compile(r"[ \t\r\n]*")

Encoded = tuple[list[np.ndarray], bytes]  # ids of a row, in pieces, and for each 1 if the prediction made there counts
Batch = tuple[np.ndarray, np.ndarray, list[int]]  # ids and mask of some rows, one after the other, and their lengths


def _texts(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Source and target of an ADGEN row; DataError for a missing, blank or other value."""
    texts = []
    for column in columns:
        if column not in row:
            raise DataError(f"column {column!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}")
        value = row[column]
        if not isinstance(value, str):
            raise DataError(f"column {column!r} is {type(value).__name__} {str(value)[:40]!r}, expected a text")
        if not value.strip():
            raise DataError(f"column {column!r} is blank; fill it or remove the row")
        check_text(value)
        texts.append(value)
    return texts


class _Join:
    """Puts an ADGEN row together from its texts' ids: `[gMASK] sop` and source, target, eos; the texts are cut."""

    def __init__(self, tok: ChatGLM3Tokenizer, max_source_length: int, max_target_length: int):
        self.prefix = np.array(tok.prefix_ids[:max_source_length], np.int32)
        self.eos = np.array([tok.eos_id], np.int32)
        self.limits = max_source_length - len(self.prefix), max_target_length

    def __call__(self, source: np.ndarray, target: np.ndarray) -> Encoded:
        source, target = source[: self.limits[0]], target[: self.limits[1]]
        # The last id of the source predicts the target's first one, the target's last one predicts eos.
        mask = bytes(len(self.prefix) + len(source) - 1) + b"\1" * (len(target) + 1) + b"\0"
        return [self.prefix, source, target, self.eos], mask


def _cut(ids: list[int], mask: list[int], seq_length: int) -> Encoded:
    """A conversation cut to the window."""
    if len(ids) > seq_length:
        ids, mask = ids[:seq_length], [*mask[: seq_length - 1], 0]  # what the last one predicts is cut off
    return [np.array(ids, np.int32)], bytes(mask)


def _padded(row: Encoded, seq_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = np.concatenate(row[0]), np.frombuffer(row[1], np.uint8)
    room = (0, seq_length - len(ids))
    return (np.pad(ids, room, constant_values=pad_id),
            np.pad(shift_labels(ids, mask), room, constant_values=IGNORE_INDEX))


def encode_adgen(
    row: Mapping[str, Any], tok: ChatGLM3Tokenizer, max_source_length: int, max_target_length: int,
    origin_columns: tuple[str, str] = ("content", "summary")
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a row of a source and a target text as MindFormers does.

    Returns input_ids and labels, int32 (max_source_length + max_target_length + 1,): source, target, eos, padding; the
    labels are shifted by one and -100 outside of target and eos. max_source_length includes `[gMASK] sop`.
    Raises DataError for a column that is missing, blank or no text.
    Example: encode_adgen({"content": "类型#裙", "summary": "好看的裙子"}, tok, 64, 127)
    """
    source, target = tok.encode_batch(_texts(row, origin_columns))
    encoded = _Join(tok, max_source_length, max_target_length)(source, target)
    return _padded(encoded, max_source_length + max_target_length + 1, tok.pad_id)


def encode_conversation(
    record: Mapping[str, Any], tok: ChatGLM3Tokenizer, max_seq_length: int, tools_indent: int | None = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a conversation: the answers' predictions count in the loss, up to max_seq_length tokens.

    record: see `prompt.conversation_messages`. tools_indent: 4 as in the chat prompt, None as in MindFormers.
    Returns input_ids and labels, int32 (max_seq_length,), labels shifted by one; all are -100 if no answer begins in
    the first max_seq_length tokens.
    Raises PromptError for a malformed record.
    """
    return _padded(_cut(*conversation_ids(record, tok, tools_indent), max_seq_length), max_seq_length, tok.pad_id)


def _read_array(text: str, path: Path) -> Iterator[tuple[int, int, Any]]:
    """Items of a JSON array with line and size; an error in its syntax ends it, what follows could be anything."""
    position, line, seen = _SPACE.match(text, text.index("[") + 1).end(), 1, 0
    while text[position : position + 1] != "]":
        line, seen = line + text.count("\n", seen, position), position
        try:
            item, end = json.JSONDecoder().raw_decode(text, position)
        except (ValueError, RecursionError) as err:
            raise DataError(f"{path}:{line}: not JSON ({getattr(err, 'msg', err)}); expected the items of an array of "
                            "rows; correct the file") from err
        yield line, end - position, item
        position = _SPACE.match(text, end).end()
        if text[position : position + 1] == ",":
            position = _SPACE.match(text, position + 1).end()
        elif text[position : position + 1] != "]":
            line += text.count("\n", seen, position)
            raise DataError(f"{path}:{line}: expected ',' or ']' after a row of the array, got "
                            f"{text[position : position + 20]!r}; correct the file")
    if text[position + 1 :].strip():
        raise DataError(f"{path}: there is more after the end of the JSON array; put all rows into it")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as err:
        raise DataError(f"{path}: the data file cannot be read ({err.strerror}); correct data.train_path or "
                        "data.eval_path") from err


def _read_items(path: Path) -> Iterator[tuple[int, int, Any]]:
    """(line, size, item) of a file of JSON lines or of one JSON array.

    size: bytes, or characters of an array. item: a DataError for a line that is no JSON.
    """
    with _open(path) as file:
        start = True
        for number, line in enumerate(file, 1):
            if start and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                try:
                    text = path.read_text(encoding="utf-8-sig")
                except UnicodeDecodeError as err:
                    raise DataError(f"{path}: not UTF-8 ({err}); save the file as UTF-8") from err
                yield from _read_array(text, path)
                return
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            try:
                item = json.loads(line.decode("utf-8-sig" if start else "utf-8"))
            except (ValueError, RecursionError) as err:
                fault = f"{err.msg}, column {err.colno}" if isinstance(err, json.JSONDecodeError) else str(err)
                item = DataError(f"not JSON ({fault}): {line[:40].decode('utf-8', 'replace')!r}")
            start = False
            yield number, len(line), item


def _is_adgen(item: Any, columns: tuple[str, str]) -> bool:
    """Whether a row is ADGEN's (True) or a conversation (False); DataError for what is no row."""
    if isinstance(item, DataError):
        raise item
    if not isinstance(item, dict):
        raise DataError(f"expected an object, got {type(item).__name__} {str(item)[:40]!r}")
    source, target = columns
    if source in item and target in item:
        return True
    if "conversations" in item:
        return False
    if source in item or target in item:
        return True  # its other column is missing, which is said where the texts are taken
    raise DataError(f"the row has {', '.join(map(repr, item)) or 'no columns'}, expected {source!r} and {target!r} "
                    "(data.origin_columns) or 'conversations'")


def _refuse(path: Path, line: int, err: DataError | PromptError) -> DataError:
    return DataError(f"{path}:{line}: {err} (data.skip_bad=true skips such rows and counts them)")


def read_rows(paths: Sequence[str | Path], data: DataConfig) -> Iterator[dict[str, Any]]:
    """Rows of data files as they stand there, each checked: ADGEN rows and conversations.

    Raises DataError with file and line for a bad row, or leaves it out if data.skip_bad.
    """
    for path in map(Path, paths):
        for line, _, item in _read_items(path):
            try:
                if _is_adgen(item, data.origin_columns):
                    _texts(item, data.origin_columns)
                else:
                    conversation_messages(item)
            except (DataError, PromptError) as err:
                if not data.skip_bad:
                    raise _refuse(path, line, err) from err
                continue
            yield item


def _spread(lengths: list[int]) -> dict[str, float]:
    """Mean, median, percentiles and maximum of some lengths in tokens."""
    p50, p95, p99 = np.percentile(lengths, [50, 95, 99])
    return {"mean": round(float(np.mean(lengths)), 1), "p50": float(p50), "p95": float(p95), "p99": float(p99),
            "max": max(lengths)}


class _Encoding:
    """The encoding of some files: batches of encoded rows, and the report that fills up while they are drawn."""

    def __init__(self, paths: list[Path], tok: ChatGLM3Tokenizer, data: DataConfig, seq_length: int):
        self.paths, self.tok, self.data, self.seq_length = paths, tok, data, seq_length
        self.join = _Join(tok, data.max_source_length, data.max_target_length)
        self.lengths: dict[str, list[int]] = {"source": [], "target": [], "conversation": []}  # before cutting
        self.report: dict[str, Any] = {
            "files": [path.name for path in paths], "seq_length": seq_length, "rows_read": 0, "rows_kept": 0,
            "rows_skipped": 0, "skipped": [], "adgen_rows": 0, "conversations": 0, "cut_sources": 0, "cut_answers": 0,
            "cut_conversations": 0, "tokens": 0, "answer_tokens": 0}

    def _prepare(self, item: Any) -> list[str] | Encoded:
        """Texts of an ADGEN row, to be encoded with those of others; or a conversation, encoded."""
        data = self.data
        if _is_adgen(item, data.origin_columns):
            if data.max_source_length + data.max_target_length + 1 > self.seq_length:  # no fault of this row
                raise ConfigError(f"data.{data.row_rule} tokens, more than seq_length {self.seq_length}; lower the "
                                  "lengths in data or raise seq_length")
            return _texts(item, data.origin_columns)
        ids, mask = conversation_ids(item, self.tok, data.tools_indent)
        encoded = _cut(ids, mask, self.seq_length)
        if 1 not in encoded[1]:
            raise DataError(f"no answer to learn in the first {self.seq_length} of {len(ids)} tokens; raise "
                            "max_seq_length, or shorten or remove the row")
        self.lengths["conversation"].append(len(ids))
        self.report["cut_conversations"] += len(ids) > self.seq_length
        return encoded

    def _rows(self, progress: bool) -> Iterator[list[list[str] | Encoded]]:
        """Rows of all files, some at a time, checked and ready to encode."""
        for path in self.paths:
            items, size = _read_items(path), path.stat().st_size
            with tqdm(total=size, desc=f"encode {path.name}", unit="B", unit_scale=True, disable=not progress) as bar:
                while some := list(islice(items, ROWS_AT_ONCE)):
                    self.report["rows_read"] += len(some)
                    rows = []
                    for line, _, item in some:
                        try:
                            rows.append(self._prepare(item))
                        except (DataError, PromptError) as err:
                            if not self.data.skip_bad:
                                raise _refuse(path, line, err) from err
                            self.report["skipped"].append({"file": path.name, "line": line, "reason": str(err)})
                    yield rows
                    bar.update(sum(size for _, size, _ in some))
                bar.update(size - bar.n)

    def _join_rows(self, rows: list[list[str] | Encoded], ids_of_texts: list[np.ndarray]) -> Batch:
        """Ids, mask and lengths of rows, one after the other."""
        ids, masks = [], []
        texts = iter(ids_of_texts)
        for row in rows:
            if isinstance(row, list):
                source, target = next(texts), next(texts)
                self.lengths["source"].append(len(source) + len(self.tok.prefix_ids))
                self.lengths["target"].append(len(target))
                row = self.join(source, target)
            ids += row[0]
            masks.append(row[1])
        mask = np.frombuffer(b"".join(masks), np.uint8)
        self.report["tokens"] += len(mask)
        self.report["answer_tokens"] += int(mask.sum())
        return np.concatenate(ids), mask, [len(mask) for mask in masks]

    def batches(self, progress: bool) -> Iterator[Batch]:
        """Encode the files batch by batch; the report is complete when all are drawn."""
        waiting = None
        with ThreadPoolExecutor(1) as pool:  # SentencePiece works on the next rows while Python joins the last ones
            for rows in self._rows(progress):
                texts = [text for row in rows if isinstance(row, list) for text in row]
                encoding = pool.submit(self.tok.encode_batch, texts)
                if waiting:
                    yield self._join_rows(waiting[0], waiting[1].result())
                waiting = (rows, encoding) if rows else None
            if waiting:
                yield self._join_rows(waiting[0], waiting[1].result())
        self._complete()

    def _complete(self) -> None:
        report, (source, target, conversation) = self.report, self.lengths.values()
        report["adgen_rows"], report["conversations"] = len(source), len(conversation)
        report["rows_kept"] = len(source) + len(conversation)
        report["rows_skipped"] = len(report["skipped"])
        report["cut_sources"] = sum(length > self.data.max_source_length for length in source)
        report["cut_answers"] = sum(length > self.data.max_target_length for length in target)
        report["lengths"] = {name: _spread(lengths) for name, lengths in self.lengths.items() if lengths}


def _digest(paths: list[Path], tok: ChatGLM3Tokenizer, data: DataConfig, seq_length: int) -> str:
    """SHA-256 of everything that encoded rows depend on."""
    contents = []
    for path in paths:
        digest = hashlib.sha256()
        with _open(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        contents.append(digest.hexdigest())
    settings = data.model_dump(mode="json", exclude={"train_path", "eval_path", "max_seq_length"})
    all_ = {"format": FORMAT, "files": contents, "tokenizer": tok.digest, "seq_length": seq_length, **settings}
    return hashlib.sha256(json.dumps(all_, sort_keys=True).encode()).hexdigest()


def encode_files(
    paths: Sequence[str | Path], tok: ChatGLM3Tokenizer, data: DataConfig, seq_length: int, destination: str | Path,
    progress: bool = True
) -> TokenFile:
    """Encode data files into one token file at `destination`, or use the one there if nothing has changed.

    data: columns, lengths and what to do with bad rows; its own paths do not matter here.
    seq_length: tokens; a longer conversation is cut.
    The report of the token file counts rows read, kept, skipped (with file, line and reason) and cut, tokens and tokens
    of answers, and describes the lengths before cutting: "source" (with `[gMASK] sop`), "target" (without eos),
    "conversation".
    Raises DataError with file and line for a line that is no JSON, a row that is neither form, a missing or blank
    column, a malformed conversation, or one without an answer in its first seq_length tokens; with data.skip_bad such
    rows are skipped and counted.
    """
    paths = [Path(path) for path in paths]
    digest = _digest(paths, tok, data, seq_length)
    if has_digest(Path(destination), digest):
        return TokenFile.open(destination)
    encoding = _Encoding(paths, tok, data, seq_length)
    return write_token_file(destination, digest, encoding.batches(progress), encoding.report)


def prepare_data(config: RunConfig, progress: bool = True) -> dict[str, TokenFile]:
    """Encode the data of a run; returns "train" and "eval" as far as the configuration names files for them.

    The token files lie under `output_dir/tokens` and are named by what they depend on, so runs share them.
    Raises DataError if there are no files, no tokenizer, or a row is bad.
    """
    if config.model.tokenizer_path is None:
        raise DataError("model.tokenizer_path is not set; give the tokenizer.model published with ChatGLM3-6B")
    named = {"train": config.data.train_path, "eval": config.data.eval_path}
    if not any(named.values()):
        raise DataError("data.train_path and data.eval_path name no files; give one, or a list of files, to encode")
    tok, seq_length = ChatGLM3Tokenizer(config.model.tokenizer_path), config.model.seq_length
    folder = Path(config.output_dir) / "tokens"
    token_files = {}
    for name, paths in named.items():
        if paths:
            digest = _digest([Path(path) for path in paths], tok, config.data, seq_length)
            token_files[name] = encode_files(
                paths, tok, config.data, seq_length, folder / f"{name}-{digest[:12]}", progress)
    return token_files
