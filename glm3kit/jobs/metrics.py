"""What a training run measured: writing and reading metrics.jsonl, reading the logs of MindFormers.

metrics.jsonl has one JSON object a line. A step has step, loss, learning_rate, step_time_ms (of which data_time_ms went
by waiting for rows, compute_time_ms in the graphs, communication included), overflow, loss_scale, grad_norm, epoch,
tokens_per_second (of all devices) and tokens_per_second_per_device, memory_gb, and model_flop_utilisation where the
device's peak is given; an evaluation has step and eval_loss. The log lines are those of MindFormers 0.6 to 2.0
(mindformers/core/callback/callback.py), told apart by their own words.

    records = read_metrics("output/tiny"); [record["loss"] for record in records if "loss" in record]
"""

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import DataError
from glm3kit.weights.names import EMBEDDING, parameter_shapes

METRICS_FILE = "metrics.jsonl"
NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
STEP = re.compile(rf"(?:Epoch:\[\s*(?P<epoch>\d+)/.*)?"
                  rf"step:\[\s*(?P<step>\d+)/\s*(?P<steps>\d+)\],\s*loss:\s*\[?(?P<loss>{NUMBER})")
# What follows the loss; the forms of 0.6 ("time:", "lr:[...]") to 2.0 ("grad_norm:").
FIELDS = {
    "learning_rate": re.compile(rf"\blr:\s*\[?({NUMBER})"),
    "step_time_ms": re.compile(rf"\b(?:per_step_time|time):\s*({NUMBER})\s*ms"),
    "overflow": re.compile(r"\boverflow cond:\s*(True|False)"),
    "loss_scale": re.compile(rf"\bloss_scale:\s*({NUMBER})"),
    "grad_norm": re.compile(rf"\b(?:global_norm|grad_norm):?\s*(?:\[\s*({NUMBER})\s*\]|({NUMBER}))"),
}
TRUTH = {"True": True, "False": False}


def flops_per_token(model: ModelConfig, seq_length: int, lora: bool = False) -> float:
    """Floating-point operations that training needs a token: 6 a weight and 12 a layer, head dimension and position.

    As PaLM counts them (https://arxiv.org/abs/2204.02311, appendix B): no embedding look-up, recomputation not counted.
    lora: the gradients of the frozen weights, a third of the first, are not needed.
    """
    matrices = sum(prod(shape) for name, shape in parameter_shapes(model).items()
                   if name != EMBEDDING and len(shape) == 2)
    attention = model.num_layers * model.num_attention_heads * model.kv_channels * seq_length
    return (4 if lora else 6) * matrices + 12 * attention


def format_step_line(record: Mapping[str, Any], epochs: int, steps_per_epoch: int) -> str:
    """The log line of a step in MindFormers 1.1's form; steps are counted within the epoch there.

    record: step (from the start of training), loss, step_time_ms, learning_rate; overflow and loss_scale if scaled, and
    grad_norm if known (printed as by later versions).
    Example: "{ Epoch:[  1/  5], step:[    2/  535], loss: 2.248, per_step_time: 364368ms, lr: 1.25e-07, ..."
    """
    epoch, step = divmod(record["step"] - 1, steps_per_epoch)
    line = (f"{{ Epoch:[{epoch + 1:3d}/{epochs:3d}], step:[{step + 1:5d}/{steps_per_epoch:5d}], "
            f"loss: {record['loss']:.3f}, per_step_time: {int(record['step_time_ms'])}ms, "
            f"lr: {np.float32(record['learning_rate'])!s}, overflow cond: {record.get('overflow', False)}, "
            f"loss_scale: {float(record.get('loss_scale') or 1.0)}")
    return line if record.get("grad_norm") is None else f"{line}, global_norm: [{record['grad_norm']:.6f}]"


