"""The wire form of protobuf messages (https://protobuf.dev/programming-guides/encoding/), as far as files here use it.

MindSpore's .ckpt and SentencePiece's models are such messages: fields that are numbers, texts, or messages again.

    [number for number, *_ in fields(data, 0, len(data))]
"""

from collections.abc import Iterator
from mmap import mmap

VARINT, BYTES = 0, 2  # wire types
FIXED = {1: 8, 5: 4}  # those of fixed numbers, and their bytes


class Damaged(ValueError):
    """The bytes are not what such a message has at this place."""


def varint(data: mmap | bytes, position: int, end: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte, lowest first: (number, position after it)."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise Damaged(f"it ends at byte {position}, in the middle of a tensor")
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise Damaged(f"no length at byte {position}")


def fields(data: mmap | bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message: (number, value, 0) for numbers, (number, first byte, byte after the last) for bytes.

    Raises Damaged for what is no message. Fixed numbers, which nothing here needs, are passed over.
    """
    while position < end:
        key, after = varint(data, position, end)
        if key & 7 in FIXED:
            position = after + FIXED[key & 7]
            continue
        value, after = varint(data, after, end)
        if key & 7 == VARINT:
            yield key >> 3, value, 0
        elif key & 7 == BYTES:
            if after + value > end:
                raise Damaged(f"byte {position} announces {value} bytes, {end - after} follow")
            yield key >> 3, after, after + value
            after += value
        else:
            raise Damaged(f"no field of a tensor at byte {position}")
        position = after


def varints(data: mmap | bytes, position: int, end: int) -> list[int]:
    """The numbers that are packed into one field."""
    numbers = []
    while position < end:
        number, position = varint(data, position, end)
        numbers.append(number)
    return numbers


def _number(value: int) -> bytes:
    """A number as protobuf writes it: 7 bits a byte, lowest first."""
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def field_head(number: int, wire_type: int, value: int) -> bytes:
    """The head of a field: its number and type, then its value or its length."""
    return _number(number << 3 | wire_type) + _number(value)
