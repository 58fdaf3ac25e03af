"""The curves of a run and the lengths of rows as figures.

Matplotlib's objects are used directly: no pyplot, so no global state, no backend, no screen.

    loss_figure(read_metrics("output/tiny")).savefig("loss.png")
"""

import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def smooth(values: Iterable[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start as Adam's moments are (https://arxiv.org/abs/1412.6980).

    weight: of the past, 0 to 1. What is not finite leaves the average as it was.
    Example: smooth([4.0, 2.0], 0.5) -> [4.0, 2.6667]: (0.25 * 4 + 0.5 * 2) / 0.75
    """
    average, total, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            total = weight * total + (1 - weight)
        result.append(average / total if total else math.nan)
    return result


def _curve(records: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, in order; the last record of a repeated step counts (a resumed run)."""
    values = {record["step"]: record[key] for record in records if key in record}
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _draw_loss(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = _curve(records, "loss")
    pale = len(steps) > 1  # a single step has no curve yet
    axes.plot(steps, losses, color="#1f77b4", alpha=0.35 if pale else 1, linewidth=0.8, marker="" if pale else "o",
              label="training loss")
    if pale:
        window = max(2, len(steps) / 50)  # in proportion: a curve of any length keeps its shape
        axes.plot(steps, smooth(losses, 1 - 1 / window), color="#1f77b4", linewidth=2.2, label="smoothed")
    steps, losses = _curve(records, "eval_loss")
    if steps:
        axes.plot(steps, losses, color="#c2410c", marker="o", linestyle="", markersize=6, label="held-out loss")
    epochs = {record.get("epoch"): record["step"] for record in reversed(records)}  # the first step of each
    for number, step in enumerate(sorted(step for epoch, step in epochs.items() if epoch)[1:21]):
        axes.axvline(step, color="#555555", linewidth=1, linestyle=":", label="" if number else "new epoch")
    axes.set_ylabel("loss")
    axes.legend(loc="upper right", frameon=False)


def _draw_learning_rate(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    axes.plot(*_curve(records, "learning_rate"), color="#4d7c0f", linewidth=1.5)
    axes.set(ylabel="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", scilimits=(-3, 3))


def _draw_throughput(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    axes.plot(*_curve(records, "tokens_per_second"), color="#6d28d9", linewidth=1)
    axes.set(ylabel="tokens per second", ylim=(0, None))


def _draw_step_time(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    steps, times = _curve(records, "step_time_ms")
    axes.plot(steps, times, color="#6d28d9", linewidth=1)
    axes.set(ylabel="ms per step", ylim=(0, None))
    limit = 3 * statistics.median(times)
    beyond = [time for time in times if time > limit]
    if beyond:  # the first step compiles the graph: it would flatten all others
        axes.set_ylim(top=limit)
        axes.text(0.99, 0.93, f"{len(beyond)} slower, up to {max(beyond):,.0f} ms", transform=axes.transAxes,
                  ha="right", va="top", fontsize="small")


def loss_figure(records: Iterable[Mapping[str, Any]], title: str | None = None) -> Figure:
    """The curves of a run: loss (each step and smoothed, held-out loss as points), learning rate, throughput.

    records: as `read_metrics` gives them; panels without values are left out. Throughput is in tokens per second, or
    the time of a step where a log has no tokens.
    Example: loss_figure(read_metrics("worker_0.log"), "my run").savefig("loss.png")
    """
    records = list(records)
    present = {key for record in records for key in record}
    panels = [(_draw_loss, 3)] if present & {"loss", "eval_loss"} else []
    if "learning_rate" in present:
        panels.append((_draw_learning_rate, 1))
    if present & {"tokens_per_second", "step_time_ms"}:
        panels.append((_draw_throughput if "tokens_per_second" in present else _draw_step_time, 1))
    figure = NotebookFigure(figsize=(9, 1.5 + 1.5 * sum(height for _, height in panels)), dpi=100, layout="constrained")
    if title:
        figure.suptitle(title, parse_math=False)  # a file name may have a $ in it
    if not panels:
        figure.text(0.5, 0.4, "no steps yet", ha="center")
        return figure
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[height for _, height in panels])
    for axes, (draw, _) in zip(rows[:, 0], panels, strict=True):
        draw(axes, records)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1, 0].set_xlabel("step")
    rows[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels()
    return figure


def length_figure(panels: Mapping[str, tuple[np.ndarray, int | None]]) -> Figure:
    """Histograms of rows' lengths in tokens, one below the other, each with its limit if it has one.

    What is longer than the limit and than 99.5 % of the rows is counted in the last bar.
    Example: length_figure({"source": (np.array([12, 80, 31]), 64)})
    """
    figure = NotebookFigure(figsize=(8, 1.7 * len(panels)), dpi=80, layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (label, (lengths, limit)) in zip(rows, panels.items(), strict=True):
        top = max(int(np.percentile(lengths, 99.5)), limit or 1)  # a few very long rows would flatten all others
        width = math.ceil((top + 1) / 40)  # whole tokens: every bar counts as many lengths as the others
        axes.hist(np.minimum(lengths, top), bins=np.arange(0, top + 1 + width, width), color="#1f77b4", alpha=0.8)
        axes.set(xlabel=f"{label} in tokens, up to {lengths.max():,}", ylabel="rows")
        if limit:
            axes.axvline(limit, color="#c2410c", linewidth=1.5)
            axes.set_title(f"limit {limit}: {(lengths > limit).mean():.1%} longer", loc="right", color="#c2410c",
                           fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    return figure
