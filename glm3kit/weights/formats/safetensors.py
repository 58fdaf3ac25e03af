"""Reading and writing .safetensors files, memory-mapped and a tensor at a time.

The form (https://github.com/huggingface/safetensors): 8 bytes with the length of the header, the header as JSON with
type, shape and place of every tensor, then their bytes one after the other.

    tensors = read_safetensors("model.safetensors"); tensors.specs; tensors["transformer.output_layer.weight"]
"""

import json
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from glm3kit.errors import CheckpointError
from glm3kit.files import StreamedFile, atomic_path
from glm3kit.weights.tensors import DTYPES, Tensors, TensorSpec, raw_bytes

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
         "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL"}
NAMES = {code: name for name, code in CODES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the original reader


def _spec(path: Path, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    """Check one entry of the header: type and shape, first and last byte."""
    try:
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers_fit = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        numbers_fit = False
    if not numbers_fit:
        raise CheckpointError(f"{path}: tensor '{name}': the header says {entry!r}, expected dtype, shape and "
                              "data_offsets; the file is damaged, get it again")
    if code not in NAMES:
        raise CheckpointError(f"{path}: tensor '{name}' has type {code!r}; read are {', '.join(NAMES)}")
    spec = TensorSpec(NAMES[code], tuple(shape))
    if end - start != spec.nbytes:
        raise CheckpointError(f"{path}: tensor '{name}' of type {code} and shape {list(shape)} needs {spec.nbytes} "
                              f"bytes, its place in the file has {end - start}; the file is damaged, get it again")
    return spec, start, end


def read_safetensors(path: str | Path) -> Tensors:
    """Open a .safetensors file: types and shapes at once, a tensor's bytes when it is asked for.

    The arrays are read-only views of the mapped file. `metadata` is the header's text.
    Raises CheckpointError for a file that is cut off, damaged or no safetensors file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path}: {size} bytes, the first 8 of which say that a header of {length} bytes "
                                      "follows; the file is cut off or no safetensors file, get it again")
            header = json.loads(file.read(length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read: {err.strerror}") from err
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: its header is no JSON ({err}); the file is damaged, get it again") from err
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: its header begins {str(header)[:60]!r}, expected names and places of tensors; "
                              "the file is damaged, get it again")

    begin, position = 8 + length, 0
    specs, places = {}, {}
    entries = [(name, *_spec(path, name, entry)) for name, entry in header.items()]
    for name, spec, start, end in sorted(entries, key=lambda entry: entry[2:]):
        if start != position:
            raise CheckpointError(f"{path}: tensor '{name}' starts at byte {start}, the one before it ends at "
                                  f"{position}; the file is damaged, get it again")
        specs[name], places[name], position = spec, begin + start, end
    if begin + position != size:
        raise CheckpointError(f"{path}: {size} bytes, its header describes {begin + position}; "
                              "the file is cut off or damaged, get it again")

    def read(name: str) -> np.ndarray:
        return np.ndarray(specs[name].shape, DTYPES[specs[name].dtype], mapped, places[name])

    return Tensors(specs, read, metadata)


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray],
                      metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a .safetensors file, whole or not at all; lazy `Tensors` are read one at a time.

    metadata: text for the header, such as {"format": "ms"}.
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
            for piece in tensors.pieces(name):
                file.write(raw_bytes(piece))
        assert file.tell() == 8 + len(text) + position, "every tensor has the bytes that its spec says"
