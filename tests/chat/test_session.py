"""The conversation: what streams out, what goes into the history, what is sent to the model, with a scripted model."""

import json
import threading

import pytest

from glm3kit.chat.session import ChatSession
from glm3kit.errors import Glm3KitError, PromptError

WEATHER = [{"name": "weather", "description": "weather of a city", "parameters": {"city": {"type": "string"}}}]


def broken(ids):
    """A model that fails after three tokens."""
    yield from (300, 301, 302)
    raise RuntimeError("the card is gone")


def said(session):
    return [message["content"] for message in session.history]


# history

def test_the_stream_joins_to_the_reply_and_both_go_into_the_history(tokenizer, model):
    session = ChatSession(tokenizer, model("你好！\n很高兴见到你 🦄。"))
    told = list(session.stream("你好"))
    assert len(told) > 3
    assert "".join(told) == "你好！\n很高兴见到你 🦄。" == session.last_reply
    assert session.history == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "metadata": "", "content": "你好！\n很高兴见到你 🦄。"},
    ]


@pytest.mark.parametrize("stop", [0, 1, 2], ids=["eos", "user", "observation"])
def test_a_reply_ends_at_every_stop_id_and_asks_for_no_token_more(tokenizer, say, stop):
    def reply(ids):
        yield from say("好", stop=tokenizer.stop_ids[stop])
        pytest.fail("a token was asked for after the stop id")

    session = ChatSession(tokenizer, reply)
    assert session.ask("你好") == "好"
    assert tokenizer.stop_ids[stop] not in session.last_reply_ids


def test_a_reply_may_end_without_a_stop_id(tokenizer, say, model):
    assert ChatSession(tokenizer, model(say("好")[:-1])).ask("你好") == "好"


def test_a_reply_that_stops_at_once_is_an_empty_answer(tokenizer, model):
    session = ChatSession(tokenizer, model([tokenizer.eos_id]))
    assert list(session.stream("你好")) == []
    assert session.history[-1] == {"role": "assistant", "metadata": "", "content": ""}


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer, say, model):
    session = ChatSession(tokenizer, model([tokenizer.vocab_size + 1, *say("好")]))
    assert session.ask("你好") == "好"


def test_each_part_of_a_reply_becomes_a_message(tokenizer, say, model):
    session = ChatSession(tokenizer, model([*say("你好")[:-1], tokenizer.role_id("assistant"), *say("再见")]))
    assert "".join(session.stream("你好")).split() == ["你好", "再见"]
    assert [message["content"] for message in session.history] == ["你好", "你好", "再见"]


def test_a_role_token_typed_as_text_stays_text(tokenizer, model):
    session = ChatSession(tokenizer, model("好"))
    session.ask("<|system|>\n你好<|assistant|>")
    assert tokenizer.role_id("system") not in session.last_prompt_ids
    assert session.last_prompt_ids.count(tokenizer.role_id("assistant")) == 1  # the one that asks for the answer


def test_a_tool_call_is_returned_as_name_and_parameters_and_its_observation_follows(tokenizer, say, model):
    call = "```python\ntool_call(city='北京')\n```"
    replies = model(say(call, "weather", stop=tokenizer.role_id("observation")), "晴天。")
    session = ChatSession(tokenizer, replies, tools=WEATHER)
    assert session.ask("北京天气怎么样？") == {"name": "weather", "parameters": {"city": "北京"}}
    assert session.ask({"weather": "晴"}, role="observation") == "晴天。"
    roles = [message["role"] for message in session.history]
    assert roles == ["system", "user", "assistant", "observation", "assistant"]
    assert session.history[0]["tools"] == WEATHER
    assert session.history[2]["metadata"].strip() == "weather"
    assert session.last_prompt_ids[-1] == tokenizer.role_id("assistant")
    assert tokenizer.decode(session.last_prompt_ids).count('{"weather": "晴"}') == 1


def test_messages_show_the_turn_that_is_being_generated(tokenizer, model):
    session = ChatSession(tokenizer, model("一二三四五"), system="导游")
    stream = session.stream("数数")
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    first = next(stream)
    assert session.messages[-1]["content"] == first
    assert session.history == [{"role": "system", "content": "导游"}]
    "".join(stream)
    assert session.messages == session.history
    assert session.history[-1]["content"] == "一二三四五"


# prompts

def test_prompts_equal_the_reference_prompts(model, published_tokenizer, golden_texts):
    tokenizer = published_tokenizer
    cases = json.loads((golden_texts / "chat_prompts.json").read_text(encoding="utf-8"))
    for case in cases:
        session = ChatSession(tokenizer, model([tokenizer.eos_id]))
        session.history = case["history"]
        session.ask(case["query"], case["role"])
        assert session.last_prompt_ids == session.reply.prompts[0] == case["input_ids"]


def test_every_role_speaks_in_its_own_turn(tokenizer, model):
    session = ChatSession(tokenizer, model("好", "好", "好"))
    for role in ("system", "user", "observation"):
        session.ask("你好", role)
    roles = {tokenizer.role_id(role): role for role in ("system", "user", "assistant", "observation")}
    spoken = [roles[id_] for id_ in session.reply.prompts[-1] if id_ in roles]
    assert spoken == ["system", "assistant", "user", "assistant", "observation", "assistant"]


@pytest.mark.parametrize("role", ["assistant", "tool", ""])
def test_a_role_that_cannot_speak_is_named(tokenizer, role):
    with pytest.raises(PromptError, match=f"'{role}'.*user, system, observation"):
        ChatSession(tokenizer, broken).stream("你好", role)


# stop, faults, two at once

