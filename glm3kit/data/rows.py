"""The rows of data files: JSON lines or one JSON array, in UTF-8 or GBK, each with its line, each checked.

Rows are of two kinds, also mixed in one file: ADGEN's (a source and a target text, in columns of any name) and
conversations (`messages.conversation_messages`). An error's text up to its first colon is the reason that rows are
counted by; what follows is of that row alone.

    for row in read_rows(["train.json"], DataConfig()): print(row)
"""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from glm3kit.config.groups import DataConfig
from glm3kit.errors import DataError, PromptError
from glm3kit.text.messages import conversation_messages
from glm3kit.text.tokenizer import check_text

ENCODINGS = {"utf-8": "UTF-8", "gb18030": "GBK"}  # Python's names, and ours; GB 18030 holds all of GBK
_BLOCK = 1 << 16  # characters of an array read at a time
_SAMPLE = 1 << 20  # bytes that an encoding is recognised by
_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
          codecs.BOM_UTF16_BE: "UTF-16"}
_SPACE = re.compile(r"[ \t\r\n]*")
_TURN = re.compile(r"turn \d+ of \d+: ")

Item = tuple[int, int, Any]  # line, size, and what stands there: a DataError for a line that is no JSON


def reason_of(error: str) -> str:
    """The reason that a refused row is counted by: its error without what is of this row alone."""
    return _TURN.sub("", error, count=1).split(": ")[0].split("; ")[0]


