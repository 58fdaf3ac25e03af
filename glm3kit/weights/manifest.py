"""`manifest.json`: what `convert` and `merge` wrote into a folder, with a checksum a tensor.

For each file of weights: `tool`, where they came from, and `tensors`, each with type, shape and the SHA-256 of its
bytes in row order. SHA-256, for processors have instructions for it (measured: 1.6 GB/s, twice as fast as BLAKE2), and
nobody can make other weights with the same sums.

    read_manifest(Path("models"))["glm3_6b.safetensors"]["tool"]
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from glm3kit import __version__
from glm3kit.errors import CheckpointError
from glm3kit.files import atomic_write
from glm3kit.weights.tensors import Tensors, raw_bytes

MANIFEST = "manifest.json"
TENSOR = {"dtype", "shape", "sha256"}  # what is said of a tensor
AHEAD = 4  # blocks of a tensor that may wait for their checksum


def with_checksums(tensors: Tensors, thread: ThreadPoolExecutor, digests: dict[str, Any],
                   on_bytes: Callable[[int], object]) -> Tensors:
    """The same tensors; what is read of them in blocks is summed up in `digests`, beside the writing.

    thread: one, for a sum takes its blocks in their order; the sums are whole when it has shut down.
    on_bytes: told the size of each block that has been used.
    """
    waiting: deque[Future] = deque()

    def blocks(name: str) -> Iterator[np.ndarray]:
        digest = digests[name] = hashlib.sha256()
        for block in tensors.blocks(name):
            waiting.append(thread.submit(digest.update, raw_bytes(block)))
            yield block
            on_bytes(block.nbytes)
            if len(waiting) > AHEAD:
                waiting.popleft().result()

    return Tensors(tensors.specs, tensors.__getitem__, tensors.metadata, blocks)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest of a folder says of each file; empty if there is none.

    Raises CheckpointError for a manifest.json that is not the kit's.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            if Path(name).name != name or any(known.keys() != TENSOR for known in entry["tensors"].values()):
                raise ValueError(f"not what it says of a file: {name!r:.80}")
        return files
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        raise CheckpointError(f"{path}: not written by glm3kit, or damaged ({err!r}); move it away") from err


def is_written_folder(folder: Path) -> bool:
    """Whether a folder is as `write_weights` made it, with shards, and holds nothing else."""
    known = {*read_manifest(folder), MANIFEST}
    beside = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("beside") if len(known) > 1 else None
    return isinstance(beside, list) and {path.name for path in folder.iterdir()} <= known.union(map(str, beside))


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]], beside: Iterable[str] | None = None) -> None:
    """Write what is known of each file of weights in a folder; beside: all other files, where it is one of shards."""
    content = {"files": files} | ({} if beside is None else {"beside": sorted(beside)})
    atomic_write(folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def manifest_entry(tensors: Tensors, digests: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of a file with these tensors."""
    return {"tool": f"glm3kit {__version__}", **about,
            "tensors": {name: {"dtype": spec.dtype, "shape": list(spec.shape), "sha256": digests[name].hexdigest()}
                        for name, spec in tensors.specs.items()}}


def sha256(tensors: Tensors, name: str) -> str:
    """The checksum of one tensor, in hexadecimal."""
    digest = hashlib.sha256()
    for block in tensors.blocks(name):
        digest.update(raw_bytes(block))
    return digest.hexdigest()
