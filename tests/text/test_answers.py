"""A model's answers: streamed text, tool calls and messages, well formed and hostile."""

import copy
import json
import random
import re
from types import MappingProxyType

import numpy as np
import pytest

from glm3kit.errors import PromptError
from glm3kit.text.answers import TextStream, code_block, parse_tool_call, process_response
from glm3kit.text.messages import conversation_messages

TOOLS = [{"role": "system", "content": "You have tools.", "tools": [{"name": "track"}]}]
USER = {"role": "user", "content": "q"}


# --- tool calls


def test_every_tool_call_that_is_trained_on_is_read_back(encoded):
    calls = 0
    for row in encoded:
        parameters = [turn["parameters"] for turn in row["record"]["conversations"] if turn["role"] == "tool"]
        written = [m.content for m in conversation_messages(row["record"]) if m.metadata]
        assert [parse_tool_call(call) for call in written] == parameters  # `from=` and nested values among them
        calls += len(written)
    assert calls > 20


@pytest.mark.parametrize("text, parameters", [
    (" ```python\ntool_call(symbol='10111')\n```", {"symbol": "10111"}),
    ("```\ntool_call(a=1, b='x')\n```", {"a": 1, "b": "x"}),
    ("```json\n{\"a\": true, \"b\": null}\n```", {"a": True, "b": None}),
    ("tool_call(a=1, b='x')", {"a": 1, "b": "x"}),
    ("tool_call()", {}),
    ("tool_call (\n  a = -1.5,\n  b = [1, {'c': None}],\n);", {"a": -1.5, "b": [1, {"c": None}]}),
    ("I look it up.\n```python\ntool_call(a=1)\n```\nDone.", {"a": 1}),
    ("```python\ntool_call(a=1)```", {"a": 1}),
    ("```python\ntool_call(a=1)", {"a": 1}),
    ("tool_call(a='x, y=(1', b=\"it's\", c='\\'')", {"a": "x, y=(1", "b": "it's", "c": "'"}),
    ("tool_call(flag=true, other=False, nothing=null)", {"flag": True, "other": False, "nothing": None}),
    ("tool_call(from='EUR', x-api-key='k', 城市='北京')", {"from": "EUR", "x-api-key": "k", "城市": "北京"}),
    ('{"city": "Beijing", "days": [1, 2]}', {"city": "Beijing", "days": [1, 2]}),
    ("{'city': 'Beijing', 'now': True}", {"city": "Beijing", "now": True}),
])
def test_tool_calls_are_read_as_literals(text, parameters):
    assert parse_tool_call(text) == parameters


@pytest.mark.parametrize("text", [
    "", "hello", "tool_call", "tool_call(", "tool_call(a=", "tool_call(a=1", "tool_call(a=1))", "tool_call(1)",
    "tool_call(a=1, a=2)", "tool_call(a=1,,b=2)", "tool_call(**{'a': 1})", "tool_call(a=b)", "tool_call(a=f'{1}')",
    "tool_call(a=__import__('os').getcwd())", "__import__('os').getcwd()", "open(file='x')", "print('x')", "[1, 2]",
    "tool_call(a=1)\ntool_call(b=2)", "tool_call(a=1) + 1", "lambda: 1", "{1: 2}", "1", '"text"', "tool_call(a={[]})",
    "tool_call(a=" + "[" * 5000 + ")", "tool_call(a=" + "-" * 90000 + "1)", "[" * 90000, '{"a":' * 20000,
    "tool_call(a=" + "9" * 5000 + ")", "tool_call(a='" + "\\'" * 40000 + ")", "tool_call(a='\0\0)",
    "tool_call(a=1, b='" + "x" * 100_000 + "')", "```python\n```", "tool_call(a=\"\ud83d)",
])
def test_what_is_no_tool_call_of_literals_is_refused(text):
    with pytest.raises(PromptError):
        parse_tool_call(text)


def test_nothing_that_a_model_writes_is_evaluated(tmp_path):
    mark = tmp_path / "mark"
    opening = f"open({str(mark)!r}, 'w')"
    for code in (opening, f"tool_call(a={opening})", f"tool_call(a=f'{{{opening}}}')", f"[{opening}]"):
        content, _ = process_response(f"track\n```python\n{code}\n```", TOOLS)
        assert set(content) == {"name", "content", "reason"}
    assert not mark.exists()


@pytest.mark.parametrize("text, code", [
    ("```python\nfor i in x:\n    print(i)\n```", "for i in x:\n    print(i)"),
    ("```\n    indented()\n\n    more()\n```\nSo it is.", "    indented()\n\n    more()"),
    ("Look:\n```python\nprint(1)\n", "print(1)"), ("print(1);", "print(1);"), ("```python\n```", ""), ("", ""),
])
def test_the_code_of_an_answer_is_what_stands_in_its_fence(text, code):
    assert code_block(text) == code


