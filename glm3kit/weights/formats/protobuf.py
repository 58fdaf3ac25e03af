"""The wire form of protobuf messages (https://protobuf.dev/programming-guides/encoding/), as far as files here use it.

MindSpore's .ckpt and SentencePiece's models are such messages: fields that are numbers, texts, or messages again.

    read_message(data, slice(0, len(data)), {1: ("dims", [int]), 2: ("type", str), 3: ("content", slice)})
"""

from collections.abc import Iterator, Mapping
from mmap import mmap
from typing import Any

VARINT, BYTES = 0, 2  # wire types
FIXED = {1: 8, 5: 4}  # those of fixed numbers, and their bytes


def varint(data: mmap | bytes, position: int, end: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte, lowest first: (number, position after it)."""
    number = 0
    for count, byte in enumerate(data[position:min(position + 10, end)]):
        number |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return number, position + count + 1
    raise ValueError(f"no number at byte {position}, or the message ends in it")


def _signed(number: int) -> int:
    """A number below zero is written as its complement of 64 bits."""
    return number - (number >> 63 << 64)


def fields(data: mmap | bytes, place: slice) -> Iterator[tuple[int, int | slice]]:
    """The fields of a message: (number, value), for bytes their place.

    Raises ValueError for what is no message. Fixed numbers, which nothing here needs, are passed over.
    """
    position, end = place.start, place.stop
    while position < end:
        key, after = varint(data, position, end)
        if key & 7 in FIXED:
            position = after + FIXED[key & 7]
            continue
        value, after = varint(data, after, end)
        if key & 7 == VARINT:
            yield key >> 3, _signed(value)
        elif key & 7 == BYTES:
            if after + value > end:
                raise ValueError(f"byte {position} announces {value} bytes, {end - after} follow")
            yield key >> 3, slice(after, after + value)
            after += value
        else:
            raise ValueError(f"no field at byte {position}")
        position = after


def _packed(data: mmap | bytes, place: slice) -> Iterator[int]:
    """The numbers that are packed into one field."""
    position = place.start
    while position < place.stop:
        number, position = varint(data, position, place.stop)
        yield _signed(number)


def read_message(data: mmap | bytes, place: slice, form: Mapping[int, tuple[str, Any]], **defaults: Any
                 ) -> dict[str, Any]:
    """What a message says, by the names that its form has for the numbers of fields; others are passed over.

    form: number -> (name, kind). A kind is int, str or slice (the place of bytes, or of a message); [int] or [slice]
    where there may be several.
    Raises ValueError for a field of another kind, and for one that neither comes nor has a default.
    """
    result = {name: [] for name, kind in form.values() if type(kind) is list} | defaults
    for number, value in fields(data, place):
        name, kind = form.get(number, ("", None))
        if kind == [int] and type(value) is slice:  # packed into one field
            result[name] += _packed(data, value)
        elif kind is str and type(value) is slice:
            result[name] = data[value].decode("utf-8")
        elif kind == [type(value)]:
            result[name].append(value)
        elif kind is type(value):
            result[name] = value
        elif kind:
            raise ValueError(f"field {number} of the message at byte {place.start} is of another kind")
    if missing := {name for name, _ in form.values()} - set(result):
        raise ValueError(f"no {' or '.join(sorted(missing))} in the message at byte {place.start}")
    return result


def _number(value: int) -> bytes:
    """A number as protobuf writes it: 7 bits a byte, lowest first."""
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + _number(value >> 7)


def field_head(number: int, wire_type: int, value: int) -> bytes:
    """The head of a field: its number and type, then its value or its length."""
    return _number(number << 3 | wire_type) + _number(value)
