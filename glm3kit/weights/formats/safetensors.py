"""Reading and writing .safetensors files, memory-mapped and a tensor at a time.

The form (https://github.com/huggingface/safetensors): 8 bytes with the length of the header, the header as JSON with
type, shape and place of every tensor, then their bytes one after the other.

    tensors = read_safetensors("model.safetensors"); tensors.specs; tensors["transformer.output_layer.weight"]
"""

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm3kit.errors import CheckpointError
from glm3kit.files import StreamedFile, atomic_path
from glm3kit.weights.tensors import DTYPES, Tensors, TensorSpec, map_file, raw_bytes

CODES = {name: name.upper().replace("FLOAT", "F").replace("UINT", "U").replace("INT", "I") for name in DTYPES}  # BF16
NAMES = {code: name for name, code in CODES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the original reader


def _spec(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    """An entry of the header: type and shape, first byte of the content, byte after the last; ValueError for none."""
    try:
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError("a number below zero, or none")
    except (TypeError, KeyError, ValueError) as err:
        raise ValueError(f"tensor '{name}': the header says {entry!r}, expected dtype, shape and data_offsets") from err
    if code not in NAMES:
        raise ValueError(f"tensor '{name}' has type {code!r}; read are {', '.join(NAMES)}")
    spec = TensorSpec(NAMES[code], tuple(shape))
    if end - start != spec.nbytes:
        raise ValueError(f"tensor '{name}' of type {code} and shape {list(shape)} needs {spec.nbytes} bytes, its place "
                         f"in the file has {end - start}")
    return spec, start, end


def _header(data: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The content of the header and the byte after it."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER):
        raise ValueError(f"{len(data)} bytes, the first 8 of which say that a header of {length} bytes follows")
    try:
        header = json.loads(data[8:8 + length])
    except (ValueError, RecursionError) as err:
        raise ValueError(f"its header is no JSON ({err})") from err
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError(f"its header begins {str(header)[:60]!r}, expected names and places of tensors")
    return header, 8 + length


def _places(header: Mapping[str, Any], begin: int, size: int) -> dict[str, tuple[TensorSpec, int]]:
    """Type and shape of every tensor, and its first byte: one after the other, they fill the file."""
    places, position = {}, begin
    entries = [(name, *_spec(name, entry)) for name, entry in header.items()]
    for name, spec, start, end in sorted(entries, key=lambda entry: entry[2:]):
        if begin + start != position:
            raise ValueError(f"tensor '{name}' starts at byte {start}, the one before it ends at {position - begin}")
        places[name], position = (spec, position), begin + end
    if position != size:
        raise ValueError(f"{size} bytes, its header describes {position}")
    return places


def read_safetensors(path: str | Path) -> Tensors:
    """Open a .safetensors file: types and shapes at once, a tensor's bytes when it is asked for.

    The arrays are read-only views of the mapped file. `metadata` is the header's text.
    Raises CheckpointError for a file that is cut off, damaged or no safetensors file.
    """
    path = Path(path)
    try:
        data = map_file(path)
        header, begin = _header(data)
        metadata = header.pop("__metadata__", {})
        places = _places(header, begin, len(data))
    except ValueError as err:
        raise CheckpointError(f"{path}: {err}; the file is damaged, cut off or no safetensors file, get it again"
                              ) from err

    def read(name: str) -> np.ndarray:
        spec, first = places[name]
        return np.ndarray(spec.shape, DTYPES[spec.dtype], data, first)

    return Tensors({name: spec for name, (spec, _) in places.items()}, read, metadata)


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray],
                      metadata: Mapping[str, str] | None = None) -> Path:
    """Write tensors to a .safetensors file, whole or not at all; lazy `Tensors` are read one at a time.

    metadata: text for the header, such as {"format": "ms"}. Returns the path.
    Example: write_safetensors("model.safetensors", {"a.weight": np.zeros((2, 3), np.float16)})
    """
    tensors = Tensors.of(tensors)
    # Wide types first: every tensor then begins at a multiple of its item size.
    names = sorted(tensors, key=lambda name: -DTYPES[tensors.specs[name].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        spec = tensors.specs[name]
        header[name] = {"dtype": CODES[spec.dtype], "shape": spec.shape,
                        "data_offsets": (position, position + spec.nbytes)}
        position += spec.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, StreamedFile(temporary) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for block in tensors.blocks(name):
                file.write(raw_bytes(block))
        assert file.tell() == 8 + len(text) + position, "every tensor has the bytes that its spec says"
    return Path(path)