# --- answers. The expected values are what the original function gives for these texts, worked out by hand.


@pytest.fixture(scope="module")
def original(shared):
    """process_response as the document of the original has it; it evaluates, so it only ever sees our own texts."""
    document = (shared / "seed/glm3.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"^def process_response.*?^    return content, history$", document, re.DOTALL | re.MULTILINE)
    names = {"deepcopy": copy.deepcopy}
    exec(source, names)
    return names["process_response"]


def test_well_formed_answers_are_read_as_the_original_reads_them(original, encoded):
    texts = ["\n 你好\n第二行 ", "\n截至[[训练时间]]。", "\n",
             "\n 我来查询<|assistant|>track\n```python\ntool_call(symbol='1', n=[1, {'a': None}])\n```",
             "track \n```\ntool_call()\n```", "track\n```python\ntool_call(\n  a=1,\n  b='x'\n)\n```",
             "a\n```python\ntool_call(x=1)\n```<|assistant|>\n完了[[训练时间]]"]
    for row in encoded:
        texts += [f"{m.metadata}\n{m.content}" for m in conversation_messages(row["record"]) if m.role == "assistant"]
    compared = 0
    for text in texts:
        for history in (TOOLS, [USER], [{"role": "system", "content": "no tools"}, USER]):
            try:
                expected = original(text, history)
            except SyntaxError:  # `from=`, which Python does not take
                continue
            assert process_response(text, history) == expected, text
            compared += 1
    code = "interpreter\n ```python\nprint(1)\n```"  # with tools the original would run it
    assert process_response(code, [USER]) == original(code, [USER])
    assert compared > 150


def test_an_answer_is_stripped_and_added_to_the_history():
    assert process_response("\n 你好\n第二行 ", [USER]) == (
        "你好\n第二行", [USER, {"role": "assistant", "metadata": "", "content": "你好\n第二行"}])


def test_the_mark_for_the_training_date_is_replaced_in_the_content_alone():
    content, history = process_response("\n截至[[训练时间]]。", [])
    assert content == "截至2023年。"
    assert history == [{"role": "assistant", "metadata": "", "content": "截至[[训练时间]]。"}]


def test_a_tool_call_becomes_name_and_parameters():
    text = "track\n ```python\ntool_call(symbol='10111')\n```"
    content, history = process_response(text, TOOLS)
    assert content == {"name": "track", "parameters": {"symbol": "10111"}}
    assert history == [*TOOLS, {"role": "assistant", "metadata": "track",
                                "content": " ```python\ntool_call(symbol='10111')\n```"}]


def test_without_tools_a_named_part_stays_text():
    for history in ([], [USER], [{"role": "system", "content": "no tools"}]):
        content, _ = process_response("interpreter \nprint(1)", history)
        assert content == {"name": "interpreter", "content": "print(1)"}


def test_several_parts_are_all_added_and_the_last_one_is_the_content():
    content, history = process_response("\n 我来查询<|assistant|>track\n```python\ntool_call(symbol='1')\n```", TOOLS)
    assert content == {"name": "track", "parameters": {"symbol": "1"}}
    assert [(m["metadata"], m["content"]) for m in history[1:]] == [
        ("", "我来查询"), ("track", "```python\ntool_call(symbol='1')\n```")]


# --- answers on which the seed's function raises


def test_an_answer_of_one_line_is_an_answer():
    assert process_response("你好", []) == ("你好", [{"role": "assistant", "metadata": "", "content": "你好"}])
    assert process_response("", []) == ("", [{"role": "assistant", "metadata": "", "content": ""}])


def test_empty_parts_add_nothing():
    assert [m["content"] for m in process_response("<|assistant|>\n你好<|assistant|>", [])[1]] == ["你好"]


def test_a_call_that_cannot_be_read_is_returned_with_the_reason():
    content, history = process_response("track\ntool_call(symbol=the_symbol)", TOOLS)
    assert content == {"name": "track", "content": "tool_call(symbol=the_symbol)",
                       "reason": "no tool call: 'the_symbol' is no literal"}
    assert history[-1]["content"] == "tool_call(symbol=the_symbol)"


def test_the_history_passed_in_stays_as_it_was():
    history = copy.deepcopy(TOOLS)
    _, after = process_response("\nanswer", history)
    after[0]["content"] = "changed"
    assert history == TOOLS


@pytest.mark.parametrize("history", [
    None, [], (), "text", 5, {"role": "user"}, [None], ["system"], [{}], [[]], [5, TOOLS[0]], [{"role": "system"}],
    [{"role": ["system"], "tools": 1}], [{"tools": None, "role": "system"}], [MappingProxyType(TOOLS[0])],
])
def test_a_malformed_history_does_not_raise(history):
    for text in ("hello", "track\ntool_call(a=1)", "\nhello"):
        content, after = process_response(text, history)
        assert after[-1]["role"] == "assistant"
        assert isinstance(content, str | dict)


def test_no_text_makes_it_raise():
    rng = random.Random(3)
    parts = [*"()[]{}'\"\\,=:-# \t\r\n\0\u2028\ud83d🌸a1", "<|assistant|>", "<|user|>", "```", "```python\n", "name",
             "tool_call", "1e999", "None", "true", "[[训练时间]]", "eval('1')", "f'{x}'", "**", "lambda: ", "'''"]
    for _ in range(5000):
        text = "".join(rng.choices(parts, k=rng.randrange(40)))
        if rng.random() < 0.5:
            text = f"track\n```python\ntool_call({text})\n```"
        history = copy.deepcopy(TOOLS)
        content, after = process_response(text, history)
        assert history == TOOLS and after[:len(history)] == history
        assert isinstance(content, str) or set(content) in ({"name", "parameters"}, {"name", "content", "reason"})
        assert all(set(message) == {"role", "metadata", "content"} for message in after[1:])


def test_a_round_trip_of_random_parameters_gives_them_back():
    rng = np.random.default_rng(4)
    texts = ["", "it's", 'say "x"', "a,b=(c]", "\\", "行\n", "```", "<|assistant|>", "#", "tool_call(a=1)", " x "]

    def value(depth: int):
        makers = [lambda: texts[rng.integers(len(texts))], lambda: int(rng.integers(-9, 9)),
                  lambda: float(rng.normal()), lambda: [None, True, False][rng.integers(3)]]
        if depth:
            makers += [lambda: [value(depth - 1) for _ in range(rng.integers(3))],
                       lambda: {texts[i]: value(depth - 1) for i in range(rng.integers(3))}]
        return makers[rng.integers(len(makers))]()

    for _ in range(500):
        parameters = {f"key{i}": value(2) for i in range(rng.integers(4))}
        tool = {"role": "tool", "name": "f", "parameters": parameters, "observation": ""}
        call = conversation_messages({"conversations": [USER, tool]})[1]
        assert parse_tool_call(call.content) == parameters


# --- text as it comes, an id at a time


def pieces(tokenizer, text):
    stream = TextStream(tokenizer)
    return [*map(stream.push, tokenizer.encode(text, add_special_tokens=False)), stream.finish()]


def test_streamed_pieces_join_to_the_decoded_text_for_random_ids(tokenizer):
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size + 40) for _ in range(draw.randrange(40))]
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids, errors="ignore"), ids


