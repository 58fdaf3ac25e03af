"""Merging 8 shards against copying the same bytes: time, as a ratio, and memory; beside `ms.transform_checkpoints`.

Makes shards of ChatGLM3-6B's shapes (12.5 GB of random float16) in a temporary folder, in this kit's form and in
MindFormers', and merges each into one file after `cp` and `sync` of the same files. The shards are put out of the page
cache before every run. Memory is the whole resident set, mapped files included (VmHWM).

    python benchmarks/merge.py                                         # 6B: needs 26 GB of disk, some minutes
    python benchmarks/merge.py --layers 4 --hidden 1024 --mindspore    # 0.5 GB
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from glm3kit.ckpt_file import write_ckpt
from glm3kit.config import ModelConfig
from glm3kit.layout import Layout, Slicing
from glm3kit.model import slicing
from glm3kit.safetensors_file import write_safetensors
from glm3kit.strategy import write_strategy
from glm3kit.tensors import PIECE, Tensors, TensorSpec
from glm3kit.weights import parameter_shapes

RANKS = 8
BUDGET = 1.5  # times the copy, and GB


def shard(cfg: ModelConfig, seed: int) -> Tensors:
    """What one of the ranks holds, made of random bytes a piece at a time."""
    block = np.random.default_rng(seed).bytes(PIECE)
    specs = {}
    for name, shape in parameter_shapes(cfg).items():
        if cut := slicing(name, cfg):
            held = sum(end - first for first, end in cut.ranges(0, RANKS))
            shape = (held, *shape[1:]) if cut.axis == 0 else (shape[0], held)
        specs[name] = TensorSpec("float16", shape)

    def pieces(name: str) -> Iterator[np.ndarray]:
        for first in range(0, specs[name].nbytes, PIECE):
            yield np.frombuffer(block, np.float16, min(specs[name].nbytes - first, PIECE) // 2)

    return Tensors(specs, lambda name: np.concatenate(list(pieces(name))).reshape(specs[name].shape), pieces=pieces)


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


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def forget(folder: Path) -> None:
    """Put files out of the page cache."""
    for file in files_of(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_time(source: Path, destination: Path) -> float:
    """Seconds of cp and sync."""
    forget(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    subprocess.run(["sync", *files_of(destination)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(destination)
    return seconds


def run(*command: str | Path) -> tuple[float, float]:
    """Seconds that a command takes, and its largest resident set in GB."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])  # kB
        time.sleep(0.05)
    assert process.returncode == 0, process.stderr.read()
    return time.perf_counter() - start, peak * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 1024")
    parser.add_argument("--folder", type=Path, help="where to work; default: the folder for temporary files")
    parser.add_argument("--form", choices=["kit", "mindformers"], help="default: both, one after the other")
    parser.add_argument("--mindspore", action="store_true", help="merge with ms.transform_checkpoints too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    cfg = ModelConfig(num_layers=args.layers, hidden_size=args.hidden, ffn_hidden_size=args.hidden * 13696 // 4096,
                      num_attention_heads=args.hidden // 128)
    lines = []
    for form, make in (("kit", make_kit), ("mindformers", make_mindformers)):
        if args.form not in (None, form):
            continue
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            source, merged = Path(temporary, "shards"), Path(temporary, "merged.safetensors")
            make(source, cfg)
            copied = copy_time(source, Path(temporary, "copy"))
            forget(source)
            seconds, peak = run(sys.executable, "-m", "glm3kit", "merge", source, merged)
            lines.append({"form": form, "with": "glm3kit", "gb": merged.stat().st_size / 1e9, "copy_s": copied,
                          "merge_s": seconds, "ratio": seconds / copied, "memory_gb": peak})
            if args.mindspore and form == "mindformers":
                merged.unlink()
                forget(source)
                program = ("import mindspore as ms; ms.transform_checkpoints("
                           f"{str(source)!r}, {temporary + '/theirs'!r}, 'whole', {str(source / 'strategy.json')!r})")
                seconds, peak = run(sys.executable, "-c", program)
                lines.append(lines[-1] | {"with": "mindspore", "merge_s": seconds, "ratio": seconds / copied,
                                          "memory_gb": peak})
    if args.json:
        print(json.dumps(lines))
        return
    print(f"{RANKS} shards; budget: {BUDGET} x the copy, {BUDGET} GB")
    print(f"{'shards':<12} {'with':<10} {'size':>8} {'cp + sync':>10} {'merge':>9} {'ratio':>6} {'memory':>8}")
    for line in lines:
        print(f"{line['form']:<12} {line['with']:<10} {line['gb']:>5.1f} GB {line['copy_s']:>8.1f} s "
              f"{line['merge_s']:>7.1f} s {line['ratio']:>6.2f} {line['memory_gb']:>5.2f} GB")


if __name__ == "__main__":
    main()
