"""Sharded checkpoints: saving them by all ranks, continuing from them, and merging them into one file.

A checkpoint is `checkpoint/step_N/`: `model/rank_R.safetensors` (the weights, once a slice of tensor parallelism),
`optimizer/rank_R.safetensors` (float32 shards of every rank), `complete.json` (the state of training). It is written
as `.step_N.tmp` and renamed when all ranks are done, so a folder with the right name is whole. `strategy/strategy.json`
says how each parameter is sliced: MindSpore's JSON form, with `segments` for the parts of fused weights.

    merge("output/tiny", "output/tiny/merged.safetensors")
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glm3kit.errors import CheckpointError
from glm3kit.files import atomic_write, sync
from glm3kit.parallel import Slicing, Topology, barrier
from glm3kit.safetensors_file import read_safetensors, write_safetensors
from glm3kit.tensors import Tensors, TensorSpec, cast

if TYPE_CHECKING:
    from glm3kit.model import ChatGLM3
    from glm3kit.train import Trainer

COMPLETE = "complete.json"
STRATEGY = Path("strategy", "strategy.json")


def rank_file(rank: int) -> str:
    return f"rank_{rank}.safetensors"


# ---- saving and continuing ----

def write_strategy(path: Path, net: "ChatGLM3", topology: Topology) -> None:
    """Write how every parameter is sliced.

    `dev_matrix` is the layout of the ranks, `tensor_map` names for each axis of the parameter the axis of that matrix
    which cuts it, counted from the right (-1: whole), `segments` are the lengths of fused parts.
    """
    from glm3kit.model import slicing

    layouts = {}
    for parameter in net.trainable_params():
        cut, axes = slicing(parameter.name, net.cfg), [-1] * parameter.ndim
        if cut:
            axes[cut.axis] = 0
        layouts[parameter.name] = {
            "dev_matrix": [topology.data_parallel, topology.tensor_parallel], "tensor_map": axes,
            "param_split_shape": [], "indices_offset": [], "field": 0,
            "opt_weight_shard_step": 0, "opt_weight_shard_size": 0,
            "segments": list(cut.segments) if cut else []}
    atomic_write(path, json.dumps({"current_stage": 0, "parallel_strategy_item": {}, "parallel_layout_item": layouts},
                                  indent=1))


def checkpoints(job_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a job, oldest first."""
    found = [(int(match[1]), path) for path in (Path(job_dir) / "checkpoint").glob("step_*")
             if (match := re.fullmatch(r"step_(\d+)", path.name)) and (path / COMPLETE).is_file()]
    return [path for _, path in sorted(found)]


def newest_checkpoint(job_dir: str | Path) -> Path:
    """The last complete checkpoint of a job; raises CheckpointError if it has none."""
    complete = checkpoints(job_dir)
    if not complete:
        raise CheckpointError(f"{job_dir}: holds no complete checkpoint (checkpoint/step_N with {COMPLETE}); "
                              "start the run anew")
    return complete[-1]


