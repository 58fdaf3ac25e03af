"""ChatGLM3's weights in any form: reading them under MindSpore's names, writing them, loading them into a model.

A file is mapped into memory and a tensor is read when it is needed, so 12 GB of weights need the memory of one tensor.
Names: `weight_names`; the forms of files: `safetensors_file`, `ckpt_file`, `torch_file`; several of them: `shards`.

    read_weights("chatglm3-6b")["transformer.output_layer.weight"]
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import CheckpointError
from glm3kit.files import atomic_folder, atomic_write
from glm3kit.weights.formats.ckpt import read_ckpt, write_ckpt
from glm3kit.weights.formats.safetensors import read_safetensors, write_safetensors
from glm3kit.weights.formats.torch import read_torch
from glm3kit.weights.hub_files import cut_into_shards, index_name, index_text, weight_files
from glm3kit.weights.manifest import Checksums, is_written_folder, manifest_entry, read_manifest, write_manifest
from glm3kit.weights.names import EMBEDDING, INV_FREQ, TRAINING_STATE, hf_name, place
from glm3kit.weights.tensors import Tensors, TensorSpec, cast

if TYPE_CHECKING:
    pass

READERS: dict[str, Callable[[Path], Tensors]] = {
    ".safetensors": read_safetensors, ".ckpt": read_ckpt, ".bin": read_torch, ".pth": read_torch}
WRITTEN = (".ckpt", ".safetensors")
ROOM = 10_000_000  # bytes beside the tensors: headers, index, manifest, tokenizer


class Weights(Tensors):
    """Lazy weights under MindSpore's names.

    origin: name -> the (file, name there) of its parts; one but for fused tensors that are stored in parts.
    dropped: what the files hold beside the weights, left out on purpose: rotary constants, optimizer state.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], opened: Mapping[Path, Tensors],
                 origin: Mapping[str, tuple[tuple[Path, str], ...]], dropped: Iterable[str]):
        def read(name: str) -> np.ndarray:
            parts = [opened[file][stored] for file, stored in origin[name]]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        def pieces(name: str) -> Iterator[np.ndarray]:
            for file, stored in origin[name]:
                yield from opened[file].pieces(stored)

        super().__init__(specs, read, pieces=pieces)
        self.origin = dict(origin)
        self.dropped = tuple(dropped)


