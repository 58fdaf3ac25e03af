"""Figures of a run, which need no screen."""

import math
import subprocess
import sys

import pytest
from IPython.core.formatters import DisplayFormatter

from glm3kit.jobs.metrics import read_metrics
from glm3kit.notebook.figures import loss_figure, smooth

RUN = [{"step": step, "loss": 8.0 / step, "learning_rate": 1e-4 / step, "tokens_per_second": 1000.0 + step}
       for step in range(1, 101)]


def line(figure, panel, label):
    """The x and y values of a curve, or None."""
    for drawn in figure.axes[panel].lines:
        if drawn.get_label() == label:
            return list(drawn.get_xdata()), list(drawn.get_ydata())
    return None


def test_the_average_is_corrected_for_its_start():
    assert smooth([4.0, 2.0], 0.5) == pytest.approx([4.0, (0.25 * 4 + 0.5 * 2) / 0.75])
    assert smooth([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    assert smooth([], 0.9) == []


def test_the_average_steps_over_what_is_not_finite():
    assert smooth([4.0, math.nan, 2.0, math.inf], 0.5) == pytest.approx([4.0, 4.0, 8 / 3, 8 / 3])
    assert math.isnan(smooth([math.nan, 1.0], 0.5)[0])


def test_a_run_has_loss_learning_rate_and_throughput():
    records = [*RUN, {"step": 50, "eval_loss": 0.5}, {"step": 100, "eval_loss": 0.25}]
    figure = loss_figure(records, title="my run")
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "learning rate", "tokens per second"]
    assert figure.axes[2].get_xlabel() == "step"
    assert figure.get_suptitle() == "my run"
    steps, losses = line(figure, 0, "training loss")
    assert steps == list(range(1, 101)) and losses == [8.0 / step for step in steps]
    smoothed = line(figure, 0, "smoothed")[1]
    assert smoothed[0] == 8.0 and all(a > b for a, b in zip(smoothed, smoothed[1:], strict=False))
    assert line(figure, 0, "held-out loss") == ([50, 100], [0.5, 0.25])


def test_a_real_log_is_drawn_in_full_with_its_epochs(shared):
    figure = loss_figure(read_metrics(shared / "data/logs/full_v1.1_llama3_lora_worker_0.log.gz"))
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "learning rate", "ms per step"]
    steps, losses = line(figure, 0, "training loss")
    assert len(losses) == 1337 and losses[-1] == 1.489 and steps == sorted(steps)
    marks = [drawn.get_xdata()[0] for drawn in figure.axes[0].lines if drawn.get_linestyle() == ":"]
    assert marks == [536, 1072, 1606, 2142]  # the first printed step after 535, 1070, 1605 and 2140
    assert figure.axes[2].get_ylim()[1] < 10_000  # the compiling step, 364368 ms, does not flatten the others
    assert figure.axes[2].texts[0].get_text() == "1 slower, up to 364,368 ms"


def test_the_last_record_of_a_repeated_step_is_drawn():
    figure = loss_figure([*RUN, {"step": 2, "loss": 3.5}])
    assert line(figure, 0, "training loss")[1][:3] == [8.0, 3.5, 8 / 3]


@pytest.mark.parametrize("records, panels", [
    ([], 0),
    ([{"step": 1, "loss": 7.5}], 1),
    ([{"step": 1, "eval_loss": 7.5}], 1),
    ([{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.nan, "learning_rate": 0.0}], 2),
    ([{"step": 1, "loss": 7.5, "step_time_ms": 12.0}, {"step": 2, "loss": 7.0}], 2),
])
def test_a_run_of_any_length_can_be_drawn(records, panels, tmp_path):
    figure = loss_figure(records)
    assert len(figure.axes) == panels
    figure.savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert bool(figure.texts) == (panels == 0)


def test_a_title_is_no_formula():
    loss_figure(RUN, title="cost_$x$_{^}.log")._repr_png_()  # Matplotlib's formulas would raise


def test_a_notebook_shows_the_figure_without_pyplot():
    data, _ = DisplayFormatter().format(loss_figure(RUN))
    assert data["image/png"][:8] == b"\x89PNG\r\n\x1a\n"


def test_a_figure_needs_no_screen_and_touches_no_global_state(tmp_path):
    code = ("import sys; from glm3kit.notebook.figures import loss_figure; "
            "loss_figure([{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}]).savefig(sys.argv[1]); "
            "assert 'matplotlib.pyplot' not in sys.modules and 'mindspore' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, tmp_path / "loss.svg"], check=True, env={"PATH": "/usr/bin"})
    assert "<svg" in (tmp_path / "loss.svg").read_text()
