"""Training rows to input_ids and labels, one at a time or whole files at once into a token file.

Knowledge: MindFormers 1.1's ADGEN and multi-turn data sets, whose values these are element by element.

    python -m glm3kit data configs/tiny.yaml
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from glm3kit.config.groups import DataConfig, RunConfig
from glm3kit.data.batches import prefetch
from glm3kit.data.rows import ENCODINGS, file_encoding, is_adgen, open_data, row_texts, used_items
from glm3kit.data.token_file import (
    ADGEN,
    CONVERSATION,
    FORMAT,
    EncodedRows,
    TokenFile,
    pad_row,
    shift_labels,
    write_token_file,
)
from glm3kit.errors import ConfigError, DataError
from glm3kit.text.messages import conversation_ids
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

ROWS_AT_ONCE = 512  # rows handed to SentencePiece's threads together
BATCHES_AHEAD = 4  # handed to it before the ids of the first are needed
# Settings that encoded rows depend on, besides the window.
SETTINGS = {"origin_columns", "max_source_length", "max_target_length", "tools_indent", "skip_bad"}

Encoded = tuple[list[np.ndarray], bytes]  # a row: arrays of its ids; for each id 1 if the prediction made there counts


def _join(source: np.ndarray, target: np.ndarray, tokenizer: ChatGLM3Tokenizer, max_source_length: int,
          max_target_length: int) -> Encoded:
    """An ADGEN row of its texts' ids: `[gMASK] sop` and source, target, eos; the texts are cut."""
    prefix = tokenizer.prefix_ids[:max_source_length]
    source, target = source[:max_source_length - len(prefix)], target[:max_target_length]
    # The last id of the source predicts the target's first one, the target's last one predicts eos.
    mask = bytes(len(prefix) + len(source) - 1) + b"\1" * (len(target) + 1) + b"\0"
    return [np.array(prefix, np.int32), source, target, np.array([tokenizer.eos_id], np.int32)], mask


def _cut(ids: list[int], mask: list[int], seq_length: int) -> Encoded:
    """A conversation cut to the window."""
    if len(ids) > seq_length:
        ids, mask = ids[:seq_length], [*mask[:seq_length - 1], 0]  # what the last one predicts is cut off
    return [np.array(ids, np.int32)], bytes(mask)