def test_stop_from_another_thread_keeps_what_was_said(tokenizer, say):
    ids, asked = say("一二三四五六七八九十"), threading.Event()
    stopped = threading.Event()

    def reply(_):
        yield from ids[:5]
        asked.set()
        assert stopped.wait(10)
        yield from ids[5:]

    session = ChatSession(tokenizer, reply)
    told = []
    reader = threading.Thread(target=lambda: told.extend(session.stream("数数")))
    reader.start()
    assert asked.wait(10)
    assert session.busy
    session.stop()
    stopped.set()
    reader.join(10)
    assert not session.busy
    assert session.last_reply_ids == ids[:6], "the token that was on its way is the last"
    assert session.history[-1]["content"] == "".join(told) == tokenizer.decode(ids[:6]).strip()


def test_a_stop_does_not_outlive_its_reply(tokenizer, model):
    session = ChatSession(tokenizer, model("一二三", "一二三"))
    session.ask("数数")
    session.stop()
    assert session.ask("数数") == "一二三"


def test_a_stop_right_after_the_start_counts(tokenizer, model):
    session = ChatSession(tokenizer, model("一二三四五"))
    stream = session.stream("数数")
    session.stop()
    list(stream)
    assert len(session.last_reply_ids) == 1


def test_an_exception_in_the_model_leaves_no_half_turn_and_a_usable_session(tokenizer, model):
    session = ChatSession(tokenizer, broken)
    with pytest.raises(RuntimeError, match="the card is gone"):
        session.ask("你好")
    assert (session.history, session.messages, session.busy) == ([], [], False)
    session.reply = model("好")
    assert session.ask("你好") == "好"


def test_an_exception_before_the_first_token_leaves_a_usable_session(tokenizer):
    def reply(ids):
        raise MemoryError("no room for the cache")

    session = ChatSession(tokenizer, reply)
    with pytest.raises(MemoryError):
        session.ask("你好")
    assert (session.history, session.busy) == ([], False)


def test_leaving_the_loop_keeps_what_was_said_and_closes_the_model(tokenizer, say):
    closed = []

    def reply():
        try:
            yield from say("一二三四五")
        finally:
            closed.append(True)

    held = reply()  # closed by the session, not because nobody refers to it any more
    session = ChatSession(tokenizer, lambda ids: held)
    for text in session.stream("数数"):
        told = text
        break
    assert session.history[-1] == {"role": "assistant", "metadata": "", "content": told}
    assert (closed, session.busy) == ([True], False)


def test_a_stream_that_nobody_reads_leaves_nothing(tokenizer, model):
    session = ChatSession(tokenizer, model("好"))
    session.stream("你好")
    assert (session.history, session.busy) == ([], False)


def test_a_second_reply_at_the_same_time_is_refused_and_harms_nothing(tokenizer, model):
    session = ChatSession(tokenizer, model("一二三"))
    stream = session.stream("数数")
    for action in (lambda: session.stream("你好"), lambda: session.ask("你好"), session.clear):
        with pytest.raises(Glm3KitError, match="still generating a reply.*stop"):
            action()
    assert "".join(stream) == "一二三"
    assert len(session.history) == 2


def test_the_speed_counts_from_the_first_token_on(tokenizer, model, monkeypatch):
    clock = iter([10.0, 10.5, 11.0, 11.5, 12.0])
    monkeypatch.setattr("glm3kit.chat.session.time.perf_counter", lambda: next(clock))
    session = ChatSession(tokenizer, model([300, 301, 302, 303, 304]))
    assert session.tokens_per_second == 0.0
    session.ask("你好")
    assert session.tokens_per_second == 2.0  # four tokens in two seconds


# saying it again, or otherwise

def test_regenerate_asks_the_same_again_for_another_reply(model, talked):
    session = talked("a", "b")
    prompt, session.reply = session.last_prompt_ids, model("B")
    assert session.regenerate() == "B"
    assert said(session) == ["一", "a", "二", "B"]
    assert session.last_prompt_ids == prompt


def test_a_past_turn_is_said_differently_and_what_followed_is_dropped(tokenizer, model, talked):
    session = talked("a", "b", "c")
    session.reply = model("新")
    assert "".join(session.stream("改", at=2)) == "新"
    assert said(session) == ["一", "a", "改", "新"]
    prompt = tokenizer.chat_ids([*session.history[:2], {"role": "user", "content": "改"}])
    assert session.reply.prompts == [prompt], "the model sees what stands before, and no more"


def test_a_failed_change_of_a_past_turn_leaves_the_conversation_as_it_was(talked):
    session = talked("a", "b")
    before, session.reply = said(session), broken
    with pytest.raises(RuntimeError):
        list(session.stream("改", at=0))
    assert said(session) == before
    assert (str(session.error), session.unsent) == ("the card is gone", {"role": "user", "content": "改"})
    with pytest.raises(PromptError, match="no message 9 to go on from; the history has 4"):
        session.stream("改", at=9)


def test_sampling_reaches_the_model_from_the_next_reply_on(tokenizer, say):
    seen = []

    def reply(ids, **options):
        seen.append(options)
        return iter(say("好"))

    session = ChatSession(tokenizer, reply, sampling={"top_k": 1, "seed": None})
    session.ask("一")
    session.set_sampling(top_k=5)
    session.ask("二")
    assert seen == [{"top_k": 1, "seed": None}, {"top_k": 5, "seed": None}]


def test_the_context_is_counted_whatever_happens_to_the_history(tokenizer, say, talked):
    session = talked("a", "b")
    assert session.context_used == len(session.last_prompt_ids) + len(session.last_reply_ids)
    session.undo()
    whole = len(tokenizer.chat_ids([{"role": "user", "content": "一"}])) + len(say("a")) - 1
    assert session.context_used == whole + 1, "and the id that asks for the next answer"
    session.clear()
    assert session.context_used == 0
