"""Write the embedded data beside this file: train.json, dev.json, conversations.jsonl and tokenizer.model.

Everything follows from SEED: a second run writes the same bytes. The tokenizer has the settings of the published one
(read from its trainer and normaliser specifications): BPE with byte fallback, no normalisation, digits one by one, runs
of spaces as pieces, new lines as bytes, a leading space before each text.

    python -m tiny_data.generate_data
"""

import argparse
import io
import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import sentencepiece

from glm3kit.files import atomic_write
from glm3kit.text.messages import conversation_ids, conversation_messages
from glm3kit.text.tokenizer import ChatGLM3Tokenizer
from glm3kit.tiny import FOLDER
from tiny_data.dialogues import draw_record
from tiny_data.grammar import ATTRIBUTES, CONNECTIVES, GARMENTS, KIND, Pairs, draw_row, found_values, read_content

SEED = 20240131
TRAIN_ROWS, DEV_ROWS, RECORDS = 2560, 256, 480
MAX_SOURCE, MAX_TARGET, MAX_RECORD = 64, 126, 192  # tokens: [gMASK] sop + content, summary without eos, a whole record
VOCAB_SIZE = 2000
VALUES = sorted({*GARMENTS, *(value for each in ATTRIBUTES.values() for value in each.values)})
# A text for the tokenizer is cut here before pairs of pieces are counted, so that no piece reaches across. Cuts around
# values make a value the same piece in `颜色#红色*` and in a sentence: a small model copies a piece sooner than it
# spells a word. Cuts around function words keep pieces short: with so small a grammar each clause would become one.
CUT = "\t"
FUNCTION_WORDS = "的是了在为很又就也不把你它这都有用选以由做着配"
VALUE_WEIGHT = 40  # times each value is shown to the tokenizer by itself: rare values become pieces too


def content_key(content: str) -> frozenset[tuple[str, str]]:
    """Give what makes two contents the same: their attributes, in whatever order."""
    return frozenset(read_content(content))


def draw_rows(rng: Random, count: int, seen: set[frozenset[tuple[str, str]]]) -> list[dict[str, str]]:
    """Draw rows whose contents are not in `seen`, and add them to it."""
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        row = draw_row(rng)
        if (key := content_key(row["content"])) not in seen:
            seen.add(key)
            rows.append(row)
    return rows


def asked_contents(record: dict[str, Any]) -> list[str]:
    """List the contents in ADGEN's form that a record's user turns ask an advertisement for."""
    texts = (turn["content"] for turn in record["conversations"] if turn["role"] == "user")
    return [text[text.index(f"{KIND}#"):] for text in texts if f"{KIND}#" in text]


def draw_records(rng: Random, count: int, seen: set[frozenset[tuple[str, str]]]) -> list[dict[str, Any]]:
    """Draw records, none twice, that ask for no advertisement in `seen`."""
    records: dict[str, dict[str, Any]] = {}
    while len(records) < count:
        record = draw_record(rng)
        if not any(content_key(content) in seen for content in asked_contents(record)):
            records.setdefault(json_line(record), record)
    return list(records.values())


def json_line(value: Any) -> str:
    """Write a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def record_texts(record: dict[str, Any]) -> list[str]:
    """List the texts of a record's messages, as the chat prompt writes them."""
    texts = []
    for message in conversation_messages(record):
        tools = "\n" + json.dumps(message.tools, ensure_ascii=False, indent=4) if message.tools else ""
        texts.append(f"{message.metadata}\n{message.content}{tools}")
    return texts


