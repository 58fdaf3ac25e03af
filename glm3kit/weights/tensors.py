"""Named arrays that are read when asked for, and the types that weights are stored in.

NumPy has no bfloat16. A bfloat16 array here has the type `BFLOAT16`, two opaque bytes a value (as the buffers of
MindSpore and ml_dtypes have): arithmetic on it is refused rather than wrong, and `cast` gives numbers.

    cast(weights["transformer.output_layer.weight"], "float32")
"""

import mmap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import numpy as np

BFLOAT16 = np.dtype("V2")
# Through `str`, which leaves a byte order that is the machine's unsaid: MindSpore 2.7 takes no array that says it.
DTYPES = {name: np.dtype(np.dtype(name).newbyteorder("<").str) for name in (
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")}
DTYPES["bfloat16"] = BFLOAT16
FLOATS = ("float64", "float32", "float16", "bfloat16")
CHUNK = 1 << 16  # values cast at a time: they stay in the processor's cache, three times as fast as without
PIECE = 8 << 20  # bytes that a writer holds at a time


class TensorSpec(NamedTuple):
    """Type and shape of an array: known without reading it."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def dtype_name(dtype: np.dtype) -> str:
    """The name of a NumPy type; every two-byte opaque type (ours, MindSpore's, ml_dtypes') is "bfloat16"."""
    return "bfloat16" if dtype.kind == "V" and dtype.itemsize == 2 else dtype.name


class Tensors(Mapping[str, np.ndarray]):
    """Names to arrays; an array is read when it is asked for, types and shapes are in `specs` at once.

    metadata: text that stands beside the arrays in a file.
    pieces: how to get the values of one name bit by bit, where that needs less memory than the array.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], read: Callable[[str], np.ndarray],
                 metadata: Mapping[str, str] | None = None,
                 pieces: Callable[[str], Iterable[np.ndarray]] | None = None):
        self.specs = dict(specs)
        self.metadata = dict(metadata or {})
        self._read = read
        self._pieces = pieces or (lambda name: cut(read(name)))

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Tensors":
        """Wrap any mapping of arrays; one that is `Tensors` already stays as it is."""
        if isinstance(arrays, cls):
            return arrays
        specs = {name: TensorSpec(dtype_name(array.dtype), array.shape) for name, array in arrays.items()}
        return cls(specs, arrays.__getitem__)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.specs:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.specs  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def pieces(self, name: str) -> Iterable[np.ndarray]:
        """The values of one name in row order, in flat arrays of about `PIECE` bytes: what a writer holds in memory."""
        return self._pieces(name)

    def select(self, names: Iterable[str]) -> "Tensors":
        """Some of the tensors, in this order."""
        return Tensors({name: self.specs[name] for name in names}, self._read, self.metadata, self._pieces)


def release(array: np.ndarray) -> None:
    """Let go of the pages of the mapped file behind an array, which count as this process's memory once they are read.

    The array stays valid: what is looked at again comes back from the file.
    """
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def cut(array: np.ndarray) -> Iterator[np.ndarray]:
    """Cut an array into flat pieces; one that does not lie in row order is copied piece by piece."""
    if array.flags.c_contiguous:
        flat, step = array.reshape(-1), PIECE // array.itemsize
        yield from (flat[start:start + step] for start in range(0, flat.size, step))
    else:
        step = max(1, PIECE * len(array) // array.nbytes)  # rows
        yield from (np.ascontiguousarray(array[start:start + step]).reshape(-1) for start in range(0, len(array), step))
    release(array)


def _numbers(values: np.ndarray) -> np.ndarray:
    """Values that NumPy can compute with: bfloat16, which is the upper half of a float32, as that."""
    if dtype_name(values.dtype) != "bfloat16":
        return values
    return (values.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    not_a_number = (bits & 0x7FFFFFFF) > 0x7F800000  # rounding up could turn it into a number
    return np.where(not_a_number, bits >> 16 | 0x40, rounded).astype("<u2").view(BFLOAT16)


def _infinite(values: np.ndarray) -> int:
    if dtype_name(values.dtype) == "bfloat16":
        return int(np.count_nonzero((values.view("<u2") & 0x7FFF) == 0x7F80))
    return int(np.count_nonzero(np.isinf(values)))


def _cast_flat(flat: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """Values in another floating type, and how many finite ones became infinite."""
    result = np.empty(flat.shape, DTYPES[dtype])
    overflows = 0
    for start in range(0, flat.size, CHUNK):
        part, into = flat[start:start + CHUNK], result[start:start + CHUNK]
        with np.errstate(over="ignore"):  # counted
            into[...] = _to_bfloat16(part) if dtype == "bfloat16" else _numbers(part)
        if dtype != "float32" or flat.dtype.itemsize == 8:
            overflows += _infinite(into) - _infinite(part)
    return result, overflows


def cast(array: np.ndarray, dtype: str, name: str = "tensor") -> np.ndarray:
    """Give the values in another floating type; integers, and values of that type already, come back as they are.

    dtype: "float32", "float16" or "bfloat16". Rounds to nearest, ties to even.
    Warns, with `name`, of values that the type cannot hold (for float16 above 65504): they become infinite.
    """
    if dtype_name(array.dtype) == dtype or dtype_name(array.dtype) not in FLOATS:
        return array
    result, overflows = _cast_flat(np.ascontiguousarray(array).reshape(-1), dtype)
    if overflows:
        warnings.warn(f"{name}: {overflows} of {array.size} values are beyond {dtype} and became infinite; "
                      "keep the type that they have", stacklevel=2)
    return result.reshape(array.shape)


def cast_tensors(tensors: Tensors, dtype: str, overflows: Counter[str]) -> Tensors:
    """The same tensors in another floating type, each cast when it is read; integers stay as they are.

    overflows: counts, for each name, the values read through `pieces` that became infinite.
    """
    def pieces(name: str) -> Iterator[np.ndarray]:
        for piece in tensors.pieces(name):
            if specs[name] != tensors.specs[name]:
                piece, count = _cast_flat(piece, dtype)
                if count:
                    overflows[name] += count
            yield piece

    specs = {name: TensorSpec(dtype, spec.shape) if spec.dtype in FLOATS else spec
             for name, spec in tensors.specs.items()}
    return Tensors(specs, lambda name: cast(tensors[name], dtype, name), tensors.metadata, pieces)


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in row order, little-endian, without a copy where it lies so already."""
    spec = TensorSpec(dtype_name(array.dtype), array.shape)
    if spec.dtype != "bfloat16":
        array = array.astype(DTYPES[spec.dtype], copy=False)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
