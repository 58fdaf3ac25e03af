"""Merging the slices of a checkpoint into whole weights, a tensor at a time.

The files of ranks are this kit's (`model/rank_R.safetensors`) or MindFormers' (`rank_R/NAME-epoch_step.ckpt` or
`.safetensors`); how they are cut says the strategy file of their run.

    merge("output/tiny", "output/tiny/merged.safetensors")
"""

import re
from pathlib import Path

from glm3kit.checkpoint.folder import STRATEGY, newest_checkpoint
from glm3kit.checkpoint.layout import whole_tensors
from glm3kit.checkpoint.strategy import read_strategy
from glm3kit.config.load import load_config
from glm3kit.errors import CheckpointError
from glm3kit.weights.adapters import fold_adapters, is_adapter
from glm3kit.weights.formats.safetensors import read_safetensors
from glm3kit.weights.hub_files import MINDSPORE_FORMS, READERS
from glm3kit.weights.names import TRAINING_STATE
from glm3kit.weights.read import read_weights
from glm3kit.weights.tensors import Tensors
from glm3kit.weights.write import write_weights


def rank_files(folder: Path) -> dict[int, Path]:
    """The file of each rank in a folder of `rank_R.safetensors` (or .ckpt) or of folders `rank_R`; {} if it has none.

    Of folders with several checkpoints the newest that all ranks have is taken, by the epoch and step that names end
    with: `glm3-1_200.ckpt`.
    """
    found: dict[int, dict[tuple[int, int], Path]] = {}
    for path in sorted((*folder.glob("rank_*"), *folder.glob("rank_*/*"))):
        rank = re.fullmatch(r"rank_(\d+)", path.stem if path.parent == folder else path.parent.name)
        if rank and path.suffix in MINDSPORE_FORMS:
            stated = re.search(r"-(\d+)_(\d+)$", path.stem)
            step = (int(stated[1]), int(stated[2])) if stated else (0, 0)
            other = found.setdefault(int(rank[1]), {}).setdefault(step, path)
            if other != path:
                raise CheckpointError(f"{path.parent}: holds {other.name} and {path.name}, and neither name says which "
                                      "is newer (as NAME-epoch_step does); move one away")
    common = set.intersection(*map(set, found.values())) if found else set()
    if found and not common:
        raise CheckpointError(f"{folder}: the ranks have no checkpoint of the same epoch and step; wait for the run to "
                              "finish saving, or copy one checkpoint of all ranks into a folder of its own")
    return {rank: files[max(common)] for rank, files in found.items()}


def _rank_folder(source: Path) -> Path:
    """The folder of rank files that a job, a checkpoint or such a folder itself names."""
    folders = filter(rank_files, (source, source / "model", source / "checkpoint"))
    return next(folders, None) or newest_checkpoint(source) / "model"


def _near_strategy(folder: Path) -> Path:
    """The strategy file or folder beside or above the files of ranks; where there is none, the first looked for."""
    near = [parent / name for parent in (folder, *folder.parents[:3]) for name in (STRATEGY, "strategy")]
    return next((path for path in near if path.exists()), near[0])


def merged_tensors(source: str | Path, strategy: str | Path | None = None) -> Tensors:
    """The whole weights of a checkpoint, each put together when it is asked for.

    source: a job folder (its newest checkpoint), a checkpoint folder, or a folder with a file or a folder a rank.
    strategy: a strategy file or a folder of them, by default what stands beside or above the files.
    Optimizer state and counters, which MindFormers keeps with the weights, are left out.
    Raises CheckpointError for missing ranks, cut files, and a strategy that does not fit them.
    """
    folder = _rank_folder(Path(source))
    layouts = {name: layout for name, layout in read_strategy(strategy or _near_strategy(folder)).items()
               if not TRAINING_STATE.fullmatch(name)}
    ranks = {}
    for rank, path in sorted(rank_files(folder).items()):
        opened = READERS[path.suffix](path)
        ranks[rank] = opened.select(name for name in opened if not TRAINING_STATE.fullmatch(name))
    described = sum({layout.stage: layout.ranks for layout in layouts.values()}.values())
    if max(ranks) >= described:
        raise CheckpointError(f"{folder}: the strategy file is of another run: it describes {described} ranks, there "
                              f"is a file of rank {max(ranks)}")
    whole = whole_tensors(ranks, layouts, str(folder))
    lost = [name for name in layouts if name not in whole]
    if lost and not all(map(is_adapter, whole)):  # adapters may have been saved alone
        raise CheckpointError(f"{folder}: the strategy file is of another run: {len(lost)} of its parameters are in no "
                              f"file: {lost[:3]}")
    return whole


def read_adapters(path: str | Path, strategy: str | Path | None = None) -> Tensors:
    """The adapters of a .safetensors file, a job (its newest checkpoint) or a checkpoint, without weights beside them.

    strategy: as for `merged_tensors`. Raises CheckpointError where there are none.
    """
    path = Path(path)
    stored = merged_tensors(path, strategy) if path.is_dir() else read_safetensors(path)
    adapters = stored.select(filter(is_adapter, stored))
    if not adapters:
        raise CheckpointError(f"{path}: holds no adapters (lora_a, lora_b, lora_alpha), but "
                              f"{', '.join(list(stored)[:3])}; name plain weights as checkpoint_name_or_path")
    return adapters


def _base_weights(source: Path) -> Path:
    """The weights that a job's adapters were trained beside, as its config.yaml names them."""
    config = next((parent / "config.yaml" for parent in (source, *source.resolve().parents[:4])
                   if (parent / "config.yaml").is_file()), None)
    path = load_config(config).model.checkpoint_name_or_path if config else None
    if path is None:
        raise CheckpointError(f"{source}: holds adapters alone, and no config.yaml there names the weights they belong "
                              "to; give them as base")
    return Path(path)


def merge(source: str | Path, destination: str | Path, strategy: str | Path | None = None, *,
          base: str | Path | None = None, adapters: bool = False, max_shard_size: int | None = None,
          force: bool = False, progress: bool = True) -> Path:
    """Merge the slices of a checkpoint into whole weights with MindSpore's names, some megabytes at a time.

    source, strategy: as for `merged_tensors`. destination: a file, its form named by .safetensors or .ckpt; with
    `max_shard_size` (bytes) a folder of files up to that size. An existing one is replaced only with `force`.
    LoRA adapters are folded into the weights they stand beside, else into those of `base` (default: what the job
    started from). adapters: write the adapters alone.
    Example: merge("output/tiny", "output/tiny/merged.safetensors")
    """
    source = Path(source)
    if adapters:
        tensors = read_adapters(source, strategy)
    else:
        tensors = merged_tensors(source, strategy)
        if base is None and all(map(is_adapter, tensors)):
            base = _base_weights(source)
        tensors = fold_adapters(tensors, read_weights(base) if base else None, str(source))
    return write_weights(destination, tensors, max_shard_size=max_shard_size, about={"source": str(source)},
                         force=force, progress=progress)