def _padded(row: Encoded, seq_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = np.concatenate(row[0]), np.frombuffer(row[1], np.uint8)
    return pad_row(ids, shift_labels(ids, mask), seq_length, pad_id)


def encode_adgen(row: Mapping[str, Any], tokenizer: ChatGLM3Tokenizer, max_source_length: int, max_target_length: int,
                 origin_columns: tuple[str, str] = ("content", "summary")) -> tuple[np.ndarray, np.ndarray]:
    """Encode a row of a source and a target text as MindFormers does.

    Returns input_ids and labels, int32 (max_source_length + max_target_length + 1,): source, target, eos, padding; the
    labels are shifted by one and -100 outside of target and eos. max_source_length includes `[gMASK] sop`.
    Raises DataError for a column that is missing, blank or no text.
    Example: encode_adgen({"content": "类型#裙", "summary": "好看的裙子"}, tokenizer, 64, 127)
    """
    source, target = tokenizer.encode_batch(row_texts(row, origin_columns))
    encoded = _join(source, target, tokenizer, max_source_length, max_target_length)
    return _padded(encoded, max_source_length + max_target_length + 1, tokenizer.pad_id)


def encode_conversation(record: Mapping[str, Any], tokenizer: ChatGLM3Tokenizer, max_seq_length: int,
                        tools_indent: int | None = 4) -> tuple[np.ndarray, np.ndarray]:
    """Encode a conversation: the answers' predictions count in the loss, up to max_seq_length tokens.

    record: see `messages.conversation_messages`. tools_indent: 4 as in the chat prompt, None as in MindFormers.
    Returns input_ids and labels, int32 (max_seq_length,), labels shifted by one; all are -100 if no answer begins in
    the first max_seq_length tokens.
    Raises PromptError for a malformed record.
    """
    encoded = _cut(*conversation_ids(record, tokenizer, tools_indent), max_seq_length)
    return _padded(encoded, max_seq_length, tokenizer.pad_id)


def _spread(lengths: np.ndarray) -> dict[str, float]:
    """Mean, median, percentiles and maximum of lengths in tokens."""
    p50, p95, p99 = np.percentile(lengths, [50, 95, 99]).tolist()
    return {"mean": round(float(lengths.mean()), 1), "p50": p50, "p95": p95, "p99": p99, "max": int(lengths.max())}


class _Encoding:
    """The encoding of some files: batches of encoded rows, and the report that fills up while they are drawn.

    digest: SHA-256 of everything that the encoded rows depend on.
    """

    def __init__(self, paths: Sequence[str | Path], tokenizer: ChatGLM3Tokenizer, data: DataConfig, seq_length: int):
        self.paths, self.tokenizer, self.data = [Path(path) for path in paths], tokenizer, data
        self.seq_length = seq_length
        contents = []
        for path in self.paths:
            digest = hashlib.sha256()
            with open_data(path) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            contents.append(digest.hexdigest())
        settings = {"format": FORMAT, "files": contents, "tokenizer": tokenizer.digest,
                    "seq_length": seq_length} | data.model_dump(mode="json", include=SETTINGS)
        self.digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.report: dict[str, Any] = {"files": [], "seq_length": seq_length, "rows_read": 0, "skipped": [],
                                       "cut_answers": 0, "tokens": 0, "answer_tokens": 0}

    def _prepare(self, item: Any) -> list[str] | tuple[Encoded, int, int]:
        """Texts of an ADGEN row, to be encoded with those of others; or a conversation, encoded and cut.

        With the latter, how many of its tokens do not and do carry loss before cutting.
        """
        data = self.data
        if is_adgen(item, data.origin_columns):
            if data.max_source_length + data.max_target_length + 1 > self.seq_length:  # no fault of this row
                raise ConfigError(f"data.{data.row_rule} tokens, more than seq_length {self.seq_length}; lower the "
                                  "lengths in data or raise seq_length")
            return row_texts(item, data.origin_columns)
        ids, mask = conversation_ids(item, self.tokenizer, data.tools_indent)
        answers = sum(mask)
        encoded = _cut(ids, mask, self.seq_length)
        if not answers:
            raise DataError("no answer to learn: each has 'loss': false; set it for one, or remove the row")
        if 1 not in encoded[1]:
            raise DataError(f"no answer begins within the window: it has {self.seq_length} tokens, the row "
                            f"{len(ids)}; raise max_seq_length, or shorten or remove the row")
        return encoded, len(ids) - 1 - answers, answers

    def _rows(self, progress: bool) -> Iterator[list[tuple[int, int, Any]]]:
        """(file, line, row) of all files, some at a time, checked and ready to encode."""
        report = self.report
        for number, path in enumerate(self.paths):
            encoding, size, read = file_encoding(path), path.stat().st_size, report["rows_read"]
            items = used_items(path, encoding, self._prepare, self.data.skip_bad)
            with tqdm(total=size, desc=f"encode {path.name}", unit="B", unit_scale=True, disable=not progress) as bar:
                while some := list(islice(items, ROWS_AT_ONCE)):
                    report["rows_read"] += len(some)
                    report["skipped"] += [{"file": path.name, "line": line, "reason": str(row)}
                                          for line, _, row in some if isinstance(row, Exception)]
                    rows = [(number, line, row) for line, _, row in some if not isinstance(row, Exception)]
                    if rows:
                        yield rows
                    bar.update(sum(size for _, size, _ in some))
                bar.update(size - bar.n)
            report["files"].append({"file": path.name, "encoding": ENCODINGS[encoding],
                                    "rows": report["rows_read"] - read})

    def _join_rows(self, rows: list[tuple[int, int, Any]], encoded: list[np.ndarray]) -> EncodedRows:
        """Rows of a batch one after the other."""
        ids, masks, origins = [], [], []
        texts, opening, data = iter(encoded), len(self.tokenizer.prefix_ids), self.data
        for file, line, row in rows:
            if isinstance(row, list):
                source_ids, target_ids = next(texts), next(texts)
                row_ids, mask = _join(source_ids, target_ids, self.tokenizer, data.max_source_length,
                                      data.max_target_length)
                origins.append((file, line, ADGEN, opening + len(source_ids), len(target_ids)))
                cut = len(target_ids) > data.max_target_length
            else:
                (row_ids, mask), source, target = row
                origins.append((file, line, CONVERSATION, source, target))
                cut = mask.count(1) < target
            ids += row_ids
            masks.append(mask)
            self.report["cut_answers"] += int(cut)
        mask = np.frombuffer(b"".join(masks), np.uint8)
        self.report["tokens"] += len(mask)
        self.report["answer_tokens"] += int(mask.sum())
        return EncodedRows(np.concatenate(ids), mask, [len(mask) for mask in masks], origins)

    def _batches(self, progress: bool) -> Iterator[EncodedRows]:
        """Encode the files batch by batch; the report is complete when all are drawn."""
        def with_ids(rows: list[tuple[int, int, Any]]) -> tuple[list, list[np.ndarray]]:
            texts = [text for _, _, row in rows if isinstance(row, list) for text in row]
            return rows, self.tokenizer.encode_batch(texts)

        origins: list[np.ndarray] = []
        # SentencePiece works on the next rows while Python joins the last ones
        for rows, encoded in prefetch(with_ids, self._rows(progress), BATCHES_AHEAD):
            batch = self._join_rows(rows, encoded)
            origins.append(np.array(batch.origins))
            yield batch
        if not origins:  # there is nothing to count
            return
        _, _, kind, source, target = np.concatenate(origins).T  # the lengths are those before cutting
        adgen, whole = kind == ADGEN, source + target + 1
        lengths = {"source": source[adgen], "target": target[adgen], "conversation": whole[~adgen]}
        self.report |= {
            "rows_kept": len(whole), "rows_skipped": len(self.report["skipped"]), "adgen_rows": int(adgen.sum()),
            "conversations": int((~adgen).sum()),
            "cut_sources": int((lengths["source"] > self.data.max_source_length).sum()),
            "cut_conversations": int((lengths["conversation"] > self.seq_length).sum()),
            "lengths": {name: _spread(values) for name, values in lengths.items() if len(values)}}

    def token_file(self, destination: Path, progress: bool) -> TokenFile:
        """The token file at `destination`, written unless it is there with this digest."""
        return write_token_file(destination, self.digest, self._batches(progress), self.report)


def encode_files(paths: Sequence[str | Path], tokenizer: ChatGLM3Tokenizer, data: DataConfig, seq_length: int,
                 destination: str | Path, progress: bool = True) -> TokenFile:
    """Encode data files into one token file at `destination`, or use the one there if nothing has changed.

    data: columns, lengths and what to do with bad rows; its own paths do not matter here.
    seq_length: tokens; a longer conversation is cut.
    The report of the token file counts rows read, kept, skipped (with file, line and reason) and cut, tokens and tokens
    of answers, and describes the lengths before cutting: "source" (with `[gMASK] sop`), "target" (without eos),
    "conversation". cut_answers: rows that lost a part of an answer, of either kind.
    Raises DataError with file and line for a row that cannot be used, also a conversation without an answer in its
    first seq_length tokens; with data.skip_bad such rows are skipped and counted.
    """
    return _Encoding(paths, tokenizer, data, seq_length).token_file(Path(destination), progress)


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
    tokenizer = ChatGLM3Tokenizer(config.model.tokenizer_path)
    token_files = {}
    for name, paths in named.items():
        if paths:
            encoding = _Encoding(paths, tokenizer, config.data, config.model.seq_length)
            folder = Path(config.output_dir) / "tokens" / f"{name}-{encoding.digest[:12]}"
            token_files[name] = encoding.token_file(folder, progress)
    return token_files
