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
from glm3kit.files import StreamedFile, atomic_path
from glm3kit.weights.formats.protobuf import BYTES, VARINT, field_head, fields, read_message
from glm3kit.weights.tensors import DTYPES, Tensors, TensorSpec, cut, map_file, raw_bytes

TYPES = {name: name.title().replace("Bf", "BF").replace("Ui", "UI") for name in DTYPES}  # BFloat16, UInt8
NAMES = {text: name for name, text in TYPES.items()}
MESSAGE = 512 << 20  # bytes of content a message, MindSpore's own limit
CRC_TAIL = 17  # bytes: "crc_num" and the number
VALUE = {1: ("tag", str), 2: ("tensor", slice)}
TENSOR = {1: ("dims", [int]), 2: ("dtype", str), 3: ("content", slice)}


def _directory(data: mmap.mmap) -> tuple[dict[str, TensorSpec], dict[str, list[slice]]]:
    """What the file holds: specs, and places of the content in each message. Values that are text are passed over."""
    end = len(data)
    if data[end - CRC_TAIL:end - CRC_TAIL + 7] == b"crc_num":
        end -= CRC_TAIL
    specs: dict[str, TensorSpec] = {}
    places: dict[str, list[slice]] = {}
    last_tag = None
    for number, place in fields(data, slice(0, end)):
        if number != 1 or type(place) is int:
            raise ValueError(f"field {number}, which is no value")
        value = read_message(data, place, VALUE)
        tensor = read_message(data, value["tensor"], TENSOR)
        tag, dtype, dims, content = value["tag"], tensor["dtype"], tuple(tensor["dims"]), tensor["content"]
        if dtype == "str":  # of `append_dict`: no weight
            continue
        if dtype not in NAMES:
            raise ValueError(f"'{tag}' has type {dtype!r}; read are {', '.join(NAMES)}")
        if tag in specs and tag != last_tag:
            raise ValueError(f"'{tag}' stands twice, the second time at byte {content.start}")
        specs[tag] = TensorSpec(NAMES[dtype], () if dims == (0,) else dims)  # 0 is how it writes a scalar
        places.setdefault(tag, []).append(content)
        last_tag = tag
    for tag, spec in specs.items():
        found = [content.stop - content.start for content in places[tag]]
        if sum(found) != spec.nbytes or min(spec.shape, default=0) < 0 or any(
                size % DTYPES[spec.dtype].itemsize for size in found):
            raise ValueError(f"'{tag}' of type {spec.dtype} and shape {list(spec.shape)} needs {spec.nbytes} bytes, "
                             f"it has {' + '.join(map(str, found))}")
    if not specs:
        raise ValueError("it holds no tensor")
    return specs, places


def read_ckpt(path: str | Path) -> Tensors:
    """Open a .ckpt file: types and shapes at once, a tensor's bytes when it is asked for.

    The arrays are read-only views of the mapped file, but for those in several messages. Nothing is executed: the form
    holds numbers and text only.
    Raises CheckpointError for a file that is cut off, damaged, encrypted or no .ckpt.
    """
    path = Path(path)
    try:
        data = map_file(path)
        specs, places = _directory(data)
        bytes_of = np.ndarray(len(data), np.uint8, data)
    except ValueError as err:
        raise CheckpointError(f"{path}: no MindSpore checkpoint, or a damaged or encrypted one: {err}; "
                              "get it again, or save it without encryption") from err

    def read(name: str) -> np.ndarray:
        dtype, shape = DTYPES[specs[name].dtype], specs[name].shape
        if len(places[name]) == 1:
            return np.ndarray(shape, dtype, data, places[name][0].start)
        return np.concatenate([bytes_of[place] for place in places[name]]).view(dtype).reshape(shape)

    def blocks(name: str) -> Iterator[np.ndarray]:
        for place in places[name]:
            yield from cut(bytes_of[place].view(DTYPES[specs[name].dtype]))

    return Tensors(specs, read, blocks=blocks)


def _head(name: str, spec: TensorSpec, size: int) -> bytes:
    """What stands before `size` bytes of a tensor's content."""
    tag, dtype = name.encode("utf-8"), TYPES[spec.dtype].encode()
    dims = b"".join(field_head(1, VARINT, dim) for dim in spec.shape or (0,))
    inner = dims + field_head(2, BYTES, len(dtype)) + dtype + field_head(3, BYTES, size)
    value = field_head(1, BYTES, len(tag)) + tag + field_head(2, BYTES, len(inner) + size) + inner
    return field_head(1, BYTES, len(value) + size) + value


def write_ckpt(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors to a .ckpt that `mindspore.load_checkpoint` reads, whole or not at all, one tensor at a time.

    Example: write_ckpt("glm3.ckpt", {"a.weight": np.zeros((2, 3), np.float16)})
    """
    tensors = Tensors.of(tensors)
    with atomic_path(path) as temporary, StreamedFile(temporary) as file:
        for name, spec in tensors.specs.items():
            left, room = spec.nbytes, min(spec.nbytes, MESSAGE)  # bytes of the tensor, and of this message
            file.write(_head(name, spec, room))
            for content in map(raw_bytes, tensors.blocks(name)):
                while content:
                    if not room:
                        room = min(left, MESSAGE)
                        file.write(_head(name, spec, room))
                    written = file.write(content[:room])
                    room, left, content = room - written, left - written, content[written:]
            assert not left, f"{name} has the bytes that its spec says"
