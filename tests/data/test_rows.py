"""Rows of data files: encodings, arrays longer than a block, reasons that rows are counted by."""

import json
import random

import pytest

import glm3kit.data.rows
from glm3kit.config.groups import DataConfig
from glm3kit.data.rows import count_reasons, file_encoding, read_items, read_rows, reason_of
from glm3kit.errors import DataError

ROW = {"content": "类型#裙*风格#简约", "summary": "这条裙子很好看，简约而不简单。"}
TALK = {"conversations": [{"role": "user", "content": "甲：你好"}, {"role": "user", "content": "乙：大家好"},
                          {"role": "assistant", "content": "两位好"}]}


def lines(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("text", [lines(ROW, TALK, ROW), json.dumps([ROW, TALK, ROW], ensure_ascii=False),
                                  json.dumps([ROW, TALK, ROW], ensure_ascii=False, indent=2)])
@pytest.mark.parametrize("encoding, name", [("gbk", "gb18030"), ("gb18030", "gb18030"), ("utf-8", "utf-8"),
                                            ("utf-8-sig", "utf-8")])
def test_files_in_gbk_and_utf8_give_the_same_rows(tmp_path, text, encoding, name):
    (tmp_path / "rows.json").write_bytes(text.encode(encoding))
    assert file_encoding(tmp_path / "rows.json") == name
    assert list(read_rows([tmp_path / "rows.json"], DataConfig())) == [ROW, TALK, ROW]


def test_the_published_rows_are_recognised_in_both_encodings(shared, tmp_path):
    text = (shared / "data/adgen/dev.json").read_text(encoding="utf-8")
    (tmp_path / "gbk.json").write_bytes(text.encode("gb18030"))
    assert file_encoding(shared / "data/adgen/dev.json") == "utf-8"
    assert file_encoding(tmp_path / "gbk.json") == "gb18030"
    expected = list(read_rows([shared / "data/adgen/dev.json"], DataConfig()))
    assert list(read_rows([tmp_path / "gbk.json"], DataConfig())) == expected and len(expected) == 1070


@pytest.mark.parametrize("encoding, name", [("utf-16", "UTF-16"), ("utf-32", "UTF-32")])
def test_an_encoding_that_is_not_read_is_refused_by_its_name(tmp_path, encoding, name):
    (tmp_path / "rows.json").write_bytes(lines(ROW).encode(encoding))
    with pytest.raises(DataError, match=rf"rows\.json: the file is {name} .*save it as UTF-8"):
        list(read_rows([tmp_path / "rows.json"], DataConfig()))


@pytest.mark.parametrize("text", ['{"content": "un café crème", "summary": "à la française"}\n',
                                  '{"content": "naïve", "summary": "Müller"}\n'])
def test_western_text_is_not_taken_for_gbk(tmp_path, text):
    (tmp_path / "rows.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.json:1: not UTF-8: byte 0xE[0-9A-F], column"):
        list(read_rows([tmp_path / "rows.json"], DataConfig()))


def test_a_few_broken_lines_do_not_change_what_a_file_is(tmp_path):
    rows = [json.dumps(ROW, ensure_ascii=False).encode()] * 3
    rows[1] = rows[1].replace("风".encode(), "风".encode()[:2])  # a byte is lost
    (tmp_path / "rows.json").write_bytes(b"\n".join([*rows, json.dumps(ROW, ensure_ascii=False).encode("gbk")]))
    assert list(read_rows([tmp_path / "rows.json"], DataConfig(skip_bad=True))) == [ROW, ROW]
    with pytest.raises(DataError, match=r"rows\.json:2: not UTF-8: byte"):
        list(read_rows([tmp_path / "rows.json"], DataConfig()))
    (tmp_path / "rows.json").write_bytes(b"\n".join([rows[0], rows[2].decode().encode("gbk")]))
    with pytest.raises(DataError, match=r"rows\.json:2: not UTF-8, it looks like GBK: byte"):
        list(read_rows([tmp_path / "rows.json"], DataConfig()))


def test_a_sample_that_ends_within_a_character_is_recognised(tmp_path, monkeypatch):
    monkeypatch.setattr(glm3kit.data.rows, "_SAMPLE", 30)
    for encoding, name in (("utf-8", "utf-8"), ("gbk", "gb18030")):
        for shift in range(4):
            (tmp_path / "rows.json").write_bytes((" " * shift + lines(ROW)).encode(encoding))
            assert file_encoding(tmp_path / "rows.json") == name


# --- arrays


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 16])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_the_same_in_blocks_of_any_size(tmp_path, monkeypatch, block, indent):
    monkeypatch.setattr(glm3kit.data.rows, "_BLOCK", block)
    numbers = random.Random(0)
    rows = [{"content": "裙" * numbers.randrange(90), "n": 10 ** numbers.randrange(9), "list": [[], [1, {"a": None}]]}
            for _ in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
    items = list(read_items(tmp_path / "rows.json", "utf-8"))
    assert [item for _, _, item in items] == rows
    text = (tmp_path / "rows.json").read_text(encoding="utf-8")
    starts = [number for number, line in enumerate(text.split("\n"), 1) for _ in range(line.count('{"content"'))]
    if indent:
        starts = [number for number, line in enumerate(text.split("\n"), 1) if line == " {"]
    assert [line for line, _, _ in items] == starts


def test_an_array_longer_than_memory_would_be_is_held_a_block_at_a_time(tmp_path):
    (tmp_path / "rows.json").write_text("[" + ",\n".join([json.dumps(ROW)] * 5000) + "]")
    window = glm3kit.data.rows._Window(open(tmp_path / "rows.json", encoding="utf-8"))
    longest = max(len(window.text) for _ in glm3kit.data.rows._read_array(window, tmp_path / "rows.json"))
    assert (tmp_path / "rows.json").stat().st_size > 800_000 and longest <= 2 * glm3kit.data.rows._BLOCK + 500


@pytest.mark.parametrize("block", [1, 5, 1 << 16])
@pytest.mark.parametrize("text, finding", [
    ('[{"a": 1},\n{"b": ]', "rows.json:2: not JSON: Expecting value"),
    ('[{"a": 1}\n\n{"b": 2}]', "rows.json:3: expected ',' or ']'"),
    ('[{"a": 1}', "rows.json:1: expected ',' or ']'"),
    ('[{"a": 1},\n', "rows.json:2: not JSON"),
    ('[{"a": 1},]', "rows.json:1: not JSON"),
    ('[{"a": 1}]\n{"b": 2}', "rows.json:2: there is more"),
    ('[\n{"a": "open', "rows.json:2: not JSON: Unterminated string"),
    ("[" * 10000, "rows.json:1: not JSON"),
])
def test_an_array_with_broken_syntax_is_an_error_with_its_line(tmp_path, monkeypatch, block, text, finding):
    monkeypatch.setattr(glm3kit.data.rows, "_BLOCK", block)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=finding):
        list(read_items(tmp_path / "rows.json", "utf-8"))


