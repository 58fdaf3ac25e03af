"""Writing weights: one file or a folder of shards, whole or not at all, with checksums; in the published form, too.

    write_weights("glm3_6b.safetensors", tensors)
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.files import atomic_folder, atomic_write
from glm3kit.weights.formats.ckpt import write_ckpt
from glm3kit.weights.formats.safetensors import write_safetensors
from glm3kit.weights.hub_files import MINDSPORE_FORMS, cut_into_shards, index_name, index_text
from glm3kit.weights.manifest import is_written_folder, manifest_entry, read_manifest, with_checksums, write_manifest
from glm3kit.weights.names import EMBEDDING, INV_FREQ, hf_name
from glm3kit.weights.tensors import Tensors, TensorSpec, cast

ROOM = 10_000_000  # bytes beside the tensors: headers, index, manifest, tokenizer


def destination_faults(path: Path, nbytes: int, as_folder: bool, force: bool) -> list[str]:
    """Why weights of this size cannot be written there: the name, what stands in the way, the room on the disk."""
    faults = []
    if path.suffix not in MINDSPORE_FORMS and not as_folder:
        faults.append(f"{path}: the name of the result says its form; end it with .ckpt or .safetensors")
    if path.exists() and path.is_dir() != as_folder:
        faults.append(f"{path}: is a {'folder' if path.is_dir() else 'file'}, the result is none; give another name")
    elif path.is_dir() and force and not is_written_folder(path):
        faults.append(f"{path}: a folder that convert did not write is not replaced; remove it, or give another name")
    elif path.exists() and not force:
        faults.append(f"{path}: exists already; give another name, or --force (force=True) to replace it")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes + ROOM:
        unfinished = [entry.name for entry in parent.glob(f".{path.name}.*.tmp")]
        faults.append(f"{path}: needs {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room" + (
            f", such as by removing what a killed run has left: {', '.join(unfinished)}" if unfinished else ""))
    return faults


def write_weights(path: str | Path, tensors: Tensors, *, max_shard_size: int | None = None,
                  about: Mapping[str, Any] | None = None, beside: Mapping[str, bytes] | None = None,
                  force: bool = False, progress: bool = True) -> Path:
    """Write tensors to one file, or to a folder of shards with their index, in blocks, with a progress bar in bytes.

    path: a file, its form named by .ckpt or .safetensors. With `max_shard_size` (bytes of tensors a shard) a folder;
    its shards have the form that its suffix names, without one .safetensors.
    about: what `manifest.json` says beside the checksums. beside: other files for the folder, by name.
    The result appears whole or not at all, and an existing one is replaced only with `force`.
    Raises CheckpointError, before anything is written, for another suffix, a destination that exists, a full disk.
    Example: write_weights("glm3_6b", tensors, max_shard_size=2 * 10**9)
    """
    path = Path(path)
    if faults := destination_faults(path, tensors.nbytes, bool(max_shard_size), force):
        raise CheckpointError("\n".join(faults))
    with (tqdm(total=tensors.nbytes, unit="B", unit_scale=True, desc=path.name, disable=not progress) as bar,
          ThreadPoolExecutor(1, "checksums") as thread):
        digests: dict[str, Any] = {}
        watched = with_checksums(tensors, thread, digests, bar.update)
        if max_shard_size:
            suffix = path.suffix if path.suffix in MINDSPORE_FORMS else ".safetensors"
            shards = cut_into_shards(tensors.specs, max_shard_size, suffix)
            others = {index_name(suffix): index_text(tensors.specs, shards), **(beside or {})}
            destination = atomic_folder(path)
        else:
            shards, others, destination = {path.name: list(tensors)}, None, nullcontext(path.parent)
            known = read_manifest(path.parent)
            if known.pop(path.name, None):  # it must not tell of an earlier file, should we be killed
                write_manifest(path.parent, known)
        with destination as folder:
            for file, names in shards.items():
                if file.endswith(".ckpt"):
                    write_ckpt(folder / file, watched.select(names))
                else:
                    write_safetensors(folder / file, watched.select(names), tensors.metadata or {"format": "ms"})
            for file, content in (others or {}).items():
                atomic_write(folder / file, content)
            thread.shutdown()  # when the last checksums are done
            entries = {file: manifest_entry(tensors.select(names), digests, about or {})
                       for file, names in shards.items()}
            write_manifest(folder, read_manifest(folder) | entries, others)
    return path


def published_tensors(weights: Tensors, cfg: ModelConfig) -> Tensors:
    """Weights under the published names, with the rotary constants that the official code expects."""
    half = cfg.kv_channels // 2  # half a head is rotated, in pairs
    dtype = weights.specs[EMBEDDING].dtype
    inv_freq = cast(1 / 10000 ** (np.arange(0, half, 2) / half), dtype)
    stored = {hf_name(name): name for name in weights}
    specs = {name: weights.specs[own] for name, own in stored.items()} | {INV_FREQ: TensorSpec(dtype, inv_freq.shape)}
    return Tensors(specs, lambda name: weights[stored[name]] if name in stored else inv_freq, {"format": "pt"},
                   lambda name: weights.blocks(stored[name]) if name in stored else [inv_freq])
