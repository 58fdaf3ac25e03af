"""The report of the data as a page: what is told of rows, windows and lengths."""

import json

import numpy as np
import pytest
from support import TINY

from glm3kit.__main__ import main
from glm3kit.config.load import load_config
from glm3kit.data.encode import prepare_data
from glm3kit.notebook.data_report import choice_table, data_report, report_text, samples, skip_table, write_report
from glm3kit.notebook.figures import length_figure


def test_every_row_is_in_a_bar_of_its_histogram_with_its_limit():
    figure = length_figure({"source": (np.array([30]), 64), "target": (np.array([60]), 127),
                            "source + target + 1": (np.array([91, 501]), 192)})
    heights = [[patch.get_height() for patch in axes.patches] for axes in figure.axes]
    assert [sum(height) for height in heights] == [1, 1, 2]
    assert [axes.get_title(loc="right") for axes in figure.axes] == [
        "limit 64: 0.0% longer", "limit 127: 0.0% longer", "limit 192: 50.0% longer"]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_one_window_is_marked_as_recommended_and_one_as_configured():
    choices = [{"seq_length": length, "max_source_length": None, "max_target_length": None, "rows_cut": cut,
                "padding": 0.25, "padding_packed": 0.125, "configured": length == 64}
               for length, cut in ((64, 0.5), (96, 0.005), (128, 0.0))]
    told = choice_table(choices).text
    assert [line.split()[-1] for line in told.splitlines()[3:]] == ["configured", "recommended", "12%"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = [{"content": f"类型#裙*n#{i}", "summary": "<b>好看</b>"} for i in range(30)]
    bad = ["not json", '{"content": "a", "summary": " "}', '{"content": "b", "summary": ""}']
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "train.json").write_text("\n".join([*lines[:5], *bad, *lines[5:]]), encoding="utf-8")
    return load_config(TINY, [
        f"data.train_path={folder / 'train.json'}", "data.eval_path=[]", "data.skip_bad=true", f"output_dir={folder}"])


def test_skipped_rows_are_told_by_reason_with_their_lines(tiny):
    told = skip_table(prepare_data(tiny, progress=False)).text
    assert "column 'summary' is blank     2  train.json:7,8" in told and "not JSON                      1" in told


def test_samples_are_drawn_by_the_seed_and_marked_by_loss(tiny, tokenizer):
    tokens = prepare_data(tiny, progress=False)["train"]
    drawn = samples(tokens, tokenizer)
    assert drawn.text == samples(tokens, tokenizer).text != samples(tokens, tokenizer, seed=1).text
    assert drawn.html.count('<div class="glm3kit-tokens">') == 10 and "*</s>*" in drawn.text
    assert "<b>好" not in drawn.html and len(samples(tokens, tokenizer, count=99).text.split("\n\n")) == 30


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
    call = ["data", str(TINY), f"data.train_path={path}", "data.eval_path=[]", f"output_dir={folder}"]
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
    config = load_config(TINY, [f"data.train_path={tmp_path / 'many.json'}", "data.eval_path=[]",
                                  "data.skip_bad=true", f"output_dir={tmp_path}"])
    tokens = prepare_data(config, progress=False)["train"]
    told = skip_table({"train": tokens}).text
    assert "not JSON   500  many.json:2,3,4" in told and f"..., all in {tokens.folder.name}/tokens.json" in told
    assert len(tokens.report["skipped"]) == 500
