"""Reading and writing MindSpore's .ckpt files, memory-mapped and a tensor at a time.

The form (mindspore/train/checkpoint.proto, serialization.py): protobuf messages one after the other, one a tensor, each
`Checkpoint{1: Value{1: tag, 2: TensorProto{1: dims, 2: type, 3: content}}}`. A tensor of more than 512 MiB goes on in
the next messages with the same tag. `save_checkpoint(crc_check=True)` ends with "crc_num" and a number of 10 bytes.

    tensors = read_ckpt("glm3_6b.ckpt"); tensors.specs; tensors["transformer.output_layer.weight"]
"""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from glm3kit.errors import CheckpointError
from glm3kit.files import atomic_path
from glm3kit.tensors import DTYPES, Tensors, TensorSpec, raw_bytes

TYPES = {"float64": "Float64", "float32": "Float32", "float16": "Float16", "bfloat16": "BFloat16", "int64": "Int64",
         "int32": "Int32", "int16": "Int16", "int8": "Int8", "uint64": "UInt64", "uint32": "UInt32",
         "uint16": "UInt16", "uint8": "UInt8", "bool": "Bool"}
NAMES = {text: name for name, text in TYPES.items()}
SLICE = 512 << 20  # bytes of content a message, MindSpore's own limit
VARINT, BYTES = 0, 2  # wire types
CRC_TAIL = 17  # bytes: "crc_num" and the number


class _Damaged(Exception):
    """The bytes are not what a .ckpt has at this place."""


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte, lowest first: (number, position after it)."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _Damaged(f"it ends at byte {position}, in the middle of a tensor")
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise _Damaged(f"no length at byte {position}")


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message: (number, value, 0) for numbers, (number, first byte, byte after the last) for bytes."""
    while position < end:
        key, after = _varint(data, position, end)
        value, after = _varint(data, after, end)
        if key & 7 == VARINT:
            yield key >> 3, value, 0
        elif key & 7 == BYTES:
            if after + value > end:
                raise _Damaged(f"byte {position} announces {value} bytes, {end - after} follow")
            yield key >> 3, after, after + value
            after += value
        else:
            raise _Damaged(f"no field of a tensor at byte {position}")
        position = after


def _text(data: mmap.mmap, start: int, end: int) -> str:
    try:
        return data[start:end].decode("utf-8")
    except UnicodeDecodeError as err:
        raise _Damaged(f"no text at byte {start}") from err


def _tensor(data: mmap.mmap, start: int, end: int) -> tuple[str, tuple[int, ...], int, int]:
    """Read a TensorProto: (type, shape, first byte of the content, byte after the last)."""
    dims, dtype, content = [], None, None
    for field, first, last in _fields(data, start, end):
        if field == 1 and last:  # dims packed into one field
            while first < last:
                dim, first = _varint(data, first, last)
                dims.append(dim)
        elif field == 1:
            dims.append(first)
        elif field == 2:
            dtype = _text(data, first, last)
        elif field == 3:
            content = first, last
    if dtype is None or content is None:
        raise _Damaged(f"no type or no content in the tensor at byte {start}")
    return dtype, tuple(dims), *content


def _values(data: mmap.mmap, end: int) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Every value of the file: name, type, shape, first byte, byte after the last."""
    for field, start, stop in _fields(data, 0, end):
        if field != 1 or not stop:
            raise _Damaged(f"field {field} before byte {start}")
        tag, tensor = None, None
        for inner, first, last in _fields(data, start, stop):
            if inner == 1:
                tag = _text(data, first, last)
            elif inner == 2:
                tensor = _tensor(data, first, last)
        if tag is None or tensor is None:
            raise _Damaged(f"no name or no tensor in the value at byte {start}")
        yield tag, *tensor


