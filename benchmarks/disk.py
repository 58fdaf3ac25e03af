"""What the benchmarks of weights share: weights of any size, copying as the yardstick, and the memory of a process."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm3kit.config.groups import ModelConfig
from glm3kit.weights.names import parameter_shapes
from glm3kit.weights.tensors import BLOCK, Tensors, TensorSpec


class Usage(NamedTuple):
    """What a process took: seconds, and its highest memory in bytes."""

    seconds: float
    anonymous: int  # what is not page cache
    resident: int  # with mapped files


def model_config(layers: int, hidden: int) -> ModelConfig:
    """ChatGLM3 with the proportions of 6B."""
    return ModelConfig(num_layers=layers, hidden_size=hidden, ffn_hidden_size=hidden * 13696 // 4096,
                       num_attention_heads=hidden // 128)


def random_tensors(cfg: ModelConfig) -> Tensors:
    """Float16 weights of these sizes, the same random values again and again, a block at a time."""
    block = (np.random.default_rng(0).standard_normal(BLOCK // 2, np.float32) / 50).astype(np.float16)
    specs = {name: TensorSpec("float16", shape) for name, shape in parameter_shapes(cfg).items()}

    def blocks(name: str) -> Iterator[np.ndarray]:
        for first in range(0, specs[name].nbytes, BLOCK):
            yield block[:min(specs[name].nbytes - first, BLOCK) // 2]

    return Tensors(specs, lambda name: np.concatenate(list(blocks(name))).reshape(specs[name].shape), blocks=blocks)


def files_of(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def forget(path: Path) -> None:
    """Put files out of the page cache."""
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def copy_seconds(source: Path, destination: Path) -> float:
    """Seconds of cp and sync, from the disk; the copy is removed."""
    forget(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    subprocess.run(["sync", *files_of(destination)], check=True)
    seconds = time.perf_counter() - start
    remove(destination)
    return seconds


def _memory(pid: int) -> tuple[int, int]:
    """Bytes that are no page cache, and the highest resident set; zeros once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return (kilobytes.get("RssAnon", 0) + kilobytes.get("RssShmem", 0)) << 10, kilobytes.get("VmHWM", 0) << 10


def watch(process: subprocess.Popen) -> Usage:
    """Wait for a process and say what it took, looked at every 20 ms."""
    start, anonymous, resident = time.perf_counter(), 0, 0
    while process.poll() is None:
        now = _memory(process.pid)
        anonymous, resident = max(anonymous, now[0]), max(resident, now[1])
        time.sleep(0.02)
    assert process.returncode == 0, f"{process.args} ended with {process.returncode}"
    return Usage(time.perf_counter() - start, anonymous, resident)
