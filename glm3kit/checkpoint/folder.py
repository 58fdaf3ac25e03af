"""Checkpoints of a run: saved by all ranks, verified, continued from, by the same ranks or others.

A checkpoint is `checkpoint/step_N/`: `model/rank_R.safetensors` (the weights, once a slice of tensor parallelism),
`optimizer/rank_R.safetensors` (float32 state, every rank its shards), in both `strategy.json` (how they are cut), and
`complete.json` (the state of training; size and checksum of every file). It is written as `.step_N.tmp` and renamed
when all ranks are done, so a folder with the right name is whole, unless something damages it later.

    damage(newest_checkpoint("output/tiny"))
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glm3kit.errors import CheckpointError

COMPLETE = "complete.json"
STRATEGY = "strategy.json"


def rank_file(rank: int) -> str:
    return f"rank_{rank}.safetensors"


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


def _crc32(path: Path) -> str:
    """The checksum of a file, as zip files have it: it finds damage, not malice, at the speed of memory."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def marks_of(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and checksum of files, by their path in the folder of the checkpoint."""
    return {file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "crc32": _crc32(file)}
            for file in files}


def damage(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, None if nothing is; each of several ranks looks at its share of the files."""
    try:
        files = json.loads((path / COMPLETE).read_text(encoding="utf-8"))["files"]
        for name, mark in sorted(files.items())[rank::ranks]:
            size = (path / name).stat().st_size
            if size != mark["bytes"]:
                return f"{name} has {size} bytes, expected {mark['bytes']}"
            if _crc32(path / name) != mark["crc32"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError as err:
        return f"{Path(err.filename).relative_to(path)} is missing"
    except OSError as err:
        return f"{err.filename} cannot be read ({err.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        return f"{COMPLETE} does not list its files ({err!r})"
    return None


def set_aside(path: Path) -> None:
    """Take a checkpoint's name from it, so that one whose removal is interrupted does not look whole."""
    if path.exists():
        os.rename(path, path.with_name(f".{path.name}.old.tmp"))


def clear_unfinished(folder: Path) -> None:
    """Remove what a run that was killed has left: half a checkpoint, half of one that was being removed."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
