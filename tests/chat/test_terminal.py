"""The conversation in a terminal: its commands, its tools, and the whole of it through a pipe."""

import json
import os
import sys

import pytest
from support import SMALL, TINY

from glm3kit.__main__ import main
from glm3kit.chat.session import ChatSession
from glm3kit.chat.terminal import printable, talk
from glm3kit.chat.tools import calculate
from glm3kit.chat.transcript import read_transcript
from glm3kit.config.load import load_config
from glm3kit.weights.random import write_random_hub_weights

SHORT = [*SMALL, "generate.max_new_tokens=4"]


@pytest.fixture
def session(tokenizer):
    answer = tokenizer.encode("你好", add_special_tokens=False)
    return ChatSession(tokenizer, lambda ids: iter([*answer, tokenizer.eos_id]))


@pytest.fixture
def tool_session(tokenizer):
    """A model that calls a tool once, and reads its result; then the same again."""
    replies = 2 * [("calculate", "```python\ntool_call(expression='6*7')\n```"), ("", "42。")]
    return ChatSession(tokenizer, lambda ids: iter(tokenizer.build_single_message("assistant", *replies.pop(0))[1:]),
                       tools=[calculate])


def script(*lines):
    """Lines that a user types; then the end of the input, as by Ctrl-D."""
    queue = iter(lines)

    def read(prompt: str) -> str:
        line = next(queue, None)
        if line is None:
            raise EOFError
        return line

    return read


def roles(session):
    return [message["role"] for message in session.history]


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    assert printable("好\x1b[2J\x07的\u202e\n\t。") == "好[2J的\n\t。"


def test_a_conversation_in_several_roles_is_kept_and_saved(session, tmp_path, capsys):
    file = tmp_path / "talk.json"
    talk(session, script("/role system", "你是导游。", "/role user", "你\\n好！", "", f"/save {file}", "/quit"))
    history = json.loads(file.read_text(encoding="utf-8"))
    assert [(turn["role"], turn["content"]) for turn in history] == [
        ("system", "你是导游。"), ("assistant", "你好"), ("user", "你\n好！"), ("assistant", "你好")]
    assert capsys.readouterr().out.count("你好\n") == 2


def test_an_unknown_command_shows_the_commands_and_says_nothing_to_the_model(session, capsys):
    talk(session, script("/role pilot", "/fly", "/save"))
    assert capsys.readouterr().out.count("/role user|system|observation") == 4
    assert session.history == []


def test_an_error_and_ctrl_c_leave_the_conversation_going(session, tmp_path, capsys):
    def interrupted(ids):
        yield from session.tokenizer.encode("我", add_special_tokens=False)
        raise KeyboardInterrupt

    session.reply = interrupted
    talk(session, script("你好", f"/save {tmp_path}", "/open none.json", "/undo", "/clear"))
    printed = capsys.readouterr().out
    assert "[stopped]" in printed
    assert str(tmp_path) in printed and "none.json" in printed and "nothing has been said" in printed


def test_what_was_said_is_taken_back_said_again_and_opened_from_a_file(session, tmp_path, capsys):
    file = tmp_path / "talk.md"
    lines = "/system 你是导游。", "一", "二", "/again", "/undo", f"/save {file}", "/clear", f"/open {file}"
    talk(session, script(*lines))
    assert [message["content"] for message in session.history] == ["你是导游。", "一", "你好"]
    assert "[taken back: 二]" in capsys.readouterr().out
    assert read_transcript(file.read_text(encoding="utf-8")) == session.history


def test_a_tool_is_asked_for_first_and_its_arguments_are_shown(tool_session, capsys):
    talk(tool_session, script("/tools", "多少？", "y"))
    printed = capsys.readouterr().out
    assert "calculate: Calculate an arithmetic expression" in printed
    assert '[call of calculate: {"expression": "6*7"}]' in printed and printed.endswith("42。\n")
    assert roles(tool_session) == ["system", "user", "assistant", "observation", "assistant"]


@pytest.mark.parametrize("lines", [["多少？", "n"], ["多少？"]], ids=["no", "end of input"])
def test_a_tool_that_is_not_approved_does_not_run(tool_session, lines):
    talk(tool_session, script(*lines))
    assert roles(tool_session) == ["system", "user", "assistant"]


def test_an_answer_by_hand_takes_the_place_of_a_tool(tool_session, capsys):
    talk(tool_session, script("多少？", "n", "/role observation", "42"))
    assert "[call of calculate: say its result as /role observation]" in capsys.readouterr().out
    assert roles(tool_session)[-2:] == ["observation", "assistant"]


def test_tools_run_without_asking_if_told_so(tool_session):
    talk(tool_session, script("/auto", "多少？"))
    assert tool_session.history[-1]["content"] == "42。"


def test_code_is_shown_and_said_not_to_be_run(tokenizer, capsys):
    ids = tokenizer.build_single_message("assistant", "interpreter", "```python\nprint(1)\n```")[1:]
    session = ChatSession(tokenizer, lambda _: iter(ids))
    talk(session, script("算"))
    printed = capsys.readouterr().out
    assert "print(1)" in printed and "[code: it is not run" in printed


def test_the_verb_talks_through_a_pipe(tmp_path, monkeypatch, capsys):
    hub = write_random_hub_weights(load_config(TINY, SHORT).model, tmp_path / "hub")
    file = tmp_path / "talk.md"
    lines = ["/role system", "你是导购。", "/role user", "类型#裙", "/role observation", '{"price": 299}',
             f"/save {file}"]
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as pipe:
        pipe.write("\n".join(lines))
    with open(reader, encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert main(["chat", str(TINY), *SHORT, f"model.checkpoint_name_or_path={hub}", "--system", "你好"]) == 0
    history = read_transcript(file.read_text(encoding="utf-8"))
    assert [message["role"] for message in history if message["role"] != "assistant"] == [
        "system", "system", "user", "observation"]
    assert [message["content"] for message in history if message["role"] == "observation"] == ['{"price": 299}']
    assert "Traceback" not in capsys.readouterr().err
