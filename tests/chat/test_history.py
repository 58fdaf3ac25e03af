"""A conversation's history: which turns fit the window, and what is changed without the model."""

import json

import pytest

from glm3kit.chat.session import ChatSession
from glm3kit.errors import DataError, Glm3KitError, PromptError

WEATHER = [{"name": "weather", "description": "weather of a city", "parameters": {"city": {"type": "string"}}}]


def said(session):
    return [message["content"] for message in session.history]


# the window

def contents(session, tokenizer):
    """Which of the numbered messages of a history the last prompt holds."""
    prompt = tokenizer.decode(session.last_prompt_ids)
    return [i for i, message in enumerate(session.history) if f"<{i}>" in prompt and message]


def long_session(tokenizer, model, seq_length, reserve=0):
    """A system turn and five questions with answers, every message with its number."""
    session = ChatSession(tokenizer, model("好"), system="<0>", seq_length=seq_length, reserve=reserve)
    for i in range(1, 11, 2):
        session.history.append({"role": "user", "content": f"<{i}>"})
        session.history.append({"role": "assistant", "metadata": "", "content": f"<{i + 1}>"})
    return session


def test_the_oldest_turns_leave_the_prompt_as_whole_turns_when_the_window_is_full(tokenizer, model):
    whole = long_session(tokenizer, model, None)
    whole.ask("<11>")
    needed = len(whole.last_prompt_ids)
    assert (contents(whole, tokenizer), whole.left_out) == (list(range(12)), 0)

    alone = tokenizer.build_chat_input("<11>", history=whole.history[:1])["input_ids"].size
    seen = set()
    for seq_length in range(needed, alone - 1, -1):
        session = long_session(tokenizer, model, seq_length + 5, reserve=5)
        session.ask("<11>")
        kept = contents(session, tokenizer)
        assert len(session.last_prompt_ids) <= seq_length
        assert kept[0] == 0 and kept[-1] == 11, "the system turn and the newest message stay"
        assert kept[1:] == list(range(kept[1], 12)), "what is kept is the end of the conversation"
        assert session.history[kept[1]]["role"] == "user", "a prompt begins with a question"
        assert session.left_out == 12 - len(kept)
        assert [message["content"] for message in session.history[:12]] == [f"<{i}>" for i in range(12)]
        seen.add(kept[1])
    assert seen == {1, 3, 5, 7, 9, 11}, "one turn leaves after the other"


def test_a_prompt_that_fits_exactly_keeps_everything(tokenizer, model):
    whole = long_session(tokenizer, model, None)
    whole.ask("<11>")
    session = long_session(tokenizer, model, len(whole.last_prompt_ids) + 7, reserve=7)
    session.ask("<11>")
    assert session.last_prompt_ids == whole.last_prompt_ids


def test_an_observation_keeps_its_question_and_tool_call(tokenizer, model):
    session = long_session(tokenizer, model, None)
    session.history[10]["metadata"] = "weather"
    session.ask("<11>", "observation")
    needed = len(session.last_prompt_ids)

    session = long_session(tokenizer, model, needed // 2)
    session.history[10]["metadata"] = "weather"
    session.ask("<11>", "observation")
    assert contents(session, tokenizer)[-3:] == [9, 10, 11]

    without_its_call = tokenizer.build_chat_input("<11>", history=session.history[:1], role="observation")
    session = long_session(tokenizer, model, without_its_call["input_ids"].size)
    with pytest.raises(PromptError, match=r"\(observation\) takes .* the system turn and the tool call that"):
        session.ask("<11>", "observation")


def test_a_message_that_does_not_fit_alone_says_both_numbers_and_leaves_the_session_usable(tokenizer, model):
    session = ChatSession(tokenizer, model("好"), seq_length=64)  # a quarter is kept free for the reply
    needed = tokenizer.build_chat_input("长" * 100)["input_ids"].size
    with pytest.raises(PromptError, match=rf"takes {needed} tokens .* 48 fit \(seq_length 64, 16 of it"):
        session.stream("长" * 100)
    assert session.history == []
    assert session.ask("你好") == "好"


def test_the_reserve_is_256_tokens_or_a_quarter_of_a_small_window(tokenizer):
    assert [ChatSession(tokenizer, iter, seq_length=n).reserve for n in (None, 192, 2048)] == [0, 48, 256]


def test_a_full_window_ends_the_reply(tokenizer):
    session = ChatSession(tokenizer, lambda ids: iter(int, 1), seq_length=64)  # a model that never stops
    session.ask("你好")
    assert len(session.last_prompt_ids) + len(session.last_reply_ids) == 64


# changing what was said

def test_undo_takes_back_question_and_answer_and_never_the_opening(talked):
    session = talked("a", "b", system="导游")
    assert session.undo() == {"role": "user", "content": "二"}
    assert said(session) == ["导游", "一", "a"]
    session.undo()
    with pytest.raises(Glm3KitError, match="nothing has been said"):
        session.undo()
    assert said(session) == ["导游"]


def test_an_answer_is_rewritten_and_the_conversation_goes_on_from_there(talked):
    session = talked("a", "b")
    session.rewrite(1, "A")
    assert said(session) == ["一", "A"]
    with pytest.raises(PromptError, match="message 0 is no answer"):
        session.rewrite(0, "x")


def test_another_system_turn_keeps_the_conversation_and_its_tools(talked):
    session = talked("a", system="导游", tools=WEATHER)
    session.set_system("导购")
    assert said(session) == ["导购", "一", "a"] and session.history[0]["tools"] == WEATHER
    session.clear()
    assert (said(session), session.system) == (["导购"], "导购")

    session = talked("a")
    session.set_system("导游")
    session.set_system("")
    assert (said(session), session.system) == (["一", "a"], "")


def test_a_loaded_transcript_goes_on(tokenizer, model, talked):
    session = talked("a")
    other = ChatSession(tokenizer, model("b"))
    other.load(session.transcript())
    other.ask("二")
    assert said(other) == ["一", "a", "二", "b"]
    with pytest.raises(DataError):
        other.load("[1]")
    assert said(other) == ["一", "a", "二", "b"]


def test_every_change_is_told_until_nobody_wants_to_know(tokenizer, model):
    session, told = ChatSession(tokenizer, model("一二三", "好")), []
    end = session.observe(lambda: told.append(len(session.messages)))
    session.ask("数数")
    assert told[0] == 2 and told[-1] == 2 and len(told) > 3
    session.clear()
    assert told[-1] == 0
    end()
    count = len(told)
    session.ask("你好")
    assert len(told) == count


def test_clear_keeps_the_system_turn_of_the_beginning_only(tokenizer, model):
    session = ChatSession(tokenizer, model("好", "好"), system="导游")
    session.ask("你好")
    session.clear()
    assert session.history == [{"role": "system", "content": "导游"}]
    assert session.last_prompt_ids == session.last_reply_ids == []
    session.ask("你好")
    assert len(session.history) == 3


def test_the_transcript_is_the_history_as_json(tokenizer, model):
    session = ChatSession(tokenizer, model("好"))
    session.ask("你好")
    assert json.loads(session.transcript()) == session.history
    assert "你好" in session.transcript()
