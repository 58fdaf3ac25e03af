"""What is said about data before training: by hand arithmetic on rows of known lengths."""

import json

import numpy as np
import pytest
from support import ROOT

from glm3kit.__main__ import main
from glm3kit.config.groups import DataConfig
from glm3kit.config.load import load_config
from glm3kit.data.encode import prepare_data
from glm3kit.data.report import (
    choice_table,
    data_report,
    find_overlap,
    length_panels,
    recommend_window,
    recommendation,
    report_text,
    samples,
    skip_table,
    window_choices,
    write_report,
)
from glm3kit.data.token_file import ADGEN, CONVERSATION, EncodedRows, write_token_file
from glm3kit.notebook.html import length_figure
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

CONFIG = str(ROOT / "configs/tiny.yaml")


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
    assert choice_table(choices).text.count("recommended") == 1
    same = window_choices(tokens, DataConfig(max_source_length=30, max_target_length=65))
    assert recommendation(same).startswith("Keep seq_length 96")


def test_histograms_stand_on_the_lengths_before_cutting(tmp_path):
    tokens = write(tmp_path / "t", [(ADGEN, 30, 60), (CONVERSATION, 400, 100)], window=192)
    panels = length_panels(tokens, DataConfig())
    assert [(lengths.tolist(), limit) for lengths, limit in panels.values()] == [
        ([30], 64), ([60], 127), ([91, 501], 192)]
    figure = length_figure(panels)
    heights = [[patch.get_height() for patch in axes.patches] for axes in figure.axes]
    assert [sum(height) for height in heights] == [1, 1, 2]  # every row is in a bar
    assert [axes.get_title(loc="right") for axes in figure.axes] == [
        "limit 64: 0.0% longer", "limit 127: 0.0% longer", "limit 192: 50.0% longer"]
    talks = write(tmp_path / "talks", [(CONVERSATION, 400, 100)])
    assert [limit for _, limit in length_panels(talks, DataConfig(max_seq_length=2048)).values()] == [None, None, 2048]
    assert figure._repr_png_().startswith(b"\x89PNG")


# --- rows that repeat


def test_held_out_rows_that_training_sees_are_found_with_their_places(tmp_path):
    def rows(name, *texts):
        path = tmp_path / f"{name}.json"
        path.write_text("".join(json.dumps({"content": source, "summary": target}) + "\n" for source, target in texts))
        return path

    train = rows("train", ("red", "skirt"), ("blue", "coat"), ("red", "skirt"), ("green", "hat"))
    held_out = rows("dev", ("blue", "shoe"), ("red", "skirt"), ("redskirt", "red"), ("green", "hats"))
    config = load_config(CONFIG, [f"data.train_path={train}", f"data.eval_path={held_out}",
                                               f"output_dir={tmp_path / 'out'}"])
    files = prepare_data(config, progress=False)
    overlap = find_overlap(files["train"], files["eval"])
    assert overlap == {"rows": [("dev.json:2", "train.json:1")],
                       "sources": [("dev.json:1", "train.json:2"), ("dev.json:4", "train.json:4")]}


# --- the whole report


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = [{"content": f"类型#裙*n#{i}", "summary": "<b>好看</b>"} for i in range(30)]
    bad = ["not json", '{"content": "a", "summary": " "}', '{"content": "b", "summary": ""}']
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "train.json").write_text("\n".join([*lines[:5], *bad, *lines[5:]]), encoding="utf-8")
    return load_config(CONFIG, [
        f"data.train_path={folder / 'train.json'}", "data.eval_path=[]", "data.skip_bad=true", f"output_dir={folder}"])


def test_skipped_rows_are_told_by_reason_with_their_lines(tiny):
    told = skip_table(prepare_data(tiny, progress=False)).text
    assert "column 'summary' is blank     2  train.json:7,8" in told and "not JSON                      1" in told


def test_samples_are_drawn_by_the_seed_and_marked_by_loss(tiny):
    tokens, tok = prepare_data(tiny, progress=False)["train"], ChatGLM3Tokenizer(tiny.model.tokenizer_path)
    drawn = samples(tokens, tok)
    assert drawn.text == samples(tokens, tok).text != samples(tokens, tok, seed=1).text
    assert drawn.html.count('<div class="glm3kit-tokens">') == 10 and "*</s>*" in drawn.text
    assert "<b>好" not in drawn.html and len(samples(tokens, tok, count=99).text.split("\n\n")) == 30


def test_the_report_is_a_page_of_its_own_and_a_text(tiny, tmp_path):
    parts = data_report(prepare_data(tiny, progress=False), tiny)
    page = write_report(parts, tmp_path / "report.html", "The <data>").read_text(encoding="utf-8")
    assert "<title>The &lt;data&gt;</title>" in page and 'src="data:image/png;base64,' in page
    assert "src=\"http" not in page and "<b>好" not in page
    text = report_text(parts)
    for heading in ("Rows and tokens", "Skipped rows", "Windows:", "seq_length", "carry loss*"):
        assert heading in text


def test_the_command_prints_the_report_and_writes_the_page(tiny, capsys):
    path, folder = tiny.data.train_path[0], tiny.output_dir
    call = ["data", CONFIG, f"data.train_path={path}", "data.eval_path=[]", f"output_dir={folder}"]
    assert main([*call, "--report"]) == 1
    assert "train.json:6: not JSON" in capsys.readouterr().err
    assert main([*call, "--report", "--skip-bad"]) == 0
    told = capsys.readouterr().out
    assert "Rows and tokens" in told and "tiny/data_report.html" in told
    assert main([*call, "--skip-bad"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["rows_skipped"] == 3


def test_a_long_list_of_skipped_lines_is_cut_with_the_place_of_all_of_them(tiny, tmp_path):
    good = json.dumps({"content": "类型#裙", "summary": "好看"}, ensure_ascii=False)
    (tmp_path / "many.json").write_text("\n".join([good, *["no json"] * 500]), encoding="utf-8")
    config = load_config(CONFIG, [f"data.train_path={tmp_path / 'many.json'}", "data.eval_path=[]",
                                  "data.skip_bad=true", f"output_dir={tmp_path}"])
    tokens = prepare_data(config, progress=False)["train"]
    told = skip_table({"train": tokens}).text
    assert "not JSON   500  many.json:2,3,4" in told and f"..., all in {tokens.folder.name}/tokens.json" in told
    assert len(tokens.report["skipped"]) == 500
