"""What the notebooks show beside figures: tokens, tables and the workflow, as HTML and as text.

HTML takes the colours of JupyterLab's theme where there is one; every text in it is escaped.

    table([{"name": "a.weight", "MB": 0.5}, {"name": "b.weight", "MB": 12.25}], caption="weights")
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from glm3kit.data.token_file import IGNORE_INDEX
from glm3kit.errors import DataError
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

NOTEBOOKS = (
    ("01_setup_check", "Check the setup", "环境检查"),
    ("02_weight_conversion", "Convert the weights", "权重转换"),
    ("03_data_prep", "Prepare the data", "数据准备"),
    ("04_distributed_finetune", "Fine-tune", "分布式微调"),
    ("05_loss_plotting", "Plot the loss", "损失曲线"),
    ("06_merge_and_evaluate", "Merge and evaluate", "合并与评估"),
    ("07_multi_role_chat", "Chat", "多角色对话"),
)
# JupyterLab's variables follow its light and dark themes; the values behind the commas are for other viewers. A doubled
# class outweighs JupyterLab's own rules for tables and lists.
STYLE = f"<style>\n{Path(__file__).with_suffix('.css').read_text(encoding='utf-8')}</style>"


class Html:
    """Something to show: HTML in a notebook, the same as text elsewhere."""

    def __init__(self, html: str, text: str):
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def token_table(ids: Sequence[int], labels: Sequence[int], tokenizer: ChatGLM3Tokenizer) -> Html:
    """The tokens of one row, those that carry loss marked; hover for position and id.

    ids, labels: (T,) each, labels shifted (`labels[i]` is the token after `ids[i]`, -100 where it carries no loss), so
    a token is marked by the label before it. Padding at the end is counted, not shown.
    Raises DataError if the lengths differ.
    """
    if len(ids) != len(labels):
        raise DataError(f"{len(ids)} ids and {len(labels)} labels; every input token needs a label")
    tokens, answers = [int(i) for i in ids], [int(i) for i in labels]
    if answers and answers[-1] != IGNORE_INDEX:
        tokens.append(answers[-1])  # predicted by the last token, not in the row itself
    marked = [False, *(answer != IGNORE_INDEX for answer in answers)][:len(tokens)]
    shown = max((i + 1 for i in range(len(tokens)) if tokens[i] != tokenizer.pad_id or marked[i]), default=0)
    spans, words = [], []
    for position, (token, loss) in enumerate(zip(tokens[:shown], marked[:shown], strict=True)):
        piece = tokenizer.piece(token)
        tag, note = ("mark", "carries loss") if loss else ("span", "no loss")
        spans.append(f'<{tag} class="glm3kit-token" role="listitem" title="position {position}, id {token}, {note}">'
                     f'{escape(piece)}</{tag}>')
        words.append(f"*{piece}*" if loss else piece)
    padding = f", then {len(tokens) - shown} of padding" if shown < len(tokens) else ""
    count = f"{sum(marked)} carry loss"
    html = (f'{STYLE}<div class="glm3kit-tokens"><div role="list" aria-label="{shown} tokens, {count}">'
            f'{" ".join(spans)}</div><small>{shown} tokens, <mark class="glm3kit-token">{count}</mark>{padding}'
            "</small></div>")
    return Html(html, f"{' '.join(words)}\n{shown} tokens, *{count}*{padding}")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _wide(text: str) -> int:
    """How many characters of a text take two columns in a terminal, as Chinese ones do."""
    return sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None, caption: str = "") -> Html:
    """Rows as a table; the keys are the column names, in the order in which they first appear.

    columns: which to show, and in what order. Numbers stand to the right, with 4 digits of a fraction.
    Example: table([{"name": "a.weight", "MB": 0.5}, {"name": "b.weight", "MB": 12.25}], caption="weights")
    """
    rows = list(rows)
    columns = list(columns if columns is not None else dict.fromkeys(key for row in rows for key in row))
    kinds = [{type(row.get(column)) for row in rows} - {type(None)} for column in columns]
    numeric = [bool(kind) and kind <= {int, float} for kind in kinds]
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]

    classes = [' class="glm3kit-number"' if right else "" for right in numeric]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(columns, classes, strict=True))
    body = "".join("<tr>" + "".join(f"<td{kind}>{escape(text)}</td>" for text, kind in zip(line, classes, strict=True))
                   + "</tr>" for line in cells)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    html = f'{STYLE}<table class="glm3kit-table">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'

    lines = [columns, *([" ".join(text.split()) for text in line] for line in cells)]  # a row is one line
    widths = [max(len(text) + _wide(text) for text in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = "\n".join("  ".join(f"{text:{'>' if right else '<'}{width - _wide(text)}}" for text, width, right
                               in zip(line, widths, numeric, strict=True)).rstrip() for line in lines)
    return Html(html, f"{caption}\n{text}" if caption else text)


def workflow_strip(current: int) -> Html:
    """The seven notebooks in a row, linked, with "you are here" at number `current` (1 to 7)."""
    assert 1 <= current <= len(NOTEBOOKS), f"there are notebooks 1 to {len(NOTEBOOKS)}, not {current}"
    items, words = [], []
    for number, (file, english, chinese) in enumerate(NOTEBOOKS, 1):
        label = f"{number} {escape(english)}<small>{escape(chinese)}</small>"
        if number == current:
            items.append(f'<li aria-current="step">{label}<small>▲ you are here · 您在这里</small></li>')
        else:
            items.append(f'<li><a href="{file}.ipynb">{label}</a></li>')
        words.append(f"[{number} {english}]" if number == current else f"{number} {english}")
    html = f'{STYLE}<nav class="glm3kit-strip" aria-label="The workflow · 流程"><ol>{"".join(items)}</ol></nav>'
    return Html(html, f"{' > '.join(words)}\n[...]: you are here")
