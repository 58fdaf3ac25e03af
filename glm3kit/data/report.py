"""What to know about the data before training, in numbers: which window fits, how long rows are, what repeats.

    tokens = prepare_data(config)["train"]
    print(recommendation(window_choices(tokens, config.data)))
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glm3kit.config.groups import DataConfig
from glm3kit.data.batches import pack_rows
from glm3kit.data.token_file import ADGEN, IGNORE_INDEX, TokenFile

WINDOWS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072,
           4096, 6144, 8192)  # tokens
ACCEPTED_CUT = 0.01  # share of rows


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


def recommend_window(choices: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The smallest window that cuts at most 1 % of the rows; the one that cuts the fewest if none does."""
    return next((choice for choice in choices if choice["rows_cut"] <= ACCEPTED_CUT),
                min(choices, key=lambda choice: choice["rows_cut"]))


def recommendation(choices: Sequence[Mapping[str, Any]]) -> str:
    """A sentence or two: which settings to choose, and on what evidence."""
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


def _digests(tokens: TokenFile) -> Iterator[tuple[bytes, bytes]]:
    """For each row a digest of its ids, and one of those before its first answer."""
    for ids, labels in tokens:
        source = ids[:np.argmax(labels != IGNORE_INDEX) + 1]
        yield hashlib.blake2b(ids, digest_size=16).digest(), hashlib.blake2b(source, digest_size=16).digest()


def find_overlap(train: TokenFile, held_out: TokenFile) -> dict[str, list[tuple[str, str]]]:
    """Rows of `held_out` that training sees, as encoded: pairs of places ("dev.json:3", "train.json:17").

    "rows": the whole row is the same. "sources": only what stands before the first answer is.
    """
    seen_rows: dict[bytes, int] = {}
    seen_sources: dict[bytes, int] = {}
    for row, (whole, source) in enumerate(_digests(train)):
        seen_rows.setdefault(whole, row)
        seen_sources.setdefault(source, row)
    overlap: dict[str, list[tuple[str, str]]] = {"rows": [], "sources": []}
    for row, (whole, source) in enumerate(_digests(held_out)):
        if whole in seen_rows:
            overlap["rows"].append((place(held_out, row), place(train, seen_rows[whole])))
        elif source in seen_sources:
            overlap["sources"].append((place(held_out, row), place(train, seen_sources[source])))
    return overlap


def length_panels(tokens: TokenFile, data: DataConfig) -> dict[str, tuple[np.ndarray, int | None]]:
    """Lengths before cutting and their limits, for a histogram each: source, target, total.

    Where there are ADGEN rows source and target are theirs alone, for their limits are.
    """
    adgen = tokens.origins.kind == ADGEN
    source, target = np.asarray(tokens.origins.source), np.asarray(tokens.origins.target)
    rows, limits = slice(None), (None, None)
    if adgen.any():
        rows, limits = adgen, (data.max_source_length, data.max_target_length)
    return {"source": (source[rows], limits[0]), "target": (target[rows], limits[1]),
            "source + target + 1": (source + target + 1, data.seq_length)}
