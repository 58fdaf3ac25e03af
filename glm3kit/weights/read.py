"""ChatGLM3's weights in any form, opened under MindSpore's names.

A file is mapped into memory and a tensor is read when it is needed, so 12 GB of weights need the memory of one tensor.

    read_weights("chatglm3-6b")["transformer.output_layer.weight"]
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import numpy as np

from glm3kit.errors import CheckpointError
from glm3kit.weights.hub_files import READERS, weight_files
from glm3kit.weights.names import EMBEDDING, INV_FREQ, TRAINING_STATE, part_of
from glm3kit.weights.tensors import Tensors, TensorSpec

Stored = tuple[Path, str]  # a tensor in a file: the file, the name there


class Weights(Tensors):
    """Lazy weights under MindSpore's names.

    origin: name -> the (file, name there) of its parts; one but for fused tensors that are stored in parts.
    dropped: what the files hold beside the weights, left out on purpose: rotary constants, optimizer state.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], opened: Mapping[Path, Tensors],
                 origin: Mapping[str, tuple[Stored, ...]], dropped: Iterable[str]):
        def read(name: str) -> np.ndarray:
            parts = [opened[file][stored] for file, stored in origin[name]]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        super().__init__(specs, read, blocks=lambda name: chain.from_iterable(
            opened[file].blocks(stored) for file, stored in origin[name]))
        self.origin = dict(origin)
        self.dropped = tuple(dropped)


def _find_parts(opened: Mapping[Path, Tensors]) -> tuple[dict[str, list[Stored | None]], list[str], list[str]]:
    """What files hold: the parts of every parameter (None for one that is missing), what is no weight, and faults."""
    parameters: dict[str, list[Stored | None]] = {}
    dropped, faults = [], []
    for file, stored in ((file, stored) for file, tensors in opened.items() for stored in tensors):
        name, index, count = part_of(stored)
        if name == INV_FREQ or TRAINING_STATE.fullmatch(name):
            dropped.append(stored)
            continue
        parts = parameters.setdefault(name, [None] * count)
        if len(parts) != count or parts[index]:
            other, _ = next(filter(None, parts))
            faults.append(f"'{name}' is both in {other.name} and in {file.name}; "
                          "keep one, or give the path of one file")
        else:
            parts[index] = file, stored
    return parameters, dropped, faults


def _fused(name: str, count: int, parts: Mapping[str, TensorSpec]) -> TensorSpec:
    """Type and shape of `count` parts along the first axis; raises ValueError if some lack, or do not fit together."""
    if len(parts) < count:
        raise ValueError(f"'{name}' is stored in {count} parts, there are only {', '.join(parts)}")
    first, *others = parts.values()
    if not others:
        return first
    if any((spec.dtype, spec.shape[1:]) != (first.dtype, first.shape[1:]) or not spec.shape for spec in parts.values()):
        raise ValueError(f"'{name}' is stored in parts that do not fit together: "
                         f"{', '.join(f'{spec.dtype} {list(spec.shape)}' for spec in parts.values())}")
    return TensorSpec(first.dtype, (sum(spec.shape[0] for spec in parts.values()), *first.shape[1:]))


def read_weights(path: str | Path) -> Weights:
    """Open weights of any form: a mapping of MindSpore names to arrays, each read when it is asked for.

    path: a hub folder with the index of its .safetensors or .bin, such a file, a .pth, a .ckpt, or a folder of them.
    Names are the published ones, MindFormers' (later ones and their split tensors too), or those of Transformers' GLM.
    What names do not tell: MindFormers' option use_rearrange_rope stores the rows of wq and wk in another order.
    Raises CheckpointError for files that are missing, cut off, damaged or of another form, an index that names a file
    outside its folder or leaves one out, and tensors that are missing from their shard, stand twice or lack a part.
    Example: read_weights("chatglm3-6b").specs["transformer.output_layer.weight"].shape
    """
    path = Path(path)
    files, weight_map = weight_files(path)
    opened = {file: READERS[file.suffix](file) for file in files}
    parameters, dropped, twice = _find_parts(opened)
    faults = [f"'{name}' is not in {file}, where the index has it" for name, file in weight_map.items()
              if name not in opened[path / file]] + twice
    specs: dict[str, TensorSpec] = {}
    origin: dict[str, tuple[Stored, ...]] = {}
    for name, parts in parameters.items():
        origin[name] = tuple(filter(None, parts))
        found = {stored: opened[file].specs[stored] for file, stored in origin[name]}
        try:
            specs[name] = _fused(name, len(parts), found)
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
