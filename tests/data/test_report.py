"""What is said about data before training: by hand arithmetic on rows of known lengths."""

import json

import numpy as np
import pytest
from support import TINY

from glm3kit.config.groups import DataConfig
from glm3kit.config.load import load_config
from glm3kit.data.encode import prepare_data
from glm3kit.data.report import find_overlap, length_panels, recommend_window, recommendation, window_choices
from glm3kit.data.token_file import ADGEN, CONVERSATION, EncodedRows, write_token_file


def write(folder, rows, window=10_000):
    """A token file of (kind, source, target) rows with ids of their own."""
    lengths = [min(source + target + 1, window) for _, source, target in rows]
    ids = np.arange(sum(lengths), dtype=np.int32) + 1
    mask = np.concatenate([np.r_[np.zeros(length - 2), 1, 0] for length in lengths])
    origins = [(0, line, *row) for line, row in enumerate(rows, 1)]
    return write_token_file(folder, "d", [EncodedRows(ids, mask, lengths, origins)], {"files": [{"file": "a.json"}]})


def choice(choices, seq_length):
    return next(choice for choice in choices if choice["seq_length"] == seq_length)


# --- windows


def test_a_window_is_split_so_that_the_fewest_rows_are_cut(tmp_path):
    # 98 rows of 20 + 60 tokens, one with a long source, one with a long target.
    tokens = write(tmp_path / "t", [(ADGEN, 20, 60)] * 98 + [(ADGEN, 90, 5), (ADGEN, 30, 150)])
    choices = window_choices(tokens, DataConfig())
    first = choice(choices, 96)
    # 95 = source + target: 30 + 65 or 35 + 60 would do as well, 20 leaves the most for the target.
    assert (first["max_source_length"], first["max_target_length"], first["rows_cut"]) == (20, 75, 0.02)
    # Kept: 98 * 81, then 20 + 5 + 1 and 20 + 75 + 1.
    assert first["padding"] == pytest.approx(1 - (98 * 81 + 26 + 96) / (100 * 96))
    assert choice(choices, 192)["max_source_length"] == 64 and choice(choices, 192)["configured"]
    assert choice(choices, 192)["rows_cut"] == 0.02  # the configured split, 64 + 127: 90 and 150 are cut
    assert choice(choices, 256)["rows_cut"] == 0 and choices[-1]["seq_length"] == 256


def test_conversations_are_cut_at_the_window(tmp_path):
    tokens = write(tmp_path / "t", [(CONVERSATION, 49, 50)] * 3 + [(CONVERSATION, 100, 99)])
    choices = window_choices(tokens, DataConfig(max_seq_length=128))
    assert [c["rows_cut"] for c in choices] == [0.25, 0.25, 0.25, 0]  # 128, 160, 192, 224
    assert choices[0]["padding"] == pytest.approx(1 - (300 + 128) / (4 * 128))
    assert choices[0]["max_source_length"] is None
    assert choices[-1]["padding_packed"] == pytest.approx(1 - 500 / (3 * 224))  # 200, 100 + 100, 100


def test_the_configured_window_is_among_the_choices_however_far(tmp_path):
    tokens = write(tmp_path / "t", [(ADGEN, 30, 60)] * 4)
    choices = window_choices(tokens, DataConfig(max_source_length=1024, max_target_length=1023))
    assert [c["seq_length"] for c in choices] == [96, 2048]
    assert choice(choices, 2048)["padding"] == pytest.approx(1 - 91 / 2048)


def test_the_smallest_window_that_cuts_one_row_of_a_hundred_is_recommended(tmp_path):
    tokens = write(tmp_path / "t", [(ADGEN, 30, 60)] * 199 + [(ADGEN, 30, 300)])
    choices = window_choices(tokens, DataConfig())
    assert recommend_window(choices)["seq_length"] == 96
    told = recommendation(choices)
    assert "Choose seq_length 96 (max_source_length: 30, max_target_length: 65): 0.5% of the rows are cut" in told
    assert "configured 192 it is 0.5% and" in told
    same = window_choices(tokens, DataConfig(max_source_length=30, max_target_length=65))
    assert recommendation(same).startswith("Keep seq_length 96")


def test_histograms_stand_on_the_lengths_before_cutting(tmp_path):
    tokens = write(tmp_path / "t", [(ADGEN, 30, 60), (CONVERSATION, 400, 100)], window=192)
    panels = length_panels(tokens, DataConfig())
    assert [(lengths.tolist(), limit) for lengths, limit in panels.values()] == [
        ([30], 64), ([60], 127), ([91, 501], 192)]
    talks = write(tmp_path / "talks", [(CONVERSATION, 400, 100)])
    assert [limit for _, limit in length_panels(talks, DataConfig(max_seq_length=2048)).values()] == [None, None, 2048]


# --- rows that repeat


def test_held_out_rows_that_training_sees_are_found_with_their_places(tmp_path):
    def rows(name, *texts):
        path = tmp_path / f"{name}.json"
        path.write_text("".join(json.dumps({"content": source, "summary": target}) + "\n" for source, target in texts))
        return path

    train = rows("train", ("red", "skirt"), ("blue", "coat"), ("red", "skirt"), ("green", "hat"))
    held_out = rows("dev", ("blue", "shoe"), ("red", "skirt"), ("redskirt", "red"), ("green", "hats"))
    config = load_config(TINY, [f"data.train_path={train}", f"data.eval_path={held_out}",
                                f"output_dir={tmp_path / 'out'}"])
    files = prepare_data(config, progress=False)
    overlap = find_overlap(files["train"], files["eval"])
    assert overlap == {"rows": [("dev.json:2", "train.json:1")],
                       "sources": [("dev.json:1", "train.json:2"), ("dev.json:4", "train.json:4")]}
