"""What to know about the data before training: rows, lengths, which window fits, what carries loss, what repeats.

    files = prepare_data(config)
    for part in data_report(files, config): display(part)
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from glm3kit.config.groups import DataConfig, RunConfig
from glm3kit.data.packing import pack_rows
from glm3kit.data.rows import count_reasons
from glm3kit.data.token_file import ADGEN, IGNORE_INDEX, TokenFile
from glm3kit.files import atomic_write
from glm3kit.notebook.html import STYLE, Html, NotebookFigure, length_figure, table, token_table
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

WINDOWS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072,
           4096, 6144, 8192)  # tokens
ACCEPTED_CUT = 0.01  # share of rows
_SHOWN = 5  # examples of rows that repeat
_WIDEST = 300  # letters of a list of lines


def place(tokens: TokenFile, row: int) -> str:
    """Where a row of a token file came from: "train.json:17"."""
    return f"{tokens.report['files'][tokens.origins.file[row]]['file']}:{tokens.origins.line[row]}"


def _best_split(pairs: np.ndarray, counts: np.ndarray, seq_length: int) -> tuple[int, int]:
    """max_source_length and max_target_length that cut the fewest rows in a window of seq_length tokens.

    pairs: (N, 2) source and target lengths; counts: (N,) rows of each. Of equal ones the longest target.
    """
    source, target = pairs.T
    room = seq_length - 1  # eos
    limits = np.unique(np.clip(source, 1, room - 1))
    cut = [counts[(source > limit) | (target > room - limit)].sum() for limit in limits]
    limit = int(limits[np.argmin(cut)])
    return limit, room - limit


def window_choices(tokens: TokenFile, data: DataConfig) -> list[dict[str, Any]]:
    """How rows are cut in each window that is a choice, and how much of it is padding.

    Windows that cut more than half of the rows are none, nor those beyond the first that cuts nothing; the configured
    one is always there.

    Returns dicts with "seq_length", "max_source_length" and "max_target_length" (the split that cuts the fewest rows;
    the configured one for the configured window; None without ADGEN rows), "rows_cut", "padding" and "padding_packed"
    (shares, packed as `pack_rows` does), "configured".
    """
    adgen = tokens.origins.kind == ADGEN
    source, target = np.asarray(tokens.origins.source), np.asarray(tokens.origins.target)
    whole = source + target + 1
    pairs, counts = np.unique(np.stack([source[adgen], target[adgen]], 1), axis=0, return_counts=True)
    choices, all_fit = [], False
    for window in sorted({*WINDOWS, data.seq_length}):
        configured = window == data.seq_length
        if all_fit and not configured:
            continue
        kept, split = np.minimum(whole, window), (None, None)
        if adgen.any():
            split = ((data.max_source_length, data.max_target_length) if configured
                     else _best_split(pairs, counts, window))
            kept = np.where(adgen, np.minimum(source, split[0]) + np.minimum(target, split[1]) + 1, kept)
        cut = float((kept < whole).mean())
        if cut > 0.5 and not configured:
            continue
        used = int(kept.sum())
        choices.append({"seq_length": window, "max_source_length": split[0], "max_target_length": split[1],
                        "rows_cut": cut, "padding": 1 - used / (len(tokens) * window),
                        "padding_packed": 1 - used / (len(pack_rows(kept, window)) * window),
                        "configured": configured})
        all_fit = all_fit or not cut
    return choices


def recommend_window(choices: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The smallest window that cuts at most 1 % of the rows; the one that cuts the fewest if none does."""
    choices = list(choices)
    return next((choice for choice in choices if choice["rows_cut"] <= ACCEPTED_CUT),
                min(choices, key=lambda choice: choice["rows_cut"]))


def recommendation(choices: Iterable[Mapping[str, Any]]) -> str:
    """A sentence or two: which settings to choose, and on what evidence."""
    choices = list(choices)
    best = recommend_window(choices)
    now = next(choice for choice in choices if choice["configured"])
    if best["max_source_length"]:
        settings = f"max_source_length: {best['max_source_length']}, max_target_length: {best['max_target_length']}"
    else:
        settings = f"max_seq_length: {best['seq_length']}"
    shares = f"{best['rows_cut']:.1%} of the rows are cut, {best['padding']:.0%} is padding"
    if best["configured"]:
        return f"Keep seq_length {best['seq_length']} ({settings}): {shares}."
    return (f"Choose seq_length {best['seq_length']} ({settings}): {shares}. With the configured {now['seq_length']} "
            f"it is {now['rows_cut']:.1%} and {now['padding']:.0%}.")


def _digests(tokens: TokenFile) -> tuple[list[bytes], list[bytes]]:
    """For each row a digest of its ids, and one of those before its first answer."""
    rows, sources = [], []
    for ids, labels in tokens:
        start = int(np.argmax(labels != IGNORE_INDEX)) + 1
        rows.append(hashlib.blake2b(ids.tobytes(), digest_size=16).digest())
        sources.append(hashlib.blake2b(ids[:start].tobytes(), digest_size=16).digest())
    return rows, sources


def find_overlap(train: TokenFile, held_out: TokenFile) -> dict[str, list[tuple[str, str]]]:
    """Rows of `held_out` that training sees, as encoded: pairs of places ("dev.json:3", "train.json:17").

    "rows": the whole row is the same. "sources": only what stands before the first answer is.
    """
    seen_rows, seen_sources = ({digest: row for row, digest in reversed(list(enumerate(digests)))}
                               for digests in _digests(train))
    overlap: dict[str, list[tuple[str, str]]] = {"rows": [], "sources": []}
    for row, (whole, source) in enumerate(zip(*_digests(held_out), strict=True)):
        if whole in seen_rows:
            overlap["rows"].append((place(held_out, row), place(train, seen_rows[whole])))
        elif source in seen_sources:
            overlap["sources"].append((place(held_out, row), place(train, seen_sources[source])))
    return overlap


def length_panels(tokens: TokenFile, data: DataConfig) -> dict[str, tuple[np.ndarray, int | None]]:
    """Lengths before cutting and their limits, for `length_figure`: source, target, total.

    Where there are ADGEN rows source and target are theirs alone, for their limits are.
    """
    adgen = tokens.origins.kind == ADGEN
    source, target = np.asarray(tokens.origins.source), np.asarray(tokens.origins.target)
    panels = {"source + target + 1": (source + target + 1, data.seq_length)}
    if adgen.any():
        return {"source": (source[adgen], data.max_source_length), "target": (target[adgen], data.max_target_length),
                **panels}
    return {"source": (source, None), "target": (target, None), **panels}


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


def choice_table(choices: Iterable[Mapping[str, Any]]) -> Html:
    """`window_choices` as a table, the recommended and the configured one marked."""
    choices = list(choices)
    best, rows = recommend_window(choices), []
    for choice in choices:
        marks = ["recommended"] * (choice is best) + ["configured"] * choice["configured"]
        rows.append({"seq_length": choice["seq_length"], "source": choice["max_source_length"],
                     "target": choice["max_target_length"], "rows cut": f"{choice['rows_cut']:.1%}",
                     "padding": f"{choice['padding']:.0%}", "packed": f"{choice['padding_packed']:.0%}",
                     "": ", ".join(marks)})
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
