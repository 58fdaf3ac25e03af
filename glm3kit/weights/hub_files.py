"""Files of weights: the forms that are read, which files belong together, what their index says, how to cut new ones.

The index is the hub's: `{"metadata": {"total_size": bytes}, "weight_map": {"tensor name": "file name"}}`.

    files, weight_map = weight_files(Path("chatglm3-6b"))
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from pydantic import ByteSize, TypeAdapter, ValidationError

from glm3kit.errors import CheckpointError
from glm3kit.weights.formats.ckpt import read_ckpt
from glm3kit.weights.formats.safetensors import read_safetensors
from glm3kit.weights.formats.torch import read_torch
from glm3kit.weights.tensors import Tensors, TensorSpec

# Where a folder holds several forms, the first is read.
READERS: dict[str, Callable[[Path], Tensors]] = {
    ".safetensors": read_safetensors, ".ckpt": read_ckpt, ".bin": read_torch, ".pth": read_torch}
MINDSPORE_FORMS = (".ckpt", ".safetensors")  # what MindSpore saves, and the kit writes
INDEXES = ("model.safetensors.index.json", "model.ckpt.index.json", "pytorch_model.bin.index.json")
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")


def index_name(suffix: str) -> str:
    """The name of the index beside shards that end with `suffix`."""
    return f"model{suffix}.index.json"


def _left_out(names: list[str]) -> list[str]:
    """The files that the numbers of others ("-00001-of-00007") promise, and that are not among them."""
    families = {(found[1], found[3], found[4]) for name in names if (found := NUMBERED.fullmatch(name))}
    promised = {f"{stem}-{number:05d}-of-{total}{suffix}"
                for stem, total, suffix in families for number in range(1, int(total) + 1)}
    return sorted(promised - set(names))


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def read_index(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards that an index names, and which of them should hold each tensor.

    Raises CheckpointError for what is no index, names a file outside its folder or one that is not there, or leaves
    one of the numbered shards out.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        raise CheckpointError(f"{index}: no index of weights: {err!r}; expected "
                              '{"weight_map": {"tensor name": "file name"}}; get the file again') from err
    if outside:
        tensors = [tensor for tensor, name in weight_map.items() if name in outside]
        raise CheckpointError(f"{index}: names a file outside its folder: {_some(outside)}, for '{tensors[0]}'; "
                              "do not use weights of this source")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} files are not in the folder: "
                              f"{_some(missing)}; get them too")
    left_out = _left_out(names)
    if left_out:
        raise CheckpointError(f"{index}: its files are numbered, and it leaves out {_some(left_out)}; get it again")
    return [index.parent / name for name in names], weight_map


def weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that make up the weights at `path`, and which of them an index (else nothing) has each tensor in.

    Raises CheckpointError, beside what `read_index` raises, for a path without weights in a form that is read, and a
    folder without index in which a numbered shard is missing.
    """
    if path.is_file() and path.suffix in READERS:
        return [path], {}
    if path.is_dir():
        for index in INDEXES:
            if (path / index).is_file():
                return read_index(path / index)
        for suffix in READERS:
            if files := sorted(path.glob(f"*{suffix}")):
                if left_out := _left_out([file.name for file in files]):
                    raise CheckpointError(f"{path}: its files are numbered, and {_some(left_out)} is not there; get it "
                                          "too")
                return files, {}
        found = sorted(file.name for file in path.iterdir())
        what = f"holds no weights of these forms, but {', '.join(found[:10]) or 'nothing'}"
    elif path.exists():
        what = f"weights in the form '{path.suffix}' are not read"
    else:
        what = "no such file or folder"
    raise CheckpointError(f"{path}: {what}; read are a hub folder of .safetensors or .bin with its index, a "
                          ".safetensors, .bin or .pth file, MindSpore's .ckpt, and a folder of any of them")


def cut_into_shards(specs: Mapping[str, TensorSpec], max_size: int, suffix: str) -> dict[str, list[str]]:
    """Which tensors to write to which file: in their order, each file up to `max_size` bytes of tensors.

    A tensor that is larger has a file of its own.
    Example: -> {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}
    """
    shards: list[list[str]] = []
    room = 0
    for name, spec in specs.items():
        if not shards or spec.nbytes > room:
            shards.append([])
            room = max_size
        shards[-1].append(name)
        room -= spec.nbytes
    return {f"model-{number:05d}-of-{len(shards):05d}{suffix}": names for number, names in enumerate(shards, 1)}


def index_text(specs: Mapping[str, TensorSpec], shards: Mapping[str, list[str]]) -> str:
    """The content of the index of these shards."""
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
             "weight_map": {name: file for file, names in shards.items() for name in names}}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: "2GB", "500 MB", "1.5GiB", "4096".

    Raises CheckpointError for another text, for less than a byte, and for what no disk holds.
    """
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = 0
    if not 1 <= size < 10**15:
        raise CheckpointError(f"'{text}' is no size; write it as 2GB, 500MB or a number of bytes")
    return size
