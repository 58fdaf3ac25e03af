"""Checkpoints of a run: saved by all its ranks together, continued from by the same ranks or by others.

    load_checkpoint(usable_checkpoint("output/tiny", topology), net, trainer, topology)
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mindspore import Parameter, Tensor

from glm3kit.checkpoint.folder import (
    COMPLETE,
    STRATEGY,
    checkpoints,
    clear_unfinished,
    damage,
    marks_of,
    rank_file,
    set_aside,
)
from glm3kit.checkpoint.layout import Layout, whole_tensors
from glm3kit.checkpoint.strategy import read_strategy, write_strategy
from glm3kit.errors import CheckpointError
from glm3kit.files import FULL, atomic_write, sync
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import Topology, any_rank, barrier, shard_of
from glm3kit.train.lora import saved_parameters
from glm3kit.train.trainer import Trainer
from glm3kit.weights.formats.safetensors import read_safetensors, write_safetensors
from glm3kit.weights.slices import slicing
from glm3kit.weights.tensors import Tensors, TensorSpec, cast


def usable_checkpoint(job_dir: str | Path, topology: Topology) -> Path:
    """The newest checkpoint that is as it was written, as all ranks agree; called by every rank.

    One that is damaged is set aside as `step_N.damaged`, with a warning in the log.
    Raises CheckpointError if none is left.
    """
    for path in reversed(checkpoints(job_dir)):
        fault = damage(path, topology.rank, topology.ranks)
        if fault:
            print(f"warning: {path} is damaged: {fault}; it is set aside as {path.name}.damaged, the one before is "
                  "used", flush=True)
        if not any_rank(bool(fault), topology):
            return path
        if topology.rank == 0:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
        barrier(topology)
    raise CheckpointError(f"{job_dir}: holds no complete checkpoint that is undamaged; start the run anew")


def weight_layouts(net: ChatGLM3, topology: Topology) -> dict[str, Layout]:
    """How every parameter of a model is cut, frozen ones too."""
    layouts = {}
    for parameter in net.get_parameters():
        cut = slicing(parameter.name, net.cfg)
        axes = tuple((0,) if cut and axis == cut.axis else () for axis in range(parameter.ndim))
        layouts[parameter.name] = Layout((topology.data_parallel, topology.tensor_parallel), axes,
                                         segments=cut.segments if cut else (), unit=cut.unit if cut else 1)
    return layouts


def state_layouts(net: ChatGLM3, state: Iterable[Parameter], topology: Topology) -> dict[str, Layout]:
    """How the optimizer's state is cut: `exp_avg.X` like X, and where it is sharded, flattened and cut once more."""
    shapes = {parameter.name: tuple(parameter.shape) for parameter in net.trainable_params()}
    weights, layouts = weight_layouts(net, topology), {}
    for parameter in state:
        name = parameter.name.partition(".")[2]
        layouts[parameter.name] = weights[name] if tuple(parameter.shape) == shapes[name] else replace(
            weights[name], shards=topology.shards, flattened=shapes[name], step=topology.tensor_parallel)
    return layouts


def _lazily(parameters: Iterable[Parameter]) -> Tensors:
    """Parameters as tensors to write, each fetched from its device when it is written."""
    held = {parameter.name: parameter for parameter in parameters}
    specs = {name: TensorSpec(str(parameter.dtype).lower(), tuple(parameter.shape))
             for name, parameter in held.items()}
    return Tensors(specs, lambda name: cast(held[name].float().asnumpy(), specs[name].dtype, name))


def _write_files(folder: Path, net: ChatGLM3, trainer: Trainer, topology: Topology) -> Iterator[Path]:
    """Write the files of this rank, each given when it is whole: shards of the state, slices, strategies."""
    state = trainer.optimizer.state()
    yield write_safetensors(folder / "optimizer" / rank_file(topology.rank), _lazily(state))
    if topology.data_rank == 0:
        yield write_safetensors(folder / "model" / rank_file(topology.rank),
                                _lazily(saved_parameters(net, trainer.config.lora)), {"format": "ms"})
    if topology.rank == 0:
        yield write_strategy(folder / "model" / STRATEGY, weight_layouts(net, topology))
        yield write_strategy(folder / "optimizer" / STRATEGY, state_layouts(net, state, topology))


def _complete(folder: Path, ranks: int, state: Mapping[str, Any]) -> None:
    """Put the marks of all ranks' files and the state of training into the file that makes a checkpoint complete."""
    files = {}
    for marks in (folder / f"rank_{rank}.json" for rank in range(ranks)):
        files |= json.loads(marks.read_text(encoding="utf-8"))
        marks.unlink()
    atomic_write(folder / COMPLETE, json.dumps({**state, "files": files}, indent=1))