def test_a_broken_character_in_an_array_is_an_error_that_names_the_encoding(tmp_path):
    (tmp_path / "rows.json").write_bytes(b'[{"content": "\xff"}]')
    with pytest.raises(DataError, match=r"rows\.json: not UTF-8: .*byte 0xFF"):
        list(read_items(tmp_path / "rows.json", "utf-8"))


# --- reasons


def test_rows_are_counted_by_the_reason_not_by_what_is_of_each_row_alone():
    reasons = ["not JSON: Expecting value, column 1 of 'a'", "turn 1 of 2: unknown role 'bot': expected a dict",
               "turn 4 of 4: unknown role 'bot': expected a dict", "column 'a' is blank; fill it",
               "not JSON: Extra data, column 3 of 'b c'", "column 'a' is blank; fill it", "not JSON: Expecting value"]
    assert [reason_of(reason) for reason in reasons[:4]] == ["not JSON", "unknown role 'bot'", "unknown role 'bot'",
                                                             "column 'a' is blank"]
    skipped = [{"file": "b.json" if line == 5 else "a.json", "line": line, "reason": reason}
               for line, reason in enumerate(reasons, 1)]
    assert count_reasons(skipped) == [
        {"reason": "not JSON", "rows": 3, "where": "a.json:1,7 b.json:5"},
        {"reason": "unknown role 'bot'", "rows": 2, "where": "a.json:2,3"},
        {"reason": "column 'a' is blank", "rows": 2, "where": "a.json:4,6"}]
