"""Tables, tokens and the workflow: HTML in which nothing from outside is HTML, and the same as text."""

import json
from html.parser import HTMLParser

import pytest
from IPython.core.formatters import DisplayFormatter

from glm3kit.errors import DataError
from glm3kit.notebook.html import NOTEBOOKS, table, token_table, workflow_strip
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

NASTY = '<script>alert("1")</script><img src=x onerror=\'alert(2)\'>&amp;'


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
