"""Strategy files: how every parameter of a run is spread over its ranks, on disk.

The form is MindSpore's (mindspore/parallel/_parallel_serialization.py, mindspore/train/node_strategy.proto): for each
parameter `dev_matrix`, the ranks of a pipeline stage as a matrix, the last axis counted fastest; `tensor_map`, for each
axis of the parameter the axis of that matrix which cuts it, counted from the right (-1: whole);
`opt_weight_shard_size`, into how many shards the optimizer's parallelism cuts each slice. This kit adds what fused
weights and its optimizer state need: `segments`, `unit` and `flattened` (see layout.py).

    read_strategy("output/tiny/strategy")["transformer.output_layer.weight"].shards
"""

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from glm3kit.checkpoint.layout import Layout
from glm3kit.errors import CheckpointError
from glm3kit.files import atomic_write
from glm3kit.weights.formats.protobuf import read_message


def write_strategy(path: str | Path, layouts: Mapping[str, Layout]) -> Path:
    """Write the layouts of one stage as a strategy file in MindSpore's JSON form; returns the path."""
    items = {}
    for name, layout in layouts.items():
        items[name] = {
            "dev_matrix": layout.devices, "tensor_map": [axes[0] if axes else -1 for axes in layout.axes],
            "param_split_shape": [], "indices_offset": [], "field": 0,
            "opt_weight_shard_step": layout.step if layout.shards > 1 else 0,
            "opt_weight_shard_size": layout.shards if layout.shards > 1 else 0,
            "segments": layout.segments, "unit": layout.unit, "flattened": layout.flattened}
    # A strategy of an operator is what MindSpore's own readers take the stage from.
    operators = {"glm3kit": {"stage": 0, "parallel_strategy": [[1]]}}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(item)}" for name, item in items.items())
    atomic_write(path, f'{{"current_stage": 0, "parallel_strategy_item": {json.dumps(operators)},\n'
                       f'"parallel_layout_item": {{\n{lines}\n}}}}\n')
    return Path(path)


def _layout(item: Mapping[str, Any], stage: int) -> Layout:
    """One entry of a strategy file; raises ValueError, TypeError, KeyError or IndexError for what is none."""
    devices = tuple(item["dev_matrix"])
    axes = tuple(tuple(axis for axis in (entry if isinstance(entry, list) else [entry]) if axis != -1)
                 for entry in item["tensor_map"])
    step, size = item.get("opt_weight_shard_step", 0), item.get("opt_weight_shard_size", 0)
    segments, flattened, unit = item.get("segments", ()), item.get("flattened", ()), item.get("unit", 1)
    numbers = (*devices, *sum(axes, ()), step, size, *segments, *flattened, unit, stage)
    if any(type(number) is not int for number in numbers):
        raise TypeError(f"expected whole numbers in {dict(item)}")
    shards = size if step else 0
    if size == -1:  # all ranks that hold the same slice share it
        shards = prod(devices) // prod(devices[-1 - axis] for axis in sum(axes, ()))
    return Layout(devices, axes, max(shards, 1), tuple(segments), unit, tuple(flattened), max(step, 1), stage)


def _read_json(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Stage and entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    operators = content.get("parallel_strategy_item") or {}
    return next((entry["stage"] for entry in operators.values()), 0), content["parallel_layout_item"]


# node_strategy.proto, as far as it matters here
STRATEGY_MAP = {2: ("operators", [slice]), 3: ("parameters", [slice])}
ENTRY = {1: ("name", str), 2: ("content", slice)}  # of an operator its strategy, of a parameter its layouts
LAYOUTS = {1: ("dev_matrix", [slice]), 2: ("tensor_map", [slice]), 6: ("opt_weight_shard_step", int),
           7: ("opt_weight_shard_size", int)}


def _read_protobuf(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Stage and entries of a ParallelStrategyMap, as JSON would have them."""
    data = path.read_bytes()
    strategy = read_message(data, slice(0, len(data)), STRATEGY_MAP)
    operators, parameters = ([read_message(data, place, ENTRY) for place in places] for places in strategy.values())
    stages = [read_message(data, operator["content"], {1: ("stage", int)}, stage=0)["stage"] for operator in operators]
    items = {}
    for parameter in parameters:
        item = read_message(data, parameter["content"], LAYOUTS, opt_weight_shard_step=0, opt_weight_shard_size=0)
        (devices, *_), maps = ([read_message(data, place, {1: ("dim", [int])})["dim"] for place in item[key]]
                               for key in ("dev_matrix", "tensor_map"))
        # Several maps: an axis each, which may be cut by several axes of the ranks; one: a number an axis.
        axes = [numbers for numbers in maps if numbers] if len(maps) > 1 else sum(maps, [])
        items[parameter["name"]] = item | {"dev_matrix": devices, "tensor_map": axes}
    return next(iter(stages), 0), items


def _read_file(path: Path) -> dict[int, dict[str, Layout]]:
    """The layouts of one file by stage: JSON where its name says so, else protobuf, as MindSpore decides it."""
    try:
        stage, items = _read_json(path) if path.suffix == ".json" else _read_protobuf(path)
        layouts: dict[int, dict[str, Layout]] = {}
        for name, item in items.items():
            # What `merge_pipeline_strategys` makes of several stages has the stage before each name.
            merged = re.fullmatch(r"(\d+)-(.+)", name)
            key, at = (merged[2], int(merged[1])) if merged else (name, stage)
            layouts.setdefault(at, {})[key] = _layout(item, at)
        if not layouts:
            raise ValueError("it holds no parameter")
        return layouts
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as err:
        why = f"cannot be read ({err.strerror})" if isinstance(err, OSError) else (
            f"no strategy file of MindSpore's ({err!r})")
        raise CheckpointError(f"{path}: {why}; name the strategy file of the run that wrote the checkpoint") from err


def read_strategy(path: str | Path) -> dict[str, Layout]:
    """The layout of every parameter, from a strategy file or a folder of them (one a rank or a pipeline stage).

    Raises CheckpointError for a file that is none, and for files of different runs in one folder.
    """
    path = Path(path)
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path}: an empty folder; name the strategy file of the run that wrote the checkpoint")
    first: dict[int, tuple[Path, dict[str, Layout]]] = {}  # by stage
    for file in files:
        for stage, here in _read_file(file).items():
            other, known = first.setdefault(stage, (file, here))
            if known != here:
                raise CheckpointError(f"{path}: {other.name} and {file.name} say different things of stage {stage}; "
                                      "they are of different runs, give the one that belongs to the checkpoint")
    layouts: dict[str, Layout] = {}
    for stage in sorted(first):  # what two stages share, the first has too
        layouts |= {name: layout for name, layout in first[stage][1].items() if name not in layouts}
    return layouts
