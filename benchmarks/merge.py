"""Merging 8 shards against copying the same bytes: time, as a ratio, and memory; beside `ms.transform_checkpoints`.

Makes shards of ChatGLM3-6B's shapes (12.5 GB of random float16) in a temporary folder, in this kit's form and in
MindFormers', and merges each into one file after `cp` and `sync` of the same files. The shards are put out of the page
cache before every run. Memory is the whole resident set, mapped files included (VmHWM).

    python benchmarks/merge.py                                         # 6B: needs 26 GB of disk, some minutes
    python benchmarks/merge.py --layers 4 --hidden 1024 --mindspore    # 0.5 GB
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from disk import copy_seconds, files_of, forget, model_config, watch

from glm3kit.checkpoint.layout import Layout
from glm3kit.checkpoint.strategy import write_strategy
from glm3kit.config.groups import ModelConfig
from glm3kit.weights.formats.ckpt import write_ckpt
from glm3kit.weights.formats.safetensors import write_safetensors
from glm3kit.weights.names import parameter_shapes
from glm3kit.weights.slices import Slicing, slicing
from glm3kit.weights.tensors import BLOCK, Tensors, TensorSpec

RANKS = 8
BUDGET = 1.5  # times the copy, and GB


def shard(cfg: ModelConfig, seed: int) -> Tensors:
    """What one of the ranks holds, made of random bytes a block at a time."""
    block = np.random.default_rng(seed).bytes(BLOCK)
    specs = {}
    for name, shape in parameter_shapes(cfg).items():
        if cut := slicing(name, cfg):
            held = sum(end - first for first, end in cut.ranges(0, RANKS))
            shape = (held, *shape[1:]) if cut.axis == 0 else (shape[0], held)
        specs[name] = TensorSpec("float16", shape)

    def blocks(name: str) -> Iterator[np.ndarray]:
        for first in range(0, specs[name].nbytes, BLOCK):
            yield np.frombuffer(block, np.float16, min(specs[name].nbytes - first, BLOCK) // 2)

    return Tensors(specs, lambda name: np.concatenate(list(blocks(name))).reshape(specs[name].shape), blocks=blocks)


def layouts(cfg: ModelConfig) -> dict[str, Layout]:
    """Tensor parallelism over all ranks, as the kit cuts it."""
    result = {}
    for name, shape in parameter_shapes(cfg).items():
        cut = slicing(name, cfg) or Slicing(-1, ())
        axes = tuple((0,) if axis == cut.axis else () for axis in range(len(shape)))
        result[name] = Layout((RANKS,), axes, segments=cut.segments, unit=cut.unit)
    return result


def make_kit(folder: Path, cfg: ModelConfig) -> None:
    write_strategy(folder / "strategy.json", layouts(cfg))
    for rank in range(RANKS):
        write_safetensors(folder / f"rank_{rank}.safetensors", shard(cfg, rank))


def make_mindformers(folder: Path, cfg: ModelConfig) -> None:
    # MindFormers cuts fused matrices straight through.
    write_strategy(folder / "strategy.json", {name: replace(layout, segments=(), unit=1)
                                              for name, layout in layouts(cfg).items()})
    for rank in range(RANKS):
        write_ckpt(folder / f"rank_{rank}" / f"glm3_rank_{rank}-1_100.ckpt", shard(cfg, rank))


def size_of(folder: Path) -> float:
    return sum(file.stat().st_size for file in files_of(folder)) / 1e9


def measure(source: Path, command: list[str | Path]) -> dict[str, float]:
    """What Python takes for a command that reads the shards from the disk."""
    forget(source)
    usage = watch(subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return {"merge_s": usage.seconds, "memory_gb": usage.resident / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 1024")
    parser.add_argument("--folder", type=Path, help="where to work; default: the folder for temporary files")
    parser.add_argument("--form", choices=["kit", "mindformers"], help="default: both, one after the other")
    parser.add_argument("--mindspore", action="store_true", help="merge with ms.transform_checkpoints too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    cfg = model_config(args.layers, args.hidden)
    lines = []
    for form, make in (("kit", make_kit), ("mindformers", make_mindformers)):
        if args.form not in (None, form):
            continue
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            source, merged = Path(temporary, "shards"), Path(temporary, "merged.safetensors")
            make(source, cfg)
            copied = copy_seconds(source, Path(temporary, "copy"))
            programs = {"glm3kit": ["-m", "glm3kit", "merge", source, merged]}
            if args.mindspore and form == "mindformers":
                programs["mindspore"] = ["-c", "import mindspore as ms; ms.transform_checkpoints("
                                         f"{str(source)!r}, {temporary + '/theirs'!r}, 'whole', "
                                         f"{str(source / 'strategy.json')!r})"]
            lines += [{"form": form, "with": name, "gb": size_of(source), "copy_s": copied} | measure(source, command)
                      for name, command in programs.items()]
    if args.json:
        print(json.dumps(lines))
        return
    print(f"{RANKS} shards; budget: {BUDGET} x the copy, {BUDGET} GB")
    print(f"{'shards':<12} {'with':<10} {'size':>8} {'cp + sync':>10} {'merge':>9} {'ratio':>6} {'memory':>8}")
    for line in lines:
        print(f"{line['form']:<12} {line['with']:<10} {line['gb']:>5.1f} GB {line['copy_s']:>8.1f} s "
              f"{line['merge_s']:>7.1f} s {line['merge_s'] / line['copy_s']:>6.2f} {line['memory_gb']:>5.2f} GB")


if __name__ == "__main__":
    main()