def _read_log(path: Path, text: str) -> list[dict[str, Any]]:
    """One record a line of a step; other lines are passed over."""
    records: list[dict[str, Any]] = []
    for line in text.splitlines():
        if not (found := STEP.search(line)):
            continue
        record = {"step": int(found["step"]), "loss": float(found["loss"])}
        if found["epoch"]:
            record["epoch"] = int(found["epoch"])
            record["step"] += (record["epoch"] - 1) * int(found["steps"])  # it is counted within the epoch there
        for key, pattern in FIELDS.items():
            if value := pattern.search(line, found.end()):
                word = value[value.lastindex]
                record[key] = TRUTH[word] if word in TRUTH else float(word)
        records.append(record)
    if text.strip() and not records:
        raise DataError(f"{path}: {len(text.splitlines())} lines, none of which is a step's; expected lines such as "
                        "'Epoch:[  1/  5], step:[    2/  535], loss: 2.248, ...'; give the log of the rank that prints "
                        "the loss (the last one of a pipeline, else rank 0)")
    return records


def _json_record(line: str | bytes) -> dict[str, Any] | None:
    """The record of a step or of an evaluation in a line of JSON; None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(record, dict) and type(record.get("step")) is int and record.keys() & {"loss", "eval_loss"}
    return record if known else None


def _read_json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    """One record a step and kind: a resumed job repeats steps, the last record counts."""
    *lines, last = text.split("\n")
    if last.rstrip().endswith("}"):  # else it is empty, or being written now
        lines.append(last)
    records = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            if (record := _json_record(line)) is None:
                raise DataError(f"{path}:{number}: {line[:80]!r} is no record; expected a JSON object with 'step' (a "
                                "whole number) and 'loss' or 'eval_loss'; remove the line")
            records[record["step"], "eval_loss" in record] = {
                key: math.nan if value is None else value for key, value in record.items()}  # JSON has no NaN
    return [records[key] for key in sorted(records)]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read what a run measured: a job folder, a metrics.jsonl, or a log of MindFormers; each also as .gz.

    Returns a dict a step or evaluation, as above; of a metrics.jsonl in order, with the last record of a repeated step
    and without a last line that is still being written. A log gives a record for every line of a step, as they stand:
    step (from the start of training, over all epochs), loss, and learning_rate, step_time_ms, overflow, loss_scale,
    grad_norm, epoch where present. MindFormers 0.6 prints the time between two lines, which is that of several steps.
    Raises DataError for a file that is missing or damaged, a line that is no record (with its number), a log without
    steps.
    Example: read_metrics("worker_0.log")[0] -> {"step": 2, "loss": 2.248, "epoch": 1, "learning_rate": 1.25e-07, ...}
    """
    path = Path(path)
    if path.is_dir():
        if not (path / METRICS_FILE).exists() and (path / "job.json").exists():
            return []  # the job has not reached its first step
        path = path / METRICS_FILE
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except FileNotFoundError as err:
        raise DataError(f"{path}: no such file; give a job folder, a {METRICS_FILE} or a log") from err
    except (OSError, EOFError, zlib.error) as err:
        raise DataError(f"{path}: cannot be read: {err}") from err
    text = content.decode("utf-8", "replace")  # a log holds the bytes of many programs
    if ".jsonl" in path.suffixes or text.lstrip().startswith('{"'):
        return _read_json_lines(path, text)
    return _read_log(path, text)


class MetricsWriter:
    """Append records to a metrics.jsonl, each visible to readers at once.

    A line that an earlier writer was killed in is cut away, so that a resumed job continues the file.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+", buffering=0)
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers of NumPy are numbers, None is left out, what is not finite becomes null."""
        plain = {key: np.asarray(value).tolist() for key, value in record.items() if value is not None}
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in plain.items()}
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


class NewRecords:
    """The records of a metrics.jsonl that were not read before; only what was added to the file is read."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0  # bytes read so far

    def read(self) -> list[dict]:
        """The new records of steps; [] for a file that does not exist. A damaged line is left to `read_metrics`."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self.offset:  # a new run has replaced it
                    self.offset = 0
                file.seek(self.offset)
                lines = file.readlines()
        except FileNotFoundError:
            return []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # still being written
        self.offset += sum(map(len, lines))
        return [record for line in lines if (record := _json_record(line)) and "loss" in record]