def _directory(data: mmap.mmap) -> tuple[dict[str, TensorSpec], dict[str, list[tuple[int, int]]], dict[str, str]]:
    """What the file holds: specs, places (a list of pieces each), and the values that are text."""
    end = len(data)
    if data[end - CRC_TAIL:end - CRC_TAIL + 7] == b"crc_num":
        end -= CRC_TAIL
    specs: dict[str, TensorSpec] = {}
    pieces: dict[str, list[tuple[int, int]]] = {}
    texts: dict[str, str] = {}
    last_tag = None
    for tag, dtype, dims, first, last in _values(data, end):
        if dtype == "str":  # NumPy's text: 4 bytes a character
            try:
                texts[tag] = data[first:last].decode("utf-32-le")
            except UnicodeDecodeError as err:
                raise _Damaged(f"no text at byte {first}") from err
        elif dtype not in NAMES:
            raise _Damaged(f"'{tag}' has type {dtype!r}; read are {', '.join(NAMES)}")
        elif tag in specs and tag != last_tag:
            raise _Damaged(f"'{tag}' stands twice, the second time at byte {first}")
        else:
            specs[tag] = TensorSpec(NAMES[dtype], () if dims == (0,) else dims)  # 0 is how it writes a scalar
            pieces.setdefault(tag, []).append((first, last))
        last_tag = tag
    for tag, spec in specs.items():
        found = sum(last - first for first, last in pieces[tag])
        if found != spec.nbytes:
            raise _Damaged(f"'{tag}' of type {spec.dtype} and shape {list(spec.shape)} needs {spec.nbytes} bytes, "
                           f"it has {found}")
    if not specs:
        raise _Damaged("it holds no tensor")
    return specs, pieces, texts


def read_ckpt(path: str | Path) -> Tensors:
    """Open a .ckpt file: types and shapes at once, a tensor's bytes when it is asked for.

    The arrays are read-only views of the mapped file, but for those in several pieces. `metadata` are the values that
    are text. Nothing is executed: the form holds numbers and text only.
    Raises CheckpointError for a file that is cut off, damaged, encrypted or no .ckpt.
    """
    path = Path(path)
    try:
        if not path.stat().st_size:
            raise _Damaged("it is empty")
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        specs, pieces, texts = _directory(data)
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read: {err.strerror}") from err
    except _Damaged as err:
        raise CheckpointError(f"{path}: no MindSpore checkpoint, or a damaged or encrypted one: {err}; "
                              "get it again, or save it without encryption") from err

    def read(name: str) -> np.ndarray:
        dtype, shape = DTYPES[specs[name].dtype], specs[name].shape
        if len(pieces[name]) == 1:
            return np.ndarray(shape, dtype, data, pieces[name][0][0])
        whole = np.empty(specs[name].nbytes, np.uint8)
        position = 0
        for first, last in pieces[name]:
            whole[position:position + last - first] = np.frombuffer(data, np.uint8, last - first, first)
            position += last - first
        return whole.view(dtype).reshape(shape)

    return Tensors(specs, read, texts)


def _number(value: int) -> bytes:
    """A number as protobuf writes it: 7 bits a byte, lowest first."""
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def _field(number: int, wire_type: int, value: int) -> bytes:
    """The head of a field: its number and type, then its value or its length."""
    return _number(number << 3 | wire_type) + _number(value)


def write_ckpt(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors to a .ckpt that `mindspore.load_checkpoint` reads, whole or not at all, one tensor at a time.

    Example: write_ckpt("glm3.ckpt", {"a.weight": np.zeros((2, 3), np.float16)})
    """
    tensors = Tensors.of(tensors)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for name, spec in tensors.specs.items():
            content = raw_bytes(tensors[name])
            assert len(content) == spec.nbytes, f"{name} has the bytes that its spec says"
            tag, dtype = name.encode("utf-8"), TYPES[spec.dtype].encode()
            head = b"".join(_field(1, VARINT, dim) for dim in spec.shape or (0,)) + _field(2, BYTES, len(dtype)) + dtype
            for start in range(0, max(len(content), 1), SLICE):
                piece = content[start:start + SLICE]
                inner = head + _field(3, BYTES, len(piece))
                value = _field(1, BYTES, len(tag)) + tag + _field(2, BYTES, len(inner) + len(piece)) + inner
                file.write(_field(1, BYTES, len(value) + len(piece)) + value)
                file.write(piece)
