"""What glm3kit.data.report counts, as tables, figures and a page of its own.

    for part in data_report(prepare_data(config), config): display(part)
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from glm3kit.config.groups import RunConfig
from glm3kit.data.report import find_overlap, length_panels, place, recommend_window, recommendation, window_choices
from glm3kit.data.rows import count_reasons
from glm3kit.data.token_file import TokenFile
from glm3kit.files import atomic_write
from glm3kit.notebook.figures import NotebookFigure, length_figure
from glm3kit.notebook.html import STYLE, Html, table, token_table
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

_SHOWN = 5  # examples of rows that repeat
_WIDEST = 300  # letters of a list of lines


def row_table(files: Mapping[str, TokenFile]) -> Html:
    """Rows read, kept, skipped and cut, and the share of tokens that carry loss."""
    counts = ("rows_read", "rows_kept", "rows_skipped", "adgen_rows", "conversations", "cut_sources", "cut_answers",
              "cut_conversations", "tokens")
    rows = []
    for name, tokens in files.items():
        report = tokens.report
        encodings = " ".join(sorted({file["encoding"] for file in report["files"]}))
        rows.append({"": name} | {count.replace("_", " "): report[count] for count in counts}
                    | {"carry loss": f"{report['answer_tokens'] / report['tokens']:.1%}", "encoding": encodings})
    return table(rows, caption="Rows and tokens")


def skip_table(files: Mapping[str, TokenFile]) -> Html:
    """Skipped rows by reason, with their lines."""
    if not any(tokens.report["skipped"] for tokens in files.values()):
        return Html("<p>No row was skipped.</p>", "No row was skipped.")
    rows = []
    for name, tokens in files.items():
        for reason in count_reasons(tokens.report["skipped"]):
            where = reason["where"]
            if len(where) > _WIDEST:
                where = f"{where[:_WIDEST]}..., all in {tokens.folder.name}/tokens.json"
            rows.append({"": name} | reason | {"where": where})
    return table(rows, ["", "reason", "rows", "where"], caption="Skipped rows")


def choice_table(choices: Sequence[Mapping[str, Any]]) -> Html:
    """`window_choices` as a table, the recommended and the configured one marked."""
    best, rows = recommend_window(choices), []
    for choice in choices:
        marks = {"recommended": choice is best, "configured": choice["configured"]}
        rows.append({"seq_length": choice["seq_length"], "source": choice["max_source_length"],
                     "target": choice["max_target_length"], "rows cut": f"{choice['rows_cut']:.1%}",
                     "padding": f"{choice['padding']:.0%}", "packed": f"{choice['padding_packed']:.0%}",
                     "": ", ".join(mark for mark, is_so in marks.items() if is_so)})
    return table(rows, caption="Windows: which share of the rows is cut, which of the tokens is padding")


def overlap_table(overlap: Mapping[str, list[tuple[str, str]]], held_out: TokenFile) -> Html:
    """`find_overlap` as a table: counts, shares and the first places."""
    rows = [{"the same as in training": what, "held-out rows": len(pairs),
             "share": f"{len(pairs) / len(held_out):.1%}",
             "such as": ", ".join(f"{here} = {there}" for here, there in pairs[:_SHOWN])}
            for what, pairs in (("row", overlap["rows"]), ("source, another answer", overlap["sources"]))]
    return table(rows, caption="Overlap of held-out and training rows")


def samples(tokens: TokenFile, tokenizer: ChatGLM3Tokenizer, count: int = 10, seed: int = 0) -> Html:
    """Some rows, drawn by `seed`, as token tables; what carries loss is marked."""
    drawn = np.random.default_rng(seed).choice(len(tokens), min(count, len(tokens)), replace=False)
    parts = [(place(tokens, row), token_table(*tokens[row], tokenizer)) for row in sorted(map(int, drawn))]
    return Html(STYLE + "".join(f"<p><b>{escape(where)}</b></p>{shown.html.removeprefix(STYLE)}"
                                for where, shown in parts),
                "\n\n".join(f"{where}\n{shown.text}" for where, shown in parts))


def data_report(files: Mapping[str, TokenFile], config: RunConfig) -> list[Html | NotebookFigure]:
    """All of it for the token files of a run, in the order in which it is read."""
    tokenizer = ChatGLM3Tokenizer(config.model.tokenizer_path)
    first = files.get("train") or files["eval"]
    choices = window_choices(first, config.data)
    advice = recommendation(choices)
    parts = [row_table(files), skip_table(files), length_figure(length_panels(first, config.data)),
             choice_table(choices), Html(f"<p>{escape(advice)}</p>", advice)]
    if len(files) == 2:
        parts.append(overlap_table(find_overlap(files["train"], files["eval"]), files["eval"]))
    return [*parts, samples(first, tokenizer)]


def report_text(parts: Iterable[Html | NotebookFigure]) -> str:
    """A report for a terminal: all but its figures."""
    return "\n\n".join(part.text for part in parts if isinstance(part, Html))


def write_report(parts: Iterable[Html | NotebookFigure], path: str | Path, title: str) -> Path:
    """Write a report as one HTML page without references to other files."""
    body = [part.html if isinstance(part, Html) else
            f'<img alt="lengths" src="data:image/png;base64,{base64.b64encode(part._repr_png_()).decode()}">'
            for part in parts]
    atomic_write(path, f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title>\n<body style="font: 15px '
                       f'system-ui, sans-serif; margin: 2em auto; max-width: 70em">\n<h1>{escape(title)}</h1>\n'
                       + "\n".join(body))
    return Path(path)
