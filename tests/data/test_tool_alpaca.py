"""ToolAlpaca's records against what the official script makes of them; damaged instances and files."""

import json

import pytest

from glm3kit.__main__ import main
from glm3kit.data.tool_alpaca import format_tool_alpaca, tool_conversation
from glm3kit.errors import DataError
from glm3kit.text.messages import conversation_messages

STEP = [["getFact", '{"limit": 3}', " I need facts.\nAction: getFact\nAction Input: {}"], "200: ok"]
INSTANCE = {"input": "Tell me.", "intermediate_steps": [STEP], "Final Thought": "I know.", "output": "So it is."}


@pytest.mark.parametrize("name, records, instances, written, without", [
    ("cot-15__Mistral-7B-sim", 10, 100, 83, 0), ("cot-15__chatgpt-3.5-turbo_real", 11, 114, 85, 63)])
def test_the_lines_are_those_of_the_official_script(shared, tmp_path, name, records, instances, written, without):
    folder = shared / "data/toolalpaca"
    report = format_tool_alpaca(folder / f"{name}.json", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (folder / f"{name}.expected.jsonl").read_bytes()
    assert (report["records"], report["instances"], report["written"]) == (records, instances, written)
    assert report["without_tool_call"] == without and len(report["skipped"]) == instances - written
    for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines():
        conversation_messages(json.loads(line))  # each can be trained on


def test_an_instance_becomes_question_thought_call_and_answer():
    assert tool_conversation("docs", INSTANCE) == {"tools": ["docs"], "conversations": [
        {"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "I need facts."},
        {"role": "tool", "name": "getFact", "parameters": {"limit": 3}, "observation": "200: ok"},
        {"role": "assistant", "content": "I know.\nSo it is."}]}


def test_a_step_without_a_thought_is_a_call_alone():
    step = [["getFact", "{}", "Action: getFact"], "ok"]
    turns = tool_conversation("docs", INSTANCE | {"intermediate_steps": [step]})["conversations"]
    assert [turn["role"] for turn in turns] == ["user", "tool", "assistant"]


@pytest.mark.parametrize("instance, reason", [
    ("This instance is not used.", "not an object: 'This instance"),
    (None, "not an object"),
    ({"error": "Could not parse"}, "its generation failed: 'Could not parse'"),
    (INSTANCE | {"output": None}, "'output' is not a text: got 'None'"),
    (INSTANCE | {"intermediate_steps": "none"}, "'intermediate_steps' is not a list"),
    (INSTANCE | {"intermediate_steps": [["a"]]}, "a step is not"),
    (INSTANCE | {"intermediate_steps": [[["a", "{}", 5], "b"]]}, "a step's tool and thought"),
    (INSTANCE | {"intermediate_steps": [[["a", "{1}", "t"], "b"]]}, "a tool's input is no JSON: got '{1}'"),
    (INSTANCE | {"intermediate_steps": [[["a", "[1]", "t"], "b"]]}, "a tool's input is no JSON object"),
    (INSTANCE | {"intermediate_steps": [[["a", {}, "t"], "b"]]}, "a tool's input is no JSON"),
])
def test_an_instance_without_a_conversation_is_skipped_with_its_reason(tmp_path, instance, reason):
    record = {"Name": "Facts", "NLDocumentation": "docs", "Instances": [INSTANCE, instance, INSTANCE]}
    (tmp_path / "in.json").write_text(json.dumps([record], indent=1))
    report = format_tool_alpaca(tmp_path / "in.json", tmp_path / "out.jsonl")
    (skipped,) = report["skipped"]
    assert report["written"] == 2 and skipped["reason"].startswith(reason)
    assert (skipped["line"], skipped["where"]) == (2, "Facts, instance 2 of 3")


@pytest.mark.parametrize("text, finding", [
    ('[{"Name": "a"}]', "in.json:1: no record of ToolAlpaca: 'NLDocumentation' is not a text"),
    ("[5]", "in.json:1: no record of ToolAlpaca"),
    ("{", "in.json:1: no record of ToolAlpaca: not JSON"),
    ('[{"Name": "a", "NLDocumentation": "b", "Instances": ["x"]}]', "none of 1 instances can be used"),
    ("", "none of 0 instances can be used"),
])
def test_a_file_that_is_not_toolalpacas_is_a_clear_error_and_leaves_nothing(tmp_path, text, finding):
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(DataError, match=finding):
        format_tool_alpaca(tmp_path / "in.json", tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


def test_the_command_says_what_was_written_and_what_was_skipped_and_why(tmp_path, capsys):
    record = {"Name": "Facts", "NLDocumentation": "docs", "Instances": [INSTANCE, {"error": "a"}, {"error": "b"}]}
    (tmp_path / "in.json").write_text(json.dumps([record]))
    assert main(["data", "tool-alpaca", str(tmp_path / "in.json"), str(tmp_path / "out.jsonl")]) == 0
    told = capsys.readouterr().out
    assert "1 conversations from 3 instances in 1 records; 0 call no tool" in told
    assert "in.json:1: Facts, instance 3 of 3: its generation failed: 'b'" in told
    assert "2 skipped: its generation failed" in told
