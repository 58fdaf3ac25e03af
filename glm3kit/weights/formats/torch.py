"""Reading PyTorch's .bin and .pth files without PyTorch, memory-mapped and a tensor at a time; nothing in them runs.

Two forms (torch/serialization.py). Since 1.6 a zip archive: `NAME/data.pkl` says which tensors there are, each storage
is a stored member `NAME/data/KEY`. Before, the legacy form: pickles one after the other (a number that says so, the
version, the byte order, the tensors, the keys of the storages), then each storage as 8 bytes with its size and its
values. `torch_pickle` reads the pickles as data.

    tensors = read_torch("glm3_6b.pth"); tensors.specs; tensors["transformer.output_layer.weight"]
"""

import mmap
import re
import zipfile
from pathlib import Path

import numpy as np

from glm3kit.errors import CheckpointError
from glm3kit.weights.formats.torch_pickle import Refused, TensorRef, read_state_dict, read_value
from glm3kit.weights.tensors import DTYPES, Tensors, map_file

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
MAX_PICKLE = 64 << 20  # bytes of data.pkl; that of ChatGLM3-6B has 40,000
LOCAL_HEADER = 30  # bytes, before the name and the extra field of a zip member
Places = dict[str, tuple[int, int]]  # key of a storage: its first byte, its bytes


def _place(data: mmap.mmap, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a member are: (first byte, their number)."""
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise Refused(f"its member '{member.filename}' is compressed, which torch.save never does")
    if member.flag_bits & 1:
        raise Refused(f"its member '{member.filename}' is encrypted")
    head = data[member.header_offset:member.header_offset + LOCAL_HEADER]
    first = member.header_offset + LOCAL_HEADER + sum(int.from_bytes(head[at:at + 2], "little") for at in (26, 28))
    if head[:4] != b"PK\x03\x04" or first + member.file_size > len(data):
        raise Refused(f"its member '{member.filename}' of {member.file_size} bytes is not where the archive says")
    return first, member.file_size


def _open_zip(data: mmap.mmap) -> tuple[dict[str, TensorRef], Places]:
    """The tensors of an archive and where their storages are."""
    try:
        with zipfile.ZipFile(data) as archive:
            members = {member.filename: member for member in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as err:
        raise Refused(f"its zip archive is cut off or damaged ({err})") from err
    folders = [name.removesuffix("data.pkl") for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(folders) != 1:
        raise Refused(f"a zip archive with {len(folders)} files NAME/data.pkl, expected one")
    (folder,) = folders

    def content(name: str) -> bytes:
        first, size = _place(data, members[folder + name])
        if size > MAX_PICKLE:
            raise Refused(f"its {name} has {size} bytes, expected at most {MAX_PICKLE}")
        return data[first:first + size]

    if f"{folder}byteorder" in members and (order := content("byteorder")) != b"little":
        raise Refused(f"its byte order is {order!r:.20}, read is b'little'")
    refs = read_state_dict(content("data.pkl"))
    places = {}
    for name, ref in refs.items():
        member = members.get(f"{folder}data/{ref.storage.key}")
        try:
            if member is None:
                raise Refused(f"its storage '{ref.storage.key}' is not in the archive")
            places[ref.storage.key] = _place(data, member)
        except Refused as err:
            raise Refused(f"tensor '{name}': {err}") from None
    return refs, places


def _open_legacy(data: mmap.mmap) -> tuple[dict[str, TensorRef], Places]:
    """The tensors of a file of the legacy form and where their storages are."""
    magic = read_value(data)
    if magic != LEGACY_MAGIC:
        raise Refused(f"it begins with {str(magic)[:40]}, no file of PyTorch does")
    version, system = read_value(data), read_value(data)
    if version != LEGACY_VERSION:
        raise Refused(f"it has version {str(version)[:40]}, read is {LEGACY_VERSION}")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("its byte order is not little-endian")
    refs = read_state_dict(data)
    keys = read_value(data)
    used = {ref.storage.key: (name, ref.storage) for name, ref in refs.items()}
    if type(keys) is not list or sorted(map(str, keys)) != sorted(used):
        raise Refused("its list of storages is not that of its tensors")
    places, position = {}, data.tell()
    for key in map(str, keys):
        name, storage = used[key]
        size = int.from_bytes(data[position:position + 8], "little")
        if size != storage.size:
            raise Refused(f"tensor '{name}': its storage has {size} values, expected {storage.size}")
        places[key] = position + 8, storage.nbytes
        position += 8 + storage.nbytes
        if position > len(data):
            raise Refused(f"tensor '{name}': the file ends {position - len(data)} bytes before its storage does")
    return refs, places


def _check_window(name: str, ref: TensorRef, nbytes: int) -> None:
    """Refuse a tensor that is not inside its storage, or that repeats values of it."""
    if nbytes != ref.storage.nbytes:
        raise Refused(f"tensor '{name}': its storage '{ref.storage.key}' of {ref.storage.size} {ref.storage.dtype} "
                      f"needs {ref.storage.nbytes} bytes, it has {nbytes}")
    span = sum((size - 1) * stride for size, stride in zip(ref.shape, ref.strides, strict=True))
    window = f"tensor '{name}' of shape {list(ref.shape)} and strides {list(ref.strides)} from {ref.offset}"
    if 0 not in ref.shape and ref.offset + span >= ref.storage.size:
        raise Refused(f"{window} points outside its storage of {ref.storage.size} values")
    if ref.spec.nbytes > nbytes:
        raise Refused(f"{window} repeats the values of a storage of {ref.storage.size}")


def read_torch(path: str | Path) -> Tensors:
    """Open a .bin or .pth file that holds a state_dict: types and shapes at once, a tensor's bytes when asked for.

    The arrays are read-only views of the mapped file, with the strides that the file says.
    Raises CheckpointError, with the tensor where it is one, for a file that is cut off or damaged, holds anything but
    tensors, has a compressed member, or a tensor outside its storage.
    """
    path = Path(path)
    try:
        data = map_file(path)
        refs, places = (_open_zip if data[:4] == b"PK\x03\x04" else _open_legacy)(data)
        for name, ref in refs.items():
            _check_window(name, ref, places[ref.storage.key][1])
    except ValueError as err:
        raise CheckpointError(f"{path}: not read, for it is no state_dict of PyTorch, or a damaged one: {err}; get it "
                              "again, or take the .safetensors of the model") from err

    def read(name: str) -> np.ndarray:
        ref = refs[name]
        dtype = DTYPES[ref.storage.dtype]
        first = places[ref.storage.key][0] + ref.offset * dtype.itemsize
        strides = tuple(stride * dtype.itemsize for stride in ref.strides)
        return np.ndarray(ref.shape, dtype, data, first, strides)

    return Tensors({name: ref.spec for name, ref in refs.items()}, read)