def test_streamed_pieces_join_to_the_decoded_text_for_the_reference_rows(published_tokenizer, golden_texts):
    tokenizer = published_tokenizer
    for line in (golden_texts / "tokenizer.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(pieces(tokenizer, text)) == tokenizer.decode(ids), text


def test_a_character_of_four_byte_pieces_comes_whole(tokenizer):
    ids = tokenizer.encode("a🦄b", add_special_tokens=False)
    named = [tokenizer.piece(id_) for id_ in ids]
    assert [name for name in named if name.startswith("<0x")] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x84>"]
    told = pieces(tokenizer, "a🦄b")
    assert "".join(told) == "a🦄b"
    assert all("\ufffd" not in piece for piece in told)


def test_bytes_that_never_become_a_character_are_told_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("🦄", add_special_tokens=False)[:-1]
    assert [stream.push(id_) for id_ in ids if tokenizer.piece(id_).startswith("<0x")] == ["", "", ""]
    assert set(stream.finish()) == {"\ufffd"}


def test_spaces_between_pieces_are_kept_however_many(tokenizer):
    text = "a  b   c\n\n  d"
    assert "".join(pieces(tokenizer, text)) == text


def test_spaces_survive_a_decoder_that_strips_the_beginning_of_a_text():
    class Stripping:  # as a SentencePiece model that removes extra spaces
        def decode(self, ids, errors):
            return "".join({0: " ", 1: "a", 2: "b"}[id_] for id_ in ids).lstrip(" ")

    for ids in ([1, 0, 2], [0, 0, 1, 0, 0, 0, 2, 0, 1]):
        stream = TextStream(Stripping())
        assert "".join([*map(stream.push, ids), stream.finish()]) == Stripping().decode(ids, "ignore")
