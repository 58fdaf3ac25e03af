"""Named arrays that are read when asked for, and the types that weights are stored in.

NumPy has no bfloat16. A bfloat16 array here has the type `BFLOAT16`, two opaque bytes a value (as the buffers of
MindSpore and ml_dtypes have): arithmetic on it is refused rather than wrong, and `cast` gives numbers.

    cast(weights["transformer.output_layer.weight"], "float32")
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import numpy as np

BFLOAT16 = np.dtype("V2")
# Through `str`, which leaves a byte order that is the machine's unsaid: MindSpore 2.7 takes no array that says it.
DTYPES = {name: np.dtype(np.dtype(name).newbyteorder("<").str) for name in (
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")}
DTYPES["bfloat16"] = BFLOAT16
FLOATS = ("float64", "float32", "float16", "bfloat16")
CHUNK = 1 << 24  # values cast at a time: 532 MB of embeddings need no second copy in float32


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
    """

    def __init__(self, specs: Mapping[str, TensorSpec], read: Callable[[str], np.ndarray],
                 metadata: Mapping[str, str] | None = None):
        self.specs = dict(specs)
        self.metadata = dict(metadata or {})
        self._read = read

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


def _to_float32(values: np.ndarray) -> np.ndarray:
    if dtype_name(values.dtype) != "bfloat16":
        return values.astype(np.float32)
    return (values.view("<u2").astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half of a float32


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = _to_float32(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    not_a_number = (bits & 0x7FFFFFFF) > 0x7F800000  # rounding up could turn it into a number
    return np.where(not_a_number, bits >> 16 | 0x40, rounded).astype("<u2").view(BFLOAT16)


def cast(array: np.ndarray, dtype: str, name: str = "tensor") -> np.ndarray:
    """Give the values in another floating type; integers, and values of that type already, come back as they are.

    dtype: "float32", "float16" or "bfloat16". Rounds to nearest, ties to even.
    Warns, with `name`, of values that float16 cannot hold (above 65504): they become infinite.
    """
    source = dtype_name(array.dtype)
    if source == dtype or source not in FLOATS:
        return array
    flat = np.ascontiguousarray(array).reshape(-1)
    result = np.empty(flat.shape, DTYPES[dtype])
    overflows = 0
    for start in range(0, flat.size, CHUNK):
        part = flat[start:start + CHUNK]
        if dtype == "bfloat16":
            result[start:start + CHUNK] = _to_bfloat16(part)
            continue
        numbers = _to_float32(part) if source == "bfloat16" else part
        with np.errstate(over="ignore"):  # counted below
            result[start:start + CHUNK] = numbers.astype(DTYPES[dtype])
        if dtype == "float16":
            overflows += int(np.isinf(result[start:start + CHUNK]).sum() - np.isinf(numbers).sum())
    if overflows:
        warnings.warn(f"{name}: {overflows} of {flat.size} values are beyond float16 (65504) and became infinite; "
                      "keep bfloat16 or float32", stacklevel=2)
    return result.reshape(array.shape)


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in row order, little-endian, without a copy where it lies so already."""
    spec = TensorSpec(dtype_name(array.dtype), array.shape)
    if spec.dtype != "bfloat16":
        array = array.astype(DTYPES[spec.dtype], copy=False)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
