"""Named arrays that are read when asked for, and the types that weights are stored in.

NumPy has no bfloat16; that of ml_dtypes takes its place. Arrays of MindSpore have one of their own, with the same name
and the same bytes, which NumPy cannot convert: `cast` and `raw_bytes` take both.

    cast(weights["transformer.output_layer.weight"], "float32")
"""

import mmap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Through `str`, which leaves a byte order that is the machine's unsaid: MindSpore 2.7 takes no array that says it.
DTYPES = {name: np.dtype(np.dtype(name).newbyteorder("<").str) for name in (
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")}
DTYPES["bfloat16"] = BFLOAT16
FLOATS = ("float64", "float32", "float16", "bfloat16")
BLOCK = 8 << 20  # bytes of a tensor that are read, or held by a writer, at a time


class TensorSpec(NamedTuple):
    """Type and shape of an array: known without reading it."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class Tensors(Mapping[str, np.ndarray]):
    """Names to arrays; an array is read when it is asked for, types and shapes are in `specs` at once.

    metadata: text that stands beside the arrays in a file.
    blocks: gives the values of one name in row order, in flat arrays of about `BLOCK` bytes: what a writer holds in
    memory. By default cut from the array.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], read: Callable[[str], np.ndarray],
                 metadata: Mapping[str, str] | None = None,
                 blocks: Callable[[str], Iterable[np.ndarray]] | None = None):
        self.specs = dict(specs)
        self.metadata = dict(metadata or {})
        self._read = read
        self.blocks = blocks or (lambda name: cut(read(name)))

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Tensors":
        """Wrap any mapping of arrays; one that is `Tensors` already stays as it is."""
        if isinstance(arrays, cls):
            return arrays
        specs = {name: TensorSpec(array.dtype.name, array.shape) for name, array in arrays.items()}
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

    def select(self, names: Iterable[str]) -> "Tensors":
        """Some of the tensors, in this order."""
        return Tensors({name: self.specs[name] for name in names}, self._read, self.metadata, self.blocks)


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, read when they are looked at; raises ValueError for one that is empty or cannot be read."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as err:
        raise ValueError(f"it cannot be read ({err.strerror})") from err
    except ValueError as err:  # mmap's
        raise ValueError("it is empty, 0 bytes") from err


def release(array: np.ndarray) -> None:
    """Let go of the pages of the mapped file behind an array, which count as this process's memory once they are read.

    The array stays valid: what is looked at again comes back from the file.
    """
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap):
        array.madvise(mmap.MADV_DONTNEED)


def cut(array: np.ndarray) -> Iterator[np.ndarray]:
    """Cut an array into flat blocks; one that does not lie in row order is copied block by block."""
    if array.flags.c_contiguous:
        flat, step = array.reshape(-1), BLOCK // array.itemsize
        yield from (flat[start:start + step] for start in range(0, flat.size, step))
    else:
        step = max(1, BLOCK * len(array) // array.nbytes)  # rows
        yield from (np.ascontiguousarray(array[start:start + step]).reshape(-1) for start in range(0, len(array), step))
    release(array)


def _cast(values: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """Values in another floating type, and how many finite ones became infinite."""
    if values.dtype.name == "bfloat16":
        values = values.view(BFLOAT16)  # of MindSpore's type as well
    with np.errstate(over="ignore", invalid="ignore"):  # counted; a NaN stays one
        result = values.astype(DTYPES[dtype])
        if dtype == "float32" and values.itemsize <= 4:
            return result, 0  # it holds them all
        return result, int(np.count_nonzero(np.isinf(result)) - np.count_nonzero(np.isinf(values)))


def cast(array: np.ndarray, dtype: str, name: str = "tensor") -> np.ndarray:
    """Give the values in another floating type; integers, and values of that type already, come back as they are.

    dtype: "float32", "float16" or "bfloat16". Rounds to nearest, ties to even.
    Warns, with `name`, of values that the type cannot hold (for float16 above 65504): they become infinite.
    """
    if array.dtype.name == dtype or array.dtype.name not in FLOATS:
        return array
    result, overflows = _cast(array, dtype)
    if overflows:
        warnings.warn(f"{name}: {overflows} of {array.size} values are beyond {dtype} and became infinite; "
                      "keep the type that they have", stacklevel=2)
    return result


def cast_tensors(tensors: Tensors, dtype: str, overflows: Counter[str]) -> Tensors:
    """The same tensors in another floating type ("keep": their own), each cast when it is read; integers stay.

    overflows: counts, for each name, the values read through `blocks` that became infinite.
    """
    if dtype == "keep":
        return tensors

    def blocks(name: str) -> Iterator[np.ndarray]:
        for block in tensors.blocks(name):
            if specs[name] != tensors.specs[name]:
                block, count = _cast(block, dtype)
                if count:
                    overflows[name] += count
            yield block

    specs = {name: TensorSpec(dtype, spec.shape) if spec.dtype in FLOATS else spec
             for name, spec in tensors.specs.items()}
    return Tensors(specs, lambda name: cast(tensors[name], dtype, name), tensors.metadata, blocks)


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in row order, little-endian, without a copy where it lies so already."""
    if array.dtype.name != "bfloat16":
        array = array.astype(DTYPES[array.dtype.name], copy=False)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
