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
import re
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import DataError
from glm3kit.weights.names import EMBEDDING, parameter_shapes

METRICS_FILE = "metrics.jsonl"
NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
STEP = re.compile(rf"step:\[\s*(?P<step>\d+)/\s*(?P<steps>\d+)\],\s*loss:\s*\[?(?P<loss>{NUMBER})")
EPOCH = re.compile(r"Epoch:\[\s*(\d+)/\s*\d+\]")
# What follows the loss; the forms of 0.6 ("time:", "lr:[...]") to 2.0 ("grad_norm:").
FIELDS = {
    "learning_rate": re.compile(rf"\blr:\s*\[?({NUMBER})"),
    "step_time_ms": re.compile(rf"\b(?:per_step_time|time):\s*({NUMBER})\s*ms"),
    "loss_scale": re.compile(rf"\bloss_scale:\s*({NUMBER})"),
    "grad_norm": re.compile(rf"\b(?:global_norm|grad_norm):?\s*(?:\[\s*({NUMBER})\s*\]|({NUMBER}))"),
}
OVERFLOW = re.compile(r"\boverflow cond:\s*(True|False)")


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


def _read_log_line(line: str) -> dict[str, Any] | None:
    """The record of a log line, or None for a line that is no step's."""
    found = STEP.search(line)
    if not found:
        return None
    record: dict[str, Any] = {"step": int(found["step"]), "loss": float(found["loss"])}
    if epoch := EPOCH.search(line[:found.start()]):
        record["epoch"] = int(epoch[1])
        record["step"] += (record["epoch"] - 1) * int(found["steps"])  # it is counted within the epoch there
    rest = line[found.end():]
    for key, pattern in FIELDS.items():
        if value := pattern.search(rest):
            record[key] = float(value[value.lastindex])
    if overflow := OVERFLOW.search(rest):
        record["overflow"] = overflow[1] == "True"
    return record


def _read_log(path: Path, text: str) -> list[dict[str, Any]]:
    records = [record for line in text.splitlines() if (record := _read_log_line(line))]
    if text.strip() and not records:
        raise DataError(f"{path}: {len(text.splitlines())} lines, none of which is a step's; expected lines such as "
                        "'Epoch:[  1/  5], step:[    2/  535], loss: 2.248, ...'; give the log of the rank that prints "
                        "the loss (the last one of a pipeline, else rank 0)")
    return records


def _read_json_line(place: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise DataError(f"{place}: no JSON ({err}): {line[:80]!r}; expected an object; remove the line") from err
    kind = "eval_loss" if isinstance(record, dict) and "eval_loss" in record else "loss"
    if not isinstance(record, dict) or type(record.get("step")) is not int or kind not in record:
        raise DataError(f"{place}: {line[:80]!r} is no record; expected an object with 'step' (a whole number) and "
                        "'loss' or 'eval_loss'; remove the line")
    return {key: math.nan if value is None else value for key, value in record.items()}  # JSON has no NaN


def _read_json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    """One record a step and kind: a resumed job repeats steps, the last record counts."""
    *lines, last = text.split("\n")
    if last.rstrip().endswith("}"):  # else it is empty, or being written now
        lines.append(last)
    records = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            record = _read_json_line(f"{path}:{number}", line)
            records[record["step"], "eval_loss" in record] = record
    return [records[key] for key in sorted(records)]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read what a run measured: a job folder, a metrics.jsonl, or a log of MindFormers; each also as .gz.

    Returns a dict a step: step (from the start of training, over all epochs), loss, and learning_rate, step_time_ms,
    overflow, loss_scale, grad_norm, epoch where present. A metrics.jsonl also has tokens_per_second, and the records of
    evaluations (step, eval_loss); its steps are in order, the last record of a repeated step counts, and a last line
    that is still being written is left out. A log gives a record for every line of a step, as they stand. MindFormers
    0.6 prints the time between two lines, which is that of several steps.
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

        with MetricsWriter("output/tiny/metrics.jsonl") as metrics: metrics.write({"step": 1, "loss": 7.62})
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+", buffering=0)
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers of NumPy are numbers, None is left out, what is not finite becomes null."""
        plain = {key: value.item() if isinstance(value, np.generic | np.ndarray) else value
                 for key, value in record.items() if value is not None}
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in plain.items()}
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
