"""Rows against the values of the original's data sets; whole files; bad rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from glm3kit.config.groups import DataConfig, ModelConfig, RunConfig
from glm3kit.data.encode import encode_adgen, encode_conversation, encode_files, prepare_data
from glm3kit.data.rows import read_rows
from glm3kit.data.token_file import TokenFile
from glm3kit.errors import ConfigError, DataError, PromptError
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

ROW = {"content": "类型#裙", "summary": "好看的裙子"}
TALK = {"conversations": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好看"}]}


@pytest.fixture
def tokenizer(published_tokenizer) -> ChatGLM3Tokenizer:
    return published_tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ChatGLM3Tokenizer:
    """A tokenizer that encodes a text to "▁" and one id for each of its characters."""
    folder = tmp_path_factory.mktemp("small")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["类型裙好看的子你问答abcdefghij#0123456789"]), model_prefix=str(folder / "tokenizer"),
        model_type="char", vocab_size=100, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    return ChatGLM3Tokenizer(folder)


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count: int) -> list[dict]:
    return [{"content": "裙", "summary": f"{i}"} for i in range(count)]


def encode(path: Path, tokenizer: ChatGLM3Tokenizer, destination: Path, seq_length: int = 32, **settings) -> TokenFile:
    settings = {"max_source_length": 8, "max_target_length": 8} | settings
    return encode_files([path], tokenizer, DataConfig(**settings), seq_length, destination, progress=False)


# --- one row


def test_every_reference_adgen_row_is_the_same(tokenizer, golden_texts):
    rows = json.loads((golden_texts / "adgen_encoded.json").read_text(encoding="utf-8"))
    assert len(rows) == 75
    for row in rows:
        ids, labels = encode_adgen(row, tokenizer, row["max_source_length"], row["max_target_length"])
        assert ids.tolist() == row["input_ids"] and labels.tolist() == row["labels"]
        assert ids.dtype == labels.dtype == np.int32


def test_every_reference_conversation_is_the_same(tokenizer, golden_texts):
    rows = json.loads((golden_texts / "multiturn_encoded.json").read_text(encoding="utf-8"))
    assert len(rows) == 23
    for row in rows:
        ids, labels = encode_conversation(row["record"], tokenizer, row["max_seq_length"], tools_indent=None)
        assert ids.tolist() == row["input_ids"] and labels.tolist() == row["labels"]
        assert ids.dtype == labels.dtype == np.int32


def test_an_adgen_row_is_source_target_eos_with_shifted_labels(small):
    ids, labels = encode_adgen({"content": "裙", "summary": "ab"}, small, 6, 5)
    space, skirt = small.encode("裙", False)
    _, a, b = small.encode("ab", False)
    gmask, sop = small.prefix_ids
    assert ids.tolist() == [gmask, sop, space, skirt, space, a, b, 2, 0, 0, 0, 0]
    assert labels.tolist() == [-100, -100, -100, space, a, b, 2, -100, -100, -100, -100, -100]


def test_columns_may_have_other_names(small):
    ids, _ = encode_adgen({"q": "裙", "a": "ab"}, small, 6, 5, origin_columns=("q", "a"))
    assert np.array_equal(ids, encode_adgen({"content": "裙", "summary": "ab"}, small, 6, 5)[0])


# --- whole files


def test_a_token_file_holds_the_rows_that_are_encoded_one_by_one(tokenizer, golden_texts, tmp_path):
    adgen = json.loads((golden_texts / "adgen_encoded.json").read_text(encoding="utf-8"))
    talks = json.loads((golden_texts / "multiturn_encoded.json").read_text(encoding="utf-8"))
    rows = [{"content": row["content"], "summary": row["summary"]} for row in adgen if row["max_target_length"] > 100]
    talks = [row["record"] for row in talks if row["max_seq_length"] == 512 and set(row["labels"]) != {-100}]
    mixed = [row for pair in zip(rows, talks, strict=False) for row in pair] + rows[len(talks):]
    path = write_lines(tmp_path / "mixed.jsonl", mixed)
    tokens = encode_files([path], tokenizer, DataConfig(tools_indent=None), 512, tmp_path / "tokens", progress=False)
    assert len(tokens) == len(mixed) > 40
    for row, (ids, labels) in zip(mixed, tokens, strict=True):
        if "content" in row:
            expected = encode_adgen(row, tokenizer, 64, 127)
        else:
            expected = encode_conversation(row, tokenizer, 512, tools_indent=None)
        assert ids.dtype == labels.dtype == np.int32
        for part, whole, padding in zip((ids, labels), expected, (0, -100), strict=True):
            assert np.array_equal(part, whole[:len(part)]) and np.all(whole[len(part):] == padding)


def test_the_published_dev_file_is_cut_where_it_is_known_to_be_long(tokenizer, shared, tmp_path):
    path = shared / "data/adgen/dev.json"
    tokens = encode_files([path], tokenizer, DataConfig(), 192, tmp_path / "tokens", progress=False)
    report, lengths = tokens.report, tokens.report["lengths"]
    assert (report["rows_read"], report["rows_kept"], report["adgen_rows"]) == (1070, 1070, 1070)
    # Counted with the official tokenizer when the file was taken over, `[gMASK] sop` included.
    assert (lengths["source"]["max"], report["cut_sources"]) == (104, 42)
    assert (lengths["target"]["max"], report["cut_answers"]) == (175, 6)
    assert tokens.longest <= 192


def test_more_rows_than_are_encoded_at_once_keep_their_order(small, tmp_path):
    tokens = encode(write_lines(tmp_path / "rows.json", numbered(1500)), small, tmp_path / "tokens")
    assert [small.decode(ids).strip() for ids, _ in tokens] == [f"裙 {i}" for i in range(1500)]
    assert tokens[-1][0].tolist() == tokens[1499][0].tolist()
    with pytest.raises(IndexError):
        tokens[1500]


def test_json_lines_and_a_json_array_give_the_same_rows(small, tmp_path):
    rows = [ROW, TALK, *numbered(3)]
    lines = encode(write_lines(tmp_path / "lines.json", rows), small, tmp_path / "a")
    for i, text in enumerate([json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False),
                              "\ufeff\n [" + ",\n".join(map(json.dumps, rows)) + "]\n"]):
        (tmp_path / "array.json").write_text(text, encoding="utf-8")
        array = encode(tmp_path / "array.json", small, tmp_path / f"array{i}")
        assert [ids.tolist() for ids, _ in array] == [ids.tolist() for ids, _ in lines]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_rows(small, tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(ROW).encode() + b"\r\n \r\n" + json.dumps(TALK).encode())
    assert encode(path, small, tmp_path / "tokens").report["rows_read"] == 2


def test_a_chat_of_several_users_without_tools_is_a_row_whose_answers_carry_loss(small, tmp_path):
    users = [{"role": "user", "content": "问"}, {"role": "user", "content": "答"}]
    talk = {"conversations": [*users, {"role": "assistant", "content": "好"}]}
    tokens = encode(write_lines(tmp_path / "rows.json", [talk]), small, tmp_path / "tokens")
    ids, labels = tokens[0]
    asked = small.build_chat_input("答", [users[0]])["input_ids"][0]
    assert ids[:len(asked)].tolist() == asked.tolist()
    answer = small.build_single_message("assistant", "", "好")
    assert labels[labels != -100].tolist() == [*answer[1:], small.eos_id]


def test_a_gbk_file_gives_the_same_rows_and_the_report_names_its_encoding(small, tmp_path):
    text = write_lines(tmp_path / "utf.json", [ROW, TALK]).read_text(encoding="utf-8")
    (tmp_path / "gbk.json").write_bytes(text.encode("gbk"))
    first, second = (encode(tmp_path / name, small, tmp_path / "t") for name in ("utf.json", "gbk.json"))
    assert [ids.tolist() for ids, _ in first] == [ids.tolist() for ids, _ in second]
    assert second.report["files"] == [{"file": "gbk.json", "encoding": "GBK", "rows": 2}]


def test_every_row_knows_its_line_and_its_length_before_cutting(small, tmp_path):
    long = {"content": "裙" * 9, "summary": "b" * 30}
    (tmp_path / "rows.json").write_text(f"{json.dumps(long)}\n\n{json.dumps(TALK)}\n", encoding="utf-8")
    origins = encode(tmp_path / "rows.json", small, tmp_path / "tokens").origins
    assert origins.line.tolist() == [1, 3] and origins.kind.tolist() == [0, 1]
    # gMASK sop ▁ and 9; ▁ and 30. The answer is mark ▁ new line and ▁好看: 6; 2 + 6 ids stand before it.
    assert origins.source.tolist() == [12, 8] and origins.target.tolist() == [31, 6]


def test_several_files_follow_each_other(small, tmp_path):
    first, second = write_lines(tmp_path / "1.json", numbered(2)), write_lines(tmp_path / "2.json", [ROW])
    data = DataConfig(max_source_length=8, max_target_length=8)
    tokens = encode_files([first, second], small, data, 32, tmp_path / "tokens", progress=False)
    assert small.decode(tokens[2][0]) == "类型#裙 好看的裙子"
    assert tokens.report["files"] == [{"file": "1.json", "encoding": "UTF-8", "rows": 2},
                                      {"file": "2.json", "encoding": "UTF-8", "rows": 1}]
    assert tokens.origins.file.tolist() == [0, 0, 1] and tokens.origins.line.tolist() == [1, 2, 1]


def test_the_report_counts_cuts_and_lengths(small, tmp_path):
    rows = [{"content": "裙" * 9, "summary": "a"}, {"content": "裙", "summary": "b" * 30}, TALK,
            {"conversations": [*TALK["conversations"], {"role": "user", "content": "问" * 40},
                               {"role": "assistant", "content": "答"}]}]
    report = encode(write_lines(tmp_path / "rows.json", rows), small, tmp_path / "tokens").report
    assert (report["cut_sources"], report["cut_answers"], report["cut_conversations"]) == (1, 2, 1)
    assert (report["adgen_rows"], report["conversations"], report["rows_kept"]) == (2, 2, 4)
    # gMASK sop ▁ and the characters; ▁ and the characters
    assert report["lengths"]["source"]["max"] == 3 + 9 and report["lengths"]["target"]["max"] == 1 + 30
    # A turn is mark, ▁, new line and ▁好看 (3): 6. Two such turns and gMASK, sop, eos are 15 ids; the other is cut.
    assert report["tokens"] == (8 + 2 + 1) + (4 + 8 + 1) + 15 + 32
    assert report["answer_tokens"] == (2 + 1) + (8 + 1) + 6 + 6


def test_a_bar_shows_the_progress(small, tmp_path, capsys):
    path = write_lines(tmp_path / "rows.json", numbered(3))
    encode_files([path], small, DataConfig(), 192, tmp_path / "tokens", progress=True)
    assert "encode rows.json: 100%" in capsys.readouterr().err


def test_rows_can_be_read_back_as_they_stand(tmp_path):
    path = write_lines(tmp_path / "rows.json", [ROW | {"id": 1}, TALK, {"content": "x"}])
    assert list(read_rows([path], DataConfig(skip_bad=True))) == [ROW | {"id": 1}, TALK]
    with pytest.raises(DataError, match=r"rows\.json:3: column 'summary' is missing"):
        list(read_rows([path], DataConfig()))


# --- bad rows


BAD = [
    ('{"content": "a", "summary": ', "not JSON"),
    ("hello", "not JSON"),
    ('{"content": "a", "summary": "b"} {"content": "a"}', "not JSON"),
    ("5", "not an object: got int"),
    ('"text"', "not an object: got str"),
    ("{}", "neither kind of row: it has no columns"),
    ('{"prompt": "a", "answer": "b"}', "neither kind of row: it has 'prompt', 'answer', expected"),
    ('{"content": "a"}', "column 'summary' is missing: the row has 'content'"),
    ('{"summary": "a"}', "column 'content' is missing"),
    ('{"content": "a", "summary": " "}', "column 'summary' is blank"),
    ('{"content": "", "summary": "b"}', "column 'content' is blank"),
    ('{"content": "a", "summary": null}', "column 'summary' is no text: got NoneType"),
    ('{"content": 5, "summary": "b"}', "column 'content' is no text: got int '5'"),
    ('{"content": "a", "summary": "\\ud83d"}', r"U\+D83D, half of a surrogate pair"),
    ('{"conversations": []}', "'conversations' is not a list of turns"),
    ('{"conversations": [{"role": "user", "content": "a"}]}', "ends with a user turn"),
    ('{"conversations": [{"role": "user", "content": "a"}, {"role": "tool", "name": "f", "parameters": [1], '
     '"observation": ""}]}', "the tool turn's 'parameters' is not a dict: got"),
    ('{"conversations": [{"role": "assistant", "content": "a", "loss": false}]}', "no answer to learn: each has"),
    ('{"conversations": [{"role": "bot", "content": "a"}]}', "turn 1 of 1: unknown role 'bot'"),
    ('{"conversations": [{"role": "user", "content": "\\udc00"}, {"role": "assistant", "content": "b"}]}', "surrogate"),
    (json.dumps({"conversations": [{"role": "user", "content": "问" * 40}, {"role": "assistant", "content": "a"}]}),
     "no answer begins within the window: it has 32 tokens, the row 52"),
    ("[" * 10000, "not JSON"),
]


@pytest.mark.parametrize("line, finding", BAD)
def test_a_bad_row_is_an_error_with_file_and_line(small, tmp_path, line, finding):
    path = tmp_path / "rows.json"
    path.write_text(f"{json.dumps(ROW)}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"rows\.json:3: .*{finding}") as caught:
        encode(path, small, tmp_path / "tokens")
    assert "skip_bad" in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.json"]  # nothing half-made is left behind


def test_bad_rows_are_skipped_and_counted_on_request(small, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(f"{line}\n{json.dumps(ROW)}\n" for line, _ in BAD), encoding="utf-8")
    tokens = encode(path, small, tmp_path / "tokens", skip_bad=True)
    report = tokens.report
    assert len(tokens) == len(BAD)
    assert (report["rows_read"], report["rows_kept"], report["rows_skipped"]) == (2 * len(BAD), len(BAD), len(BAD))
    assert [entry["line"] for entry in report["skipped"]] == list(range(1, 2 * len(BAD), 2))
    assert {entry["file"] for entry in report["skipped"]} == {"rows.json"}
    assert report["skipped"][7]["reason"].startswith("column 'summary' is missing")


def test_a_line_that_is_no_utf8_is_an_error_with_file_and_line(small, tmp_path):
    (tmp_path / "rows.json").write_bytes(json.dumps(ROW).encode() + b'\n{"content": "\xff", "summary": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.json:2: not UTF-8: byte 0xFF, column 14"):
        encode(tmp_path / "rows.json", small, tmp_path / "tokens")


@pytest.mark.parametrize("text, finding", [
    ('[{"content": "a", "summary": "b"},\n{"content": ]', "rows.json:2: not JSON"),
    ('[{"content": "a", "summary": "b"}\n\n{"content": "a", "summary": "b"}]', "rows.json:3: expected ',' or ']'"),
    ('[{"content": "a", "summary": "b"}', "rows.json:1: expected ',' or ']'"),
    ('[{"content": "a", "summary": "b"}]\n{"content": "a", "summary": "b"}', "more after the end"),
    ('[{"content": "a", "summary": "b"},\n {"content": "a", "summary": 5}]', "rows.json:2: column 'summary' is no"),
    ("[]", "no row to encode"),
    ("", "no row to encode"),
    ("\n\n", "no row to encode"),
])
def test_a_damaged_or_empty_file_is_a_clear_error(small, tmp_path, text, finding):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=finding):
        encode(tmp_path / "rows.json", small, tmp_path / "tokens")


def test_a_file_of_bad_rows_alone_is_an_error_even_if_they_are_skipped(small, tmp_path):
    (tmp_path / "rows.json").write_text("a\nb\n")
    with pytest.raises(DataError, match="2 rows were read, none of them usable"):
        encode(tmp_path / "rows.json", small, tmp_path / "tokens", skip_bad=True)


def test_a_missing_data_file_is_named(small, tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match="the data file cannot be read"):
            encode(path, small, tmp_path / "tokens")


def test_lengths_that_do_not_fit_the_window_are_an_error_however_bad_rows_are_treated(small, tmp_path):
    path = write_lines(tmp_path / "rows.json", [ROW])
    with pytest.raises(ConfigError, match="max_source_length 20 .* = 41 tokens, more than seq_length 40"):
        encode(path, small, tmp_path / "t", 40, max_source_length=20, max_target_length=20, skip_bad=True)


def test_a_malformed_conversation_is_a_prompt_error(small):
    with pytest.raises(PromptError, match="ends with a user turn"):
        encode_conversation({"conversations": TALK["conversations"][:1]}, small, 32)


# --- encoding once


def test_nothing_is_encoded_twice_until_something_changes(small, tmp_path):
    path = write_lines(tmp_path / "rows.json", numbered(5))
    first = encode(path, small, tmp_path / "tokens")
    written = (tmp_path / "tokens/ids.bin").stat().st_mtime_ns
    again = encode(path, small, tmp_path / "tokens")
    assert again.digest == first.digest and again.report == first.report
    assert (tmp_path / "tokens/ids.bin").stat().st_mtime_ns == written

    digests = {first.digest}
    shutil.copy(path, tmp_path / "moved.json")  # the same rows elsewhere are the same
    assert encode(tmp_path / "moved.json", small, tmp_path / "tokens").digest == first.digest
    assert encode(path, small, tmp_path / "tokens", packing=True, bucket_lengths=(16,)).digest == first.digest  # drawn
    digests.add(encode(path, small, tmp_path / "tokens", 33).digest)
    digests.add(encode(path, small, tmp_path / "tokens", max_target_length=7).digest)
    digests.add(encode(path, small, tmp_path / "tokens", tools_indent=None).digest)
    digests.add(encode(path, small, tmp_path / "tokens", skip_bad=True).digest)
    write_lines(path, numbered(6))
    changed = encode(path, small, tmp_path / "tokens")
    digests.add(changed.digest)
    assert len(digests) == 6 and len(changed) == 6
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["moved.json", "rows.json", "tokens"]


def test_a_damaged_token_file_is_encoded_again(small, tmp_path):
    path = write_lines(tmp_path / "rows.json", numbered(5))
    encode(path, small, tmp_path / "tokens")
    (tmp_path / "tokens/ids.bin").write_bytes(b"\0" * 8)
    assert len(encode(path, small, tmp_path / "tokens")) == 5


def test_another_tokenizer_makes_another_token_file(small, tokenizer, tmp_path):
    path = write_lines(tmp_path / "rows.json", numbered(2))
    assert encode(path, small, tmp_path / "tokens").digest != encode(path, tokenizer, tmp_path / "tokens").digest


# --- the data of a run


def run_config(small: ChatGLM3Tokenizer, folder: Path, **data) -> RunConfig:
    return RunConfig(output_dir=str(folder / "output"), model=ModelConfig(tokenizer_path=str(small.path)),
                     data=DataConfig(max_source_length=8, max_target_length=8, **data))


def test_a_run_gets_its_train_and_eval_files(small, tmp_path):
    train, held_out = write_lines(tmp_path / "train.json", numbered(6)), write_lines(tmp_path / "dev.json", [ROW])
    files = prepare_data(run_config(small, tmp_path, train_path=str(train), eval_path=str(held_out)), progress=False)
    assert {name: len(tokens) for name, tokens in files.items()} == {"train": 6, "eval": 1}
    assert {tokens.folder.parent for tokens in files.values()} == {tmp_path / "output/tokens"}
    only = prepare_data(run_config(small, tmp_path, train_path=[str(train), str(held_out)]), progress=False)
    assert {name: len(tokens) for name, tokens in only.items()} == {"train": 7}
    assert only["train"].folder != files["train"].folder  # runs with other settings do not disturb each other


def test_a_run_without_data_or_tokenizer_is_a_clear_error(small, tmp_path):
    with pytest.raises(DataError, match="name no files"):
        prepare_data(run_config(small, tmp_path))
    with pytest.raises(DataError, match="model.tokenizer_path is not set"):
        prepare_data(RunConfig(data=DataConfig(train_path="train.json")))
    with pytest.raises(DataError, match=r"no\.model: there is no tokenizer file"):
        prepare_data(RunConfig(model=ModelConfig(tokenizer_path="no.model"), data=DataConfig(train_path="train.json")))