def train_tokenizer(texts: Iterable[str]) -> bytes:
    """Train the SentencePiece model on texts; one thread and no shuffling, so the bytes depend on the texts alone."""
    words = [*sorted(VALUES, key=lambda value: (-len(value), value)), *filter(None, CONNECTIVES), *FUNCTION_WORDS]
    cut = [CUT + re.sub("|".join(words), rf"{CUT}\g<0>{CUT}", text).replace("\n", CUT) for text in texts]
    cut += [CUT + value for value in VALUES] * VALUE_WEIGHT
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(cut), model_writer=model, model_type="bpe", vocab_size=VOCAB_SIZE,
        num_threads=1, shuffle_input_sentence=False, pretokenization_delimiter=CUT,
        character_coverage=1.0, required_chars=string.ascii_letters + string.digits + string.punctuation,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        split_digits=True, allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def value_pieces(tokenizer: ChatGLM3Tokenizer, text: str, value: str) -> list[str] | None:
    """Give the pieces that spell a value in a text, or None if pieces reach across its borders everywhere."""
    pieces = [tokenizer.piece(id_) for id_ in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == "▁" + text, "expected a text of pieces without bytes or spaces"
    borders = [0, *accumulate(map(len, pieces))]
    for place in re.finditer(value, "▁" + text):
        if place.start() in borders and place.end() in borders:
            return pieces[borders.index(place.start()):borders.index(place.end())]
    return None


def check_row(row: dict[str, str]) -> None:
    """Assert the grammar's promises: all values and no others are found, in an order that is not the content's."""
    pairs: Pairs = read_content(row["content"])
    values = [value for _, value in pairs]
    found = found_values(row["summary"])
    assert 3 <= len(pairs) <= 7 and sorted(found) == sorted(values), row
    assert [value for value in found if value in values[1:]] != values[1:], row


def report(tokenizer: ChatGLM3Tokenizer, rows: list[dict[str, str]], records: list[dict[str, Any]]) -> str:
    """Count tokens, assert the budgets, and describe what was written."""
    sources = [len(tokenizer.encode(row["content"])) for row in rows]
    targets = [len(tokenizer.encode(row["summary"], add_special_tokens=False)) for row in rows]
    lengths = [len(conversation_ids(record, tokenizer)[0]) for record in records]
    assert max(sources) <= MAX_SOURCE and max(targets) <= MAX_TARGET and max(lengths) <= MAX_RECORD
    spelled = Counter(len(tokenizer.encode(f"#{value}*", add_special_tokens=False)) - 3 for value in VALUES)
    places = [(row, value) for row in rows for _, value in read_content(row["content"])]
    alike = 0
    for row, value in places:
        pieces = value_pieces(tokenizer, row["content"], value)
        if pieces is not None and pieces == value_pieces(tokenizer, row["summary"], value):
            alike += 1
    lines = [f"{name}: mean {sum(counts) / len(counts):.1f}, longest {max(counts)} tokens of {limit}"
             for name, counts, limit in (("content", sources, MAX_SOURCE), ("summary", targets, MAX_TARGET),
                                         ("record", lengths, MAX_RECORD))]  # fmt: skip
    lines += [f"values of {count} token(s): {spelled[count]}" for count in sorted(spelled)]
    lines.append(f"places where content and summary spell a value by the same pieces: {alike} of {len(places)}")
    return "\n".join(lines)


def generate(folder: str | Path = FOLDER, seed: int = SEED) -> str:
    """Write the four files into a folder; return a report of sizes in tokens."""
    rng, folder = Random(seed), Path(folder)
    seen: set[frozenset[tuple[str, str]]] = set()
    dev = draw_rows(rng, DEV_ROWS, seen)
    held_out = set(seen)
    train = draw_rows(rng, TRAIN_ROWS, seen)
    records = draw_records(rng, RECORDS, held_out)
    for row in dev + train:
        check_row(row)
    texts = [text for row in train for text in (row["content"], row["summary"])]
    texts += [text for record in records for text in record_texts(record)]
    atomic_write(folder / "tokenizer.model", train_tokenizer(texts))
    for name, lines in (("train.json", train), ("dev.json", dev), ("conversations.jsonl", records)):
        atomic_write(folder / name, "".join(map(json_line, lines)))
    return report(ChatGLM3Tokenizer(folder / "tokenizer.model"), dev + train, records)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="default: beside this file")
    print(generate(parser.parse_args().folder))
