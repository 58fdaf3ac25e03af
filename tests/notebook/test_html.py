"""Display: figures that need no screen, HTML in which nothing from outside is HTML."""

import json
import math
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from IPython.core.formatters import DisplayFormatter

from glm3kit.errors import DataError
from glm3kit.jobs.metrics import read_metrics
from glm3kit.notebook.figures import loss_figure, smooth
from glm3kit.notebook.html import NOTEBOOKS, table, token_table, workflow_strip
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

NASTY = '<script>alert("1")</script><img src=x onerror=\'alert(2)\'>&amp;'
RUN = [{"step": step, "loss": 8.0 / step, "learning_rate": 1e-4 / step, "tokens_per_second": 1000.0 + step}
       for step in range(1, 101)]


class Page(HTMLParser):
    """The tags and the text that a browser would find."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(html)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


# Figures


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
    code = ("import sys; from glm3kit.notebook.html import loss_figure; "
            "loss_figure([{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}]).savefig(sys.argv[1]); "
            "assert 'matplotlib.pyplot' not in sys.modules and 'mindspore' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, tmp_path / "loss.svg"], check=True, env={"PATH": "/usr/bin"})
    assert "<svg" in (tmp_path / "loss.svg").read_text()


# Tokens


class Letters:
    """A tokenizer whose pieces are given."""

    pad_id = 0

    def __init__(self, *pieces: str):
        self.pieces = pieces

    def piece(self, id_: int) -> str:
        return self.pieces[id_]


def test_the_marked_tokens_of_a_real_row_are_its_answer(shared):
    tokenizer = ChatGLM3Tokenizer(shared / "data/tokenizer/tokenizer.model")
    row = json.loads((shared / "golden/text/adgen_encoded.json").read_text())[0]
    page = Page(token_table(row["input_ids"], row["labels"], tokenizer).html)
    marked = [attributes for attributes in page.all("mark") if "title" in attributes]
    answer = [*tokenizer.encode(row["summary"], False, row["max_target_length"]), 2]
    assert [int(attributes["title"].split("id ")[1].split(",")[0]) for attributes in marked] == answer
    prompt = tokenizer.encode(row["content"], max_length=row["max_source_length"])
    assert marked[0]["title"] == f"position {len(prompt)}, id {answer[0]}, carries loss"


def test_a_token_is_marked_by_the_label_before_it():
    shown = token_table([1, 2, 3, 0, 0], [-100, 3, -100, -100, -100], Letters("pad", "a", "b", "c"))
    assert repr(shown) == "a b *c*\n3 tokens, *1 carry loss*, then 2 of padding"
    titles = [attributes.get("title") for tag, attributes in Page(shown.html).tags if tag in ("span", "mark")]
    assert titles == ["position 0, id 1, no loss", "position 1, id 2, no loss", "position 2, id 3, carries loss", None]


def test_the_token_after_the_row_is_shown_when_it_is_predicted():
    assert repr(token_table([1, 2], [2, 3], Letters("pad", "a", "b", "c"))) == "a *b* *c*\n3 tokens, *2 carry loss*"


def test_pieces_are_never_html():
    shown = token_table([1, 2], [2, -100], Letters("pad", NASTY, "<b>"))
    page = Page(shown.html)
    assert {tag for tag, _ in page.tags} == {"style", "div", "span", "mark", "small"}
    assert NASTY in page.text and "<b>" in page.text


def test_an_input_token_without_label_is_an_error():
    with pytest.raises(DataError, match="2 ids and 1 labels; every input token needs a label"):
        token_table([1, 2], [2], Letters("pad", "a", "b"))


def test_no_tokens_make_an_empty_table():
    assert repr(token_table([], [], Letters())) == "\n0 tokens, *0 carry loss*"


# Tables


def test_a_table_reads_well_as_text():
    rows = [{"name": "embedding_table", "MB": 532.676608, "shape": (65024, 4096), "rows": 65024},
            {"name": "中文", "MB": None, "rows": 7, "note": "two\nlines"}]
    assert repr(table(rows, caption="weights")) == "\n".join([
        "weights",
        "name                MB  shape            rows  note",
        "---------------  -----  -------------  ------  ---------",
        "embedding_table  532.7  (65024, 4096)  65,024",
        "中文                                        7  two lines"])


def test_a_table_is_never_html():
    page = Page(table([{NASTY: NASTY, "b": 1}], caption=NASTY).html)
    assert {tag for tag, _ in page.tags} == {"style", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert page.text.count(NASTY) == 3


def test_columns_can_be_chosen():
    assert repr(table([{"a": 1, "b": 2, "c": 3}], columns=["c", "a"])) == "c  a\n-  -\n3  1"
    assert repr(table([])) == "\n"


def test_numbers_stand_to_the_right_and_headings_name_their_column():
    page = Page(table([{"name": "x", "MB": 1.5}]).html)
    assert page.all("th") == [{"scope": "col"}, {"scope": "col", "class": "glm3kit-number"}]
    assert page.all("td") == [{}, {"class": "glm3kit-number"}]


# The workflow


@pytest.mark.parametrize("current", range(1, 8))
def test_the_strip_links_the_other_six_notebooks(current):
    page = Page(workflow_strip(current).html)
    items = page.all("li")
    assert [number for number, item in enumerate(items, 1) if item.get("aria-current") == "step"] == [current]
    assert [link["href"] for link in page.all("a")] == [
        f"{file}.ipynb" for number, (file, _, _) in enumerate(NOTEBOOKS, 1) if number != current]
    assert "▲ you are here · 您在这里" in page.text
    assert f"[{current} {NOTEBOOKS[current - 1][1]}]" in repr(workflow_strip(current))


@pytest.mark.parametrize("shown", [table([{"a": 1}]), workflow_strip(1), token_table([], [], Letters())])
def test_a_notebook_gets_html_and_text(shown):
    data, _ = DisplayFormatter().format(shown)
    assert data["text/html"] == shown.html and data["text/plain"] == repr(shown)