def save_checkpoint(job_dir: str | Path, net: "ChatGLM3", trainer: "Trainer", topology: Topology, keep: int) -> Path:
    """Write a checkpoint of the trainer's step, by every rank together; then remove all but the newest `keep`."""
    folder = Path(job_dir) / "checkpoint"
    final, temporary = folder / f"step_{trainer.step}", folder / f".step_{trainer.step}.tmp"
    if topology.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir(parents=True)
    barrier(topology)
    if topology.data_rank == 0:
        weights = {p.name: cast(p.float().asnumpy(), net.cfg.param_dtype, p.name) for p in net.trainable_params()}
        write_safetensors(temporary / "model" / rank_file(topology.rank), weights, {"format": "ms"})
    state = {p.name: p.asnumpy() for p in trainer.optimizer.state()}
    write_safetensors(temporary / "optimizer" / rank_file(topology.rank), state)
    barrier(topology)
    if topology.rank == 0:
        atomic_write(temporary / COMPLETE, json.dumps(trainer.state() | {
            "data_parallel": topology.data_parallel, "tensor_parallel": topology.tensor_parallel}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        sync(folder)
        for old in checkpoints(job_dir)[:-keep]:
            shutil.rmtree(old)
    barrier(topology)
    return final


def load_checkpoint(path: Path, net: "ChatGLM3", trainer: "Trainer", topology: Topology) -> None:
    """Put weights, optimizer state and training state of a checkpoint of the same layout back.

    Raises CheckpointError where it was written by another number of ranks, or a tensor is missing or of another shape.
    """
    from mindspore import Tensor

    state = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
    layout = state["data_parallel"], state["tensor_parallel"]
    if layout != (topology.data_parallel, topology.tensor_parallel):
        raise CheckpointError(f"{path}: written by data_parallel {layout[0]} x tensor_parallel {layout[1]}, this run "
                              f"has {topology.data_parallel} x {topology.tensor_parallel}; continue with the same "
                              "numbers, or merge the checkpoint and start from the merged weights")
    for file, parameters in ((path / "model" / rank_file(topology.tensor_rank), net.trainable_params()),
                             (path / "optimizer" / rank_file(topology.rank), trainer.optimizer.state())):
        stored = read_safetensors(file)
        for parameter in parameters:
            spec = stored.specs.get(parameter.name)
            if spec is None or spec.shape != tuple(parameter.shape):
                raise CheckpointError(f"{file}: '{parameter.name}' is {list(spec.shape) if spec else 'missing'}, "
                                      f"expected {list(parameter.shape)}; the checkpoint is of another model")
            # In place: compiled graphs hold on to the memory they were compiled with.
            parameter.copy_(Tensor(cast(stored[parameter.name], "float32")).astype(parameter.dtype))
    trainer.load_state(state)


# ---- merging ----

def _shard_folder(source: Path) -> Path:
    """The folder of rank files that a job, a checkpoint or such a folder itself names."""
    for folder in (source, source / "model"):
        if any(folder.glob("rank_*.safetensors")):
            return folder
    return newest_checkpoint(source) / "model"


def _read_strategy(source: Path, folder: Path, strategy: str | Path | None) -> dict[str, dict[str, Any]]:
    """The layout of every parameter, from the given file or the job's."""
    above = [parent / STRATEGY for parent in (source, *folder.parents[:4])]
    path = Path(strategy) if strategy else next((path for path in above if path.is_file()), above[0])
    if path.is_dir():
        path = path / STRATEGY.name
    try:
        layouts = json.loads(path.read_text(encoding="utf-8"))["parallel_layout_item"]
        return {name: {"devices": tuple(item["dev_matrix"]), "axes": tuple(item["tensor_map"]),
                       "segments": tuple(item.get("segments", ()))} for name, item in layouts.items()}
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read ({err.strerror}); name the strategy file of the run that wrote "
                              "the checkpoint") from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{path}: is no strategy file in MindSpore's JSON form ({err!r}); name the strategy "
                              "file of the run that wrote the checkpoint") from err


def merged_tensors(source: str | Path, strategy: str | Path | None = None) -> Tensors:
    """The whole weights of a sharded checkpoint, each put together when it is asked for.

    source: a job folder (its newest checkpoint), a checkpoint folder, or a folder of rank_N.safetensors.
    Raises CheckpointError for missing ranks, cut files, and a strategy that does not fit the shards.
    """
    source = Path(source)
    folder = _shard_folder(source)
    layouts = _read_strategy(source, folder, strategy)
    files = {int(path.stem.removeprefix("rank_")): read_safetensors(path) for path in folder.glob("rank_*.safetensors")}
    names = set.union(*(set(file.specs) for file in files.values()))
    if names != set(layouts):
        raise CheckpointError(f"{folder}: the strategy file is of another run: only in the shards "
                              f"{sorted(names - set(layouts))[:3]}, only in the strategy "
                              f"{sorted(set(layouts) - names)[:3]}")
    specs, sources, faults = {}, {}, []
    for name, layout in layouts.items():
        axis = next((i for i, mapped in enumerate(layout["axes"]) if mapped >= 0), None)
        slices = layout["devices"][-1] if axis is not None else 1
        missing = [rank for rank in range(slices) if rank not in files or name not in files[rank].specs]
        if missing:
            faults.append(f"'{name}' is cut into {slices} slices; missing: {', '.join(map(rank_file, missing))}")
            continue
        parts = [files[rank].specs[name] for rank in range(slices)]
        shape = list(parts[0].shape)
        if axis is not None:
            shape[axis] *= slices
            segments = layout["segments"] or (shape[axis],)
            if sum(segments) != shape[axis] or any(part != parts[0] for part in parts):
                faults.append(f"'{name}': slices {[list(part.shape) for part in parts]} do not make {sum(segments)} "
                              f"along axis {axis}")
                continue
            sources[name] = Slicing(axis, segments), slices
        specs[name] = TensorSpec(parts[0].dtype, tuple(shape))
    if faults:
        raise CheckpointError(f"{folder}: cannot be merged:\n  " + "\n  ".join(faults) +
                              "\ncopy the files of all ranks into one folder, with the strategy file of their run")

    def read(name: str) -> np.ndarray:
        if name not in sources:
            return files[0][name]
        cut, slices = sources[name]
        return cut.whole([files[rank][name] for rank in range(slices)])

    return Tensors(specs, read)


def merge(source: str | Path, destination: str | Path, strategy: str | Path | None = None, *, force: bool = False,
          progress: bool = True) -> Path:
    """Merge a sharded checkpoint into one .safetensors or .ckpt file with MindSpore's names, a tensor at a time.

    source, strategy: as for `merged_tensors`. An existing destination is replaced only with `force`.
    Example: merge("output/tiny", "output/tiny/merged.safetensors")
    """
    from glm3kit.weights import write_weights

    return write_weights(destination, merged_tensors(source, strategy), force=force, progress=progress)