def save_checkpoint(job_dir: str | Path, net: ChatGLM3, trainer: Trainer, topology: Topology, keep: int,
                    data: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """Write a checkpoint of the trainer's step, by every rank together; then remove all but the newest `keep`.

    data: what the position in the data depends on besides the step; `load_checkpoint` asks for the same.
    Raises CheckpointError where the disk is full: what was written of it is removed, the checkpoints before stay.
    """
    folder = Path(job_dir) / "checkpoint"
    # No `atomic_folder`: all ranks write into this one.
    final, temporary = folder / f"step_{trainer.step}", folder / f".step_{trainer.step}.tmp"
    if topology.rank == 0:
        clear_unfinished(folder)
        temporary.mkdir(parents=True)
    barrier(topology)
    written = []
    try:
        for path in _write_files(temporary, net, trainer, topology):
            written.append(path)
        atomic_write(temporary / f"rank_{topology.rank}.json", json.dumps(marks_of(temporary, written)))
        barrier(topology)
        if topology.rank == 0:
            _complete(temporary, topology.ranks, trainer.state() | {
                "data": dict(data), "data_parallel": topology.data_parallel,
                "tensor_parallel": topology.tensor_parallel})
    except OSError as err:
        if err.errno not in FULL:
            raise
        free = shutil.disk_usage(folder).free
        for path in written:
            path.unlink(missing_ok=True)
        raise CheckpointError(f"{final}: cannot be written: {err.strerror}, {free / 1e9:.3f} GB were free; free some, "
                              "or lower train.keep_checkpoints, and continue with --resume") from err
    if topology.rank == 0:
        set_aside(final)
        os.rename(temporary, final)
        sync(folder)
        for old in checkpoints(job_dir)[:-keep]:
            set_aside(old)
        clear_unfinished(folder)
    barrier(topology)
    return final


def _open(folder: Path, index: int, layouts: Mapping[str, Layout]) -> tuple[Tensors, bool]:
    """The rank's own file if it was cut as `layouts` say, else whole tensors put together from all; which it is."""
    stored = read_strategy(folder / STRATEGY)
    if stored == layouts:
        return read_safetensors(folder / rank_file(index)), False
    ranks = {int(path.stem.removeprefix("rank_")): read_safetensors(path) for path in folder.glob("rank_*.safetensors")}
    return whole_tensors(ranks, stored, str(folder)), True


def load_checkpoint(path: Path, net: ChatGLM3, trainer: Trainer, topology: Topology,
                    data: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Put weights, optimizer state and training state of a checkpoint back, written by any layout of ranks.

    data: as it was given to `save_checkpoint`.
    Raises CheckpointError where a tensor is missing or of another shape, or the run has another schedule or other data.
    """
    marker = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
    changed = [f"{key} {value}, here {data.get(key)}" for key, value in marker["data"].items()
               if data.get(key) != value]
    if changed:
        raise CheckpointError(f"{path}: its position in the data means other rows here: {'; '.join(changed)}; continue "
                              "with the data, train.seed and rows a step (batch_size x data_parallel x "
                              "gradient_accumulation_steps) of the run that wrote it")
    state = trainer.optimizer.state()
    of_weights, of_state = weight_layouts(net, topology), state_layouts(net, state, topology)
    weights = _open(path / "model", topology.tensor_rank, of_weights)
    moments = _open(path / "optimizer", topology.rank, of_state)
    layouts = of_weights | of_state
    for parameter in (*saved_parameters(net, trainer.config.lora), *state):
        name, layout = parameter.name, layouts[parameter.name]
        tensors, whole = moments if name in moments[0] else weights
        if name not in tensors:  # one rank alone keeps no masters of float32 weights
            name = name.removeprefix("master.")
        expected = layout.whole_shape(tuple(parameter.shape)) if whole else tuple(parameter.shape)
        spec = tensors.specs.get(name)
        if spec is None or spec.shape != expected:
            raise CheckpointError(f"{path}: '{name}' is {list(spec.shape) if spec else 'missing'}, expected "
                                  f"{list(expected)}; the checkpoint is of another model")
        values = tensors[name]
        if whole:
            values = topology.slice_of(values, slicing(name, net.cfg))
            if layout.flattened:
                values = shard_of(values, topology.shard_rank, topology.shards)
        # In place: compiled graphs hold on to the memory they were compiled with.
        parameter.copy_(Tensor(cast(values, "float32")).astype(parameter.dtype))
    trainer.load_state(marker)