def _fused(name: str, parts: list[TensorSpec]) -> TensorSpec:
    """Type and shape of parts along the first axis; raises ValueError if they do not fit together."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({(spec.dtype, spec.shape[1:]) for spec in parts}) > 1 or () in [spec.shape for spec in parts]:
        raise ValueError(f"'{name}' is stored in parts that do not fit together: "
                         f"{', '.join(f'{spec.dtype} {list(spec.shape)}' for spec in parts)}")
    return TensorSpec(first.dtype, (sum(spec.shape[0] for spec in parts), *first.shape[1:]))


def read_weights(path: str | Path) -> Weights:
    """Open weights of any form: a mapping of MindSpore names to arrays, each read when it is asked for.

    path: a hub folder with the index of its .safetensors or .bin, such a file, a .pth, a .ckpt, or a folder of them.
    Names are the published ones, MindFormers' (later ones and their split tensors too), or those of Transformers' GLM.
    What names do not tell: MindFormers' option use_rearrange_rope stores the rows of wq and wk in another order.
    bfloat16 arrays have the type `glm3kit.weights.tensors.BFLOAT16`; `glm3kit.weights.tensors.cast` gives numbers.
    Raises CheckpointError for files that are missing, cut off, damaged or of another form, an index that names a file
    outside its folder or leaves one out, and tensors that are missing from their shard, stand twice or lack a part.
    Example: read_weights("chatglm3-6b").specs["transformer.output_layer.weight"].shape
    """
    path = Path(path)
    files, weight_map = weight_files(path)
    opened = {file: READERS[file.suffix](file) for file in files}
    faults = [f"'{name}' is not in {file}, where the index has it" for name, file in weight_map.items()
              if name not in opened[path / file]]
    parts: dict[str, dict[int, tuple[Path, str]]] = {}
    counts: dict[str, int] = {}
    dropped = []
    for file, tensors in opened.items():
        for stored in tensors:
            name, index, count = place(stored)
            if name == INV_FREQ or TRAINING_STATE.fullmatch(name):
                dropped.append(stored)
            elif counts.setdefault(name, count) != count or index in parts.setdefault(name, {}):
                other, _ = next(iter(parts[name].values()))
                faults.append(f"'{name}' is both in {other.name} and in {file.name}; "
                              "keep one, or give the path of one file")
            else:
                parts[name][index] = file, stored
    specs: dict[str, TensorSpec] = {}
    origin: dict[str, tuple[tuple[Path, str], ...]] = {}
    for name, found in parts.items():
        origin[name] = tuple(found[index] for index in sorted(found))
        if len(found) < counts[name]:
            faults.append(f"'{name}' is stored in {counts[name]} parts, there are only "
                          f"{', '.join(stored for _, stored in origin[name])}")
            continue
        try:
            specs[name] = _fused(name, [opened[file].specs[stored] for file, stored in origin[name]])
        except ValueError as err:
            faults.append(str(err))
    if faults:
        raise CheckpointError(f"{path}: {len(faults)} faults\n  " + "\n  ".join(faults))
    return Weights(specs, opened, origin, dropped)


def shape_faults(specs: Mapping[str, TensorSpec], expected: Mapping[str, tuple[int, ...]], by: str) -> list[str]:
    """Every difference between weights and the shapes that `by` asks for, and at the end the advice; empty if none."""
    faults = [f"missing: '{name}' {list(shape)}" for name, shape in expected.items() if name not in specs]
    faults += [f"surplus: '{name}' {list(spec.shape)}" for name, spec in specs.items() if name not in expected]
    faults += [f"shape: '{name}' is {list(specs[name].shape)}, expected {list(shape)}"
               for name, shape in expected.items() if name in specs and specs[name].shape != shape]
    if not faults:
        return []
    advice = f"use the weights and {by} of one model"
    stored, wanted = specs.get(EMBEDDING), expected.get(EMBEDDING)
    if stored and wanted and stored.shape[:1] != wanted[:1]:
        advice = (f"the weights have a vocabulary of {stored.shape[0]} rows, {by} asks for {wanted[0]}: "
                  f"set padded_vocab_size to {stored.shape[0]}, or use weights of this vocabulary")
    return [f"{len(faults)} tensors do not fit {by}:", *(f"  {fault}" for fault in faults), advice]


def destination_faults(path: Path, nbytes: int, as_folder: bool, force: bool) -> list[str]:
    """Why weights of this size cannot be written there: the name, what stands in the way, the room on the disk."""
    faults = []
    if path.suffix not in WRITTEN and not as_folder:
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


def _write_file(path: Path, tensors: Tensors) -> None:
    if path.suffix == ".ckpt":
        write_ckpt(path, tensors)
    else:
        write_safetensors(path, tensors, tensors.metadata or {"format": "ms"})


def write_weights(path: str | Path, tensors: Tensors, *, max_shard_size: int | None = None,
                  about: Mapping[str, Any] | None = None, beside: Mapping[str, bytes] | None = None,
                  force: bool = False, progress: bool = True) -> Path:
    """Write tensors to one file, or to a folder of shards with their index, in pieces, with a progress bar in bytes.

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
    suffix = path.suffix if path.suffix in WRITTEN else ".safetensors"
    bar = tqdm(total=tensors.nbytes, unit="B", unit_scale=True, desc=path.name, disable=not progress)

    def counted(name: str) -> Iterator[np.ndarray]:
        for piece in tensors.pieces(name):
            yield piece
            bar.update(piece.nbytes)

    with bar, Checksums() as checksums:
        watched = checksums.watch(Tensors(tensors.specs, tensors.__getitem__, tensors.metadata, counted))
        if max_shard_size:
            shards = cut_into_shards(tensors.specs, max_shard_size, suffix)
            with atomic_folder(path) as folder:
                for file, names in shards.items():
                    _write_file(folder / file, watched.select(names))
                index = {index_name(suffix): index_text(tensors.specs, shards)}
                others: dict[str, str | bytes] = {**index, **(beside or {})}
                for file, content in others.items():
                    atomic_write(folder / file, content)
                sums = checksums.finish()
                write_manifest(folder, {file: manifest_entry(tensors.select(names), sums, about or {})
                                        for file, names in shards.items()}, beside=others)
        else:
            entries = read_manifest(path.parent)
            if entries.pop(path.name, None):  # it must not tell of an earlier file, should we be killed
                write_manifest(path.parent, entries)
            _write_file(path, watched)
            entry = manifest_entry(tensors, checksums.finish(), about or {})
            write_manifest(path.parent, read_manifest(path.parent) | {path.name: entry})
    return path


def published_tensors(weights: Tensors, cfg: ModelConfig) -> Tensors:
    """Weights under the published names, with the rotary constants that the official code expects."""
    half = cfg.kv_channels // 2  # half a head is rotated, in pairs
    dtype = weights.specs[EMBEDDING].dtype
    inv_freq = cast(1 / 10000 ** (np.arange(0, half, 2) / half), dtype)
    stored = {hf_name(name): name for name in weights}
    specs = {name: weights.specs[own] for name, own in stored.items()} | {INV_FREQ: TensorSpec(dtype, inv_freq.shape)}

    def read(name: str) -> np.ndarray:
        return inv_freq if name == INV_FREQ else weights[stored[name]]

    def pieces(name: str) -> Iterable[np.ndarray]:
        return [inv_freq] if name == INV_FREQ else weights.pieces(stored[name])

    return Tensors(specs, read, {"format": "pt"}, pieces)
