"""Transcripts: what is written is read back, whatever was said; what is no transcript is refused with its place."""

import json
import random

import pytest

from glm3kit.chat.transcript import read_transcript, to_json, to_markdown
from glm3kit.errors import DataError

HISTORY = [
    {"role": "system", "content": "你是导游。", "tools": [{"name": "weather", "description": "天气 ```"}]},
    {"role": "user", "content": "海南？\n\n## user\n<|user|> # a"},
    {"role": "assistant", "metadata": "weather", "content": " ```python\ntool_call(city='海南')\n```"},
    {"role": "observation", "content": '{"weather": "晴"}'},
    {"role": "assistant", "metadata": "", "content": "晴天。\n"},
]


@pytest.mark.parametrize("write", [to_json, to_markdown])
def test_what_is_written_is_read_back(write):
    assert read_transcript(write(HISTORY)) == HISTORY


def test_markdown_reads_as_a_document():
    assert to_markdown(HISTORY[3:]) == '## observation\n\n{"weather": "晴"}\n\n## assistant\n\n晴天。\n\n'
    assert to_markdown(HISTORY[2:3]).startswith("## assistant · weather\n\n ```python\n")


def test_whatever_is_said_survives_both_forms():
    draw = random.Random(0)
    parts = ["\n", "\n", "## ", "user", "assistant", " · ", "\\", "```json tools", "```", " ", "你好", "<|user|>", "["]
    for _ in range(3000):
        def text():
            return "".join(draw.choices(parts, k=draw.randrange(9)))

        history = [{"role": "system", "content": text()} | ({"tools": [text()]} if draw.random() < 0.5 else {}),
                   {"role": "user", "content": text()}, {"role": "assistant", "metadata": "", "content": text()}]
        assert read_transcript(to_markdown(history)) == history
        assert read_transcript(to_json(history)) == history


def test_a_result_that_is_no_text_becomes_what_the_model_reads():
    result = [{"role": "observation", "content": {"price": 299}}]
    assert read_transcript(to_json(result)) == result
    assert read_transcript(to_markdown(result)) == [{"role": "observation", "content": '{"price": 299}'}]


def test_a_file_of_another_system_is_read():
    text = "\ufeff" + to_markdown(HISTORY[3:]).replace("\n", "\r\n")
    assert read_transcript(text) == HISTORY[3:]


@pytest.mark.parametrize("text, finding", [
    ("", "no conversation"), ("[]", "no conversation"), ("{}", "no conversation"), ("[1]", "message 1: '1'"),
    ("hello", "line 1: 'hello', expected JSON or Markdown"), ("[", "the file: no JSON"), ("[" * 99999, "no JSON"),
    ('[{"role": "user", "content": "a"}, {"role": "pilot", "content": "a"}]', "message 2: .*a role of system, user"),
    ('[{"role": "user", "content": 5}]', r"message 1 \(user\): 'content' is '5'"),
    ('[{"role": "observation"}]', r"message 1 \(observation\): 'content' is 'None'"),
    ('[{"role": "assistant", "content": "a", "metadata": [1]}]', "'metadata' is"),
    ('[{"role": "user", "content": "\\ud83d"}]', "half of a surrogate pair"),
    ("## system\n\n```json tools\n[\n```\n", "its tools: no JSON"),
])
def test_what_is_no_transcript_is_refused_with_its_place(text, finding):
    with pytest.raises(DataError, match=finding):
        read_transcript(text)


def test_unknown_fields_do_not_enter_the_history():
    text = json.dumps([{"role": "user", "content": "a", "metadata": "x", "tools": [1], "extra": 1}])
    assert read_transcript(text) == [{"role": "user", "content": "a"}]