def count_reasons(skipped: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Skipped rows by reason, the most frequent first: {"reason", "rows", "where"}, where as "train.json:3,17"."""
    places: dict[str, dict[str, list[int]]] = {}
    for row in skipped:
        places.setdefault(reason_of(row["reason"]), {}).setdefault(row["file"], []).append(row["line"])
    counted = [{"reason": reason, "rows": sum(map(len, files.values())),
                "where": " ".join(f"{file}:{','.join(map(str, lines))}" for file, lines in files.items())}
               for reason, files in places.items()]
    return sorted(counted, key=lambda entry: -entry["rows"])


def open_data(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as err:
        raise DataError(f"{path}: the data file cannot be read ({err.strerror}); correct its path (data.train_path "
                        "or data.eval_path in a configuration)") from err


def _decoded(line: bytes, encoding: str) -> str | None:
    """Text of a line, perhaps cut within its last character; None if it is not of this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(line)
    except UnicodeDecodeError:
        return None


def _is_chinese(text: str) -> bool:
    """Whether a text has the common characters that Chinese is written with; mistaken bytes give rare ones."""
    wide = "".join(letter for letter in text if not letter.isascii())
    return len(wide.encode("gb2312", "ignore")) >= 1.8 * len(wide)  # two bytes for each that is there: nine of ten


def file_encoding(path: str | Path) -> str:
    """"utf-8" or "gb18030" (GBK), by what most lines of the first megabyte are.

    Raises DataError, with the name of the encoding, for UTF-16 and UTF-32, whose lines end otherwise.
    """
    with open_data(Path(path)) as file:
        sample = file.read(_SAMPLE)
    for mark, name in _MARKS.items():
        if sample.startswith(mark):
            raise DataError(f"{path}: the file is {name} (it opens with that byte order mark), expected UTF-8 or GBK; "
                            "save it as UTF-8")
    votes = 0
    for line in sample.split(b"\n"):
        if line.isascii():
            continue
        if _decoded(line, "utf-8") is not None:
            votes += 1
        elif (text := _decoded(line, "gb18030")) is not None and _is_chinese(text):
            votes -= 1
    return "utf-8" if votes >= 0 else "gb18030"


class _Window:
    """The part of a text file that is being read: all of it could be longer than memory."""

    def __init__(self, file: io.TextIOWrapper):
        self.file, self.text, self.position, self._line = file, "", 0, 1

    def more(self) -> bool:
        """Read on and let go of what lies before the position; False at the end of the file."""
        self._line += self.text.count("\n", 0, self.position)
        block = self.file.read(max(_BLOCK, len(self.text) - self.position))  # twice as much for an item that is long
        self.text, self.position = self.text[self.position:] + block, 0
        return bool(block)

    def next_letter(self) -> str:
        """Go on to the next letter that is no space, and return it; "" at the end of the file."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()
            if self.position < len(self.text) or not self.more():
                return self.text[self.position:self.position + 1]

    @property
    def line(self) -> int:
        return self._line + self.text.count("\n", 0, self.position)


def _read_array(window: _Window, path: Path) -> Iterator[Item]:
    """Items of a JSON array; an error in its syntax ends it, what follows could be anything."""
    assert window.next_letter() == "["
    window.position += 1
    decode = json.JSONDecoder().raw_decode
    mark = "]" if window.next_letter() == "]" else ","
    while mark == ",":
        window.next_letter()
        fault = None
        try:
            item, end = decode(window.text, window.position)
        except (ValueError, RecursionError) as err:
            fault, end = err, len(window.text)
        if end == len(window.text) and window.more():  # perhaps cut within the item
            continue
        if fault:
            raise DataError(f"{path}:{window.line}: not JSON: {getattr(fault, 'msg', fault)}; expected the items of an "
                            "array of rows, correct the file") from fault
        yield window.line, end - window.position, item
        window.position = end
        mark = window.next_letter()
        if mark not in (",", "]"):
            found = window.text[window.position:window.position + 20]
            raise DataError(f"{path}:{window.line}: expected ',' or ']' after a row of the array, got {found!r}; "
                            "correct the file")
        if mark == ",":
            window.position += 1
    window.position += 1
    if window.next_letter():
        raise DataError(f"{path}:{window.line}: there is more after the end of the JSON array; put all rows into it")


def _read_line(line: bytes, encoding: str) -> Any:
    """The value of a JSON line, or a DataError that says why it is none."""
    try:
        return json.loads(line.decode(encoding))
    except UnicodeDecodeError as err:
        other = "utf-8" if encoding == "gb18030" else "gb18030"
        text = _decoded(line, other)
        looks = f", it looks like {ENCODINGS[other]}" if text is not None and _is_chinese(text) else ""
        fault = f"not {ENCODINGS[encoding]}{looks}: byte 0x{line[err.start]:02X}, column {err.start + 1} of"
    except json.JSONDecodeError as err:
        fault = f"not JSON: {err.msg}, column {err.colno} of"
    except (ValueError, RecursionError) as err:  # a number of too many digits; brackets nested too deep
        fault = f"not JSON: {err}:"
    return DataError(f"{fault} {line[:40].decode(encoding, 'replace')!r}")


def read_items(path: Path, encoding: str) -> Iterator[Item]:
    """What stands in a file of JSON lines or of one JSON array, in `encoding`, a block of the file at a time.

    Yields (line, size, item). size: bytes, or characters of an array. item: a DataError for a line that is no JSON.
    Raises DataError with file and line if the syntax of an array is broken.
    """
    with open_data(path) as file:
        start = file.read(_BLOCK)
        mark = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
        file.seek(mark)
        if start[mark:].lstrip().startswith(b"["):
            text = io.TextIOWrapper(file, encoding)
            try:
                yield from _read_array(_Window(text), path)
            except UnicodeDecodeError as err:
                raise DataError(f"{path}: not {ENCODINGS[encoding]}: {err.reason} (byte 0x{err.object[err.start]:02X});"
                                " save the file as UTF-8") from err
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, len(line), _read_line(line, encoding)


def is_adgen(item: Any, columns: tuple[str, str]) -> bool:
    """Whether a row is ADGEN's (True) or a conversation (False); DataError for what is no row."""
    if isinstance(item, DataError):
        raise item
    if not isinstance(item, dict):
        raise DataError(f"not an object: got {type(item).__name__} {str(item)[:40]!r}")
    there = [column in item for column in columns]
    if "conversations" in item and not all(there):
        return False
    if any(there):  # if the other column is missing, that is said where the texts are taken
        return True
    raise DataError(f"neither kind of row: it has {', '.join(map(repr, item)) or 'no columns'}, expected "
                    f"{columns[0]!r} and {columns[1]!r} (data.origin_columns), or 'conversations'")


def row_texts(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Source and target of an ADGEN row; DataError for a missing, blank or other value."""
    texts = []
    for column in columns:
        if column not in row:
            raise DataError(f"column {column!r} is missing: the row has {', '.join(map(repr, row)) or 'none'}")
        value = row[column]
        if not isinstance(value, str):
            raise DataError(f"column {column!r} is no text: got {type(value).__name__} {str(value)[:40]!r}")
        if not value.strip():
            raise DataError(f"column {column!r} is blank; fill it or remove the row")
        check_text(value)
        texts.append(value)
    return texts


def used_items(path: Path, encoding: str, use: Callable[[Any], Any], skip_bad: bool) -> Iterator[Item]:
    """(line, size, use(item)) of each item of a file; with skip_bad an error of `use` stands there as it is.

    Raises DataError with file and line for it otherwise.
    """
    for line, size, item in read_items(path, encoding):
        try:
            used = use(item)
        except (DataError, PromptError) as err:
            if not skip_bad:
                raise DataError(f"{path}:{line}: {err} (data.skip_bad=true skips such rows and counts them)") from err
            used = err
        yield line, size, used


def read_rows(paths: Sequence[str | Path], data: DataConfig) -> Iterator[dict[str, Any]]:
    """Rows of data files as they stand there, each checked.

    Raises DataError with file and line for a bad row, or leaves it out if data.skip_bad.
    """
    def check(item: Any) -> dict[str, Any]:
        if is_adgen(item, data.origin_columns):
            row_texts(item, data.origin_columns)
        else:
            conversation_messages(item)
        return item

    for path in map(Path, paths):
        rows = (row for _, _, row in used_items(path, file_encoding(path), check, data.skip_bad))
        yield from (row for row in rows if not isinstance(row, Exception))
