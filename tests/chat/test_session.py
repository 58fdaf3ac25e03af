"""The conversation: what streams out, what goes into the history, what is sent to the model, with a scripted model."""

import json
import threading

import pytest
from support import TOKENIZER as TINY

from glm3kit.chat.session import ChatSession
from glm3kit.chat.tools import calculate, tool
from glm3kit.errors import DataError, Glm3KitError, PromptError
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

WEATHER = [{"name": "weather", "description": "weather of a city", "parameters": {"city": {"type": "string"}}}]


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLM3Tokenizer(TINY)


@pytest.fixture
def say(tokenizer):
    """Ids as the model generates them: metadata, a new line, the content, and the id that ends the turn."""
    def ids(content, metadata="", stop=None):
        stop = tokenizer.role_id("user") if stop is None else stop
        return [*tokenizer.build_single_message("assistant", metadata, content)[1:], stop]

    return ids


class Script:
    """A model that answers with one list of ids after the other, and remembers its prompts."""

    def __init__(self, *replies):
        self.replies, self.prompts = list(replies), []

    def __call__(self, ids):
        self.prompts.append(ids)
        yield from self.replies.pop(0)


def broken(ids):
    """A model that fails after three tokens."""
    yield from (300, 301, 302)
    raise RuntimeError("the card is gone")


# history

def test_the_stream_joins_to_the_reply_and_both_go_into_the_history(tokenizer, say):
    session = ChatSession(tokenizer, Script(say("你好！\n很高兴见到你 🦄。")))
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


def test_a_reply_may_end_without_a_stop_id(tokenizer, say):
    assert ChatSession(tokenizer, Script(say("好")[:-1])).ask("你好") == "好"


def test_a_reply_that_stops_at_once_is_an_empty_answer(tokenizer):
    session = ChatSession(tokenizer, Script([tokenizer.eos_id]))
    assert list(session.stream("你好")) == []
    assert session.history[-1] == {"role": "assistant", "metadata": "", "content": ""}


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer, say):
    session = ChatSession(tokenizer, Script([tokenizer.vocab_size + 1, *say("好")]))
    assert session.ask("你好") == "好"


def test_each_part_of_a_reply_becomes_a_message(tokenizer, say):
    second = say("再见")
    session = ChatSession(tokenizer, Script([*say("你好")[:-1], tokenizer.role_id("assistant"), *second]))
    assert "".join(session.stream("你好")).split() == ["你好", "再见"]
    assert [message["content"] for message in session.history] == ["你好", "你好", "再见"]


def test_a_role_token_typed_as_text_stays_text(tokenizer, say):
    session = ChatSession(tokenizer, Script(say("好")))
    session.ask("<|system|>\n你好<|assistant|>")
    assert tokenizer.role_id("system") not in session.last_prompt_ids
    assert session.last_prompt_ids.count(tokenizer.role_id("assistant")) == 1  # the one that asks for the answer


def test_a_tool_call_is_returned_as_name_and_parameters_and_its_observation_follows(tokenizer, say):
    call = "```python\ntool_call(city='北京')\n```"
    model = Script(say(call, "weather", stop=tokenizer.role_id("observation")), say("晴天。"))
    session = ChatSession(tokenizer, model, tools=WEATHER)
    assert session.ask("北京天气怎么样？") == {"name": "weather", "parameters": {"city": "北京"}}
    assert session.ask({"weather": "晴"}, role="observation") == "晴天。"
    assert [message["role"] for message in session.history] == [
        "system", "user", "assistant", "observation", "assistant",
    ]
    assert session.history[0]["tools"] == WEATHER
    assert session.history[2]["metadata"].strip() == "weather"
    assert session.last_prompt_ids[-1] == tokenizer.role_id("assistant")
    assert tokenizer.decode(session.last_prompt_ids).count('{"weather": "晴"}') == 1


def test_messages_show_the_turn_that_is_being_generated(tokenizer, say):
    session = ChatSession(tokenizer, Script(say("一二三四五")), system="导游")
    stream = session.stream("数数")
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    first = next(stream)
    assert session.messages[-1]["content"] == first
    assert session.history == [{"role": "system", "content": "导游"}]
    "".join(stream)
    assert session.messages == session.history
    assert session.history[-1]["content"] == "一二三四五"


def test_clear_keeps_the_system_turn_of_the_beginning_only(tokenizer, say):
    session = ChatSession(tokenizer, Script(say("好"), say("好")), system="导游")
    session.ask("你好")
    session.clear()
    assert session.history == [{"role": "system", "content": "导游"}]
    assert session.last_prompt_ids == session.last_reply_ids == []
    session.ask("你好")
    assert len(session.history) == 3


def test_the_transcript_is_the_history_as_json(tokenizer, say):
    session = ChatSession(tokenizer, Script(say("好")))
    session.ask("你好")
    assert json.loads(session.transcript()) == session.history
    assert "你好" in session.transcript()


# prompts

def test_prompts_equal_the_reference_prompts(shared):
    tokenizer = ChatGLM3Tokenizer(shared / "data/tokenizer/tokenizer.model")
    cases = json.loads((shared / "golden/text/chat_prompts.json").read_text(encoding="utf-8"))
    for case in cases:
        session = ChatSession(tokenizer, Script([tokenizer.eos_id]))
        session.history = case["history"]
        session.ask(case["query"], case["role"])
        assert session.last_prompt_ids == session.reply.prompts[0] == case["input_ids"]


def test_every_role_speaks_in_its_own_turn(tokenizer, say):
    model = Script(say("好"), say("好"), say("好"))
    session = ChatSession(tokenizer, model)
    for role in ("system", "user", "observation"):
        session.ask("你好", role)
    roles = {tokenizer.role_id(role): role for role in ("system", "user", "assistant", "observation")}
    assert [roles[id_] for id_ in model.prompts[-1] if id_ in roles] == [
        "system", "assistant", "user", "assistant", "observation", "assistant",
    ]


@pytest.mark.parametrize("role", ["assistant", "tool", ""])
def test_a_role_that_cannot_speak_is_named(tokenizer, role):
    with pytest.raises(PromptError, match=f"'{role}'.*user, system, observation"):
        ChatSession(tokenizer, broken).stream("你好", role)


# the window

def contents(session, tokenizer):
    """Which of the numbered messages of a history the last prompt holds."""
    prompt = tokenizer.decode(session.last_prompt_ids)
    return [i for i, message in enumerate(session.history) if f"<{i}>" in prompt and message]


def long_session(tokenizer, say, seq_length, reserve=0):
    """A system turn and five questions with answers, every message with its number."""
    session = ChatSession(tokenizer, Script(say("好")), system="<0>", seq_length=seq_length, reserve=reserve)
    for i in range(1, 11, 2):
        session.history.append({"role": "user", "content": f"<{i}>"})
        session.history.append({"role": "assistant", "metadata": "", "content": f"<{i + 1}>"})
    return session


def test_the_oldest_turns_leave_the_prompt_as_whole_turns_when_the_window_is_full(tokenizer, say):
    whole = long_session(tokenizer, say, None)
    whole.ask("<11>")
    needed = len(whole.last_prompt_ids)
    assert (contents(whole, tokenizer), whole.left_out) == (list(range(12)), 0)

    alone = tokenizer.build_chat_input("<11>", history=whole.history[:1])["input_ids"].size
    seen = set()
    for seq_length in range(needed, alone - 1, -1):
        session = long_session(tokenizer, say, seq_length + 5, reserve=5)
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


def test_a_prompt_that_fits_exactly_keeps_everything(tokenizer, say):
    whole = long_session(tokenizer, say, None)
    whole.ask("<11>")
    session = long_session(tokenizer, say, len(whole.last_prompt_ids) + 7, reserve=7)
    session.ask("<11>")
    assert session.last_prompt_ids == whole.last_prompt_ids


def test_an_observation_keeps_its_question_and_tool_call(tokenizer, say):
    session = long_session(tokenizer, say, None)
    session.history[10]["metadata"] = "weather"
    session.ask("<11>", "observation")
    needed = len(session.last_prompt_ids)

    session = long_session(tokenizer, say, needed // 2)
    session.history[10]["metadata"] = "weather"
    session.ask("<11>", "observation")
    assert contents(session, tokenizer)[-3:] == [9, 10, 11]

    without_its_call = tokenizer.build_chat_input("<11>", history=session.history[:1], role="observation")
    session = long_session(tokenizer, say, without_its_call["input_ids"].size)
    with pytest.raises(PromptError, match=r"\(observation\) takes .* the system turn and the tool call that"):
        session.ask("<11>", "observation")


def test_a_message_that_does_not_fit_alone_says_both_numbers_and_leaves_the_session_usable(tokenizer, say):
    session = ChatSession(tokenizer, Script(say("好")), seq_length=64)  # a quarter is kept free for the reply
    needed = tokenizer.build_chat_input("长" * 100)["input_ids"].size
    with pytest.raises(PromptError, match=rf"takes {needed} tokens .* 48 fit \(seq_length 64, 16 of it"):
        session.stream("长" * 100)
    assert session.history == []
    assert session.ask("你好") == "好"


def test_the_reserve_is_256_tokens_or_a_quarter_of_a_small_window(tokenizer):
    assert [ChatSession(tokenizer, broken, seq_length=n).reserve for n in (None, 192, 2048)] == [0, 48, 256]


def test_a_full_window_ends_the_reply(tokenizer):
    session = ChatSession(tokenizer, lambda ids: iter(int, 1), seq_length=64)  # a model that never stops
    session.ask("你好")
    assert len(session.last_prompt_ids) + len(session.last_reply_ids) == 64


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


def test_a_stop_does_not_outlive_its_reply(tokenizer, say):
    session = ChatSession(tokenizer, Script(say("一二三"), say("一二三")))
    session.ask("数数")
    session.stop()
    assert session.ask("数数") == "一二三"


def test_a_stop_right_after_the_start_counts(tokenizer, say):
    session = ChatSession(tokenizer, Script(say("一二三四五")))
    stream = session.stream("数数")
    session.stop()
    list(stream)
    assert len(session.last_reply_ids) == 1


def test_an_exception_in_the_model_leaves_no_half_turn_and_a_usable_session(tokenizer, say):
    session = ChatSession(tokenizer, broken)
    with pytest.raises(RuntimeError, match="the card is gone"):
        session.ask("你好")
    assert (session.history, session.messages, session.busy) == ([], [], False)
    session.reply = Script(say("好"))
    assert session.ask("你好") == "好"


def test_an_exception_before_the_first_token_leaves_a_usable_session(tokenizer, say):
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


def test_a_stream_that_nobody_reads_leaves_nothing(tokenizer, say):
    session = ChatSession(tokenizer, Script(say("好")))
    session.stream("你好")
    assert (session.history, session.busy) == ([], False)


def test_a_second_reply_at_the_same_time_is_refused_and_harms_nothing(tokenizer, say):
    session = ChatSession(tokenizer, Script(say("一二三")))
    stream = session.stream("数数")
    for action in (lambda: session.stream("你好"), lambda: session.ask("你好"), session.clear):
        with pytest.raises(Glm3KitError, match="still generating a reply.*stop"):
            action()
    assert "".join(stream) == "一二三"
    assert len(session.history) == 2


def test_the_speed_counts_from_the_first_token_on(tokenizer, say, monkeypatch):
    clock = iter([10.0, 10.5, 11.0, 11.5, 12.0])
    monkeypatch.setattr("glm3kit.chat.session.time.perf_counter", lambda: next(clock))
    session = ChatSession(tokenizer, Script([300, 301, 302, 303, 304]))
    assert session.tokens_per_second == 0.0
    session.ask("你好")
    assert session.tokens_per_second == 2.0  # four tokens in two seconds


# changing what was said

def talked(tokenizer, say, *replies, **options):
    """A session in which "一", "二" ... were said and answered."""
    session = ChatSession(tokenizer, Script(*map(say, replies)), **options)
    for question in "一二三四五"[: len(replies)]:
        session.ask(question)
    return session


def said(session):
    return [message["content"] for message in session.history]


def test_a_past_turn_is_said_differently_and_what_followed_is_dropped(tokenizer, say):
    session = talked(tokenizer, say, "a", "b", "c")
    session.reply = Script(say("新"))
    assert "".join(session.stream("改", at=2)) == "新"
    assert said(session) == ["一", "a", "改", "新"]
    prompt = tokenizer.build_chat_input("改", history=session.history[:2])["input_ids"][0].tolist()
    assert session.reply.prompts == [prompt], "the model sees what stands before, and no more"


def test_a_failed_change_of_a_past_turn_leaves_the_conversation_as_it_was(tokenizer, say):
    session = talked(tokenizer, say, "a", "b")
    before, session.reply = said(session), broken
    with pytest.raises(RuntimeError):
        list(session.stream("改", at=0))
    assert said(session) == before
    assert (str(session.error), session.unsent) == ("the card is gone", {"role": "user", "content": "改"})
    with pytest.raises(PromptError, match="no message 9 to go on from; the history has 4"):
        session.stream("改", at=9)


def test_regenerate_asks_the_same_again_for_another_reply(tokenizer, say):
    session = talked(tokenizer, say, "a", "b")
    prompt, session.reply = session.last_prompt_ids, Script(say("B"))
    assert session.regenerate() == "B"
    assert said(session) == ["一", "a", "二", "B"]
    assert session.last_prompt_ids == prompt


def test_undo_takes_back_question_and_answer_and_never_the_opening(tokenizer, say):
    session = talked(tokenizer, say, "a", "b", system="导游")
    assert session.undo() == {"role": "user", "content": "二"}
    assert said(session) == ["导游", "一", "a"]
    session.undo()
    with pytest.raises(Glm3KitError, match="nothing has been said"):
        session.undo()
    assert said(session) == ["导游"]


def test_an_answer_is_rewritten_and_the_conversation_goes_on_from_there(tokenizer, say):
    session = talked(tokenizer, say, "a", "b")
    session.rewrite(1, "A")
    assert said(session) == ["一", "A"]
    with pytest.raises(PromptError, match="message 0 is no answer"):
        session.rewrite(0, "x")


def test_another_system_turn_keeps_the_conversation_and_its_tools(tokenizer, say):
    session = talked(tokenizer, say, "a", system="导游", tools=WEATHER)
    session.set_system("导购")
    assert said(session) == ["导购", "一", "a"] and session.history[0]["tools"] == WEATHER
    session.clear()
    assert (said(session), session.system) == (["导购"], "导购")

    session = talked(tokenizer, say, "a")
    session.set_system("导游")
    session.set_system("")
    assert (said(session), session.system) == (["一", "a"], "")


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


def test_a_loaded_transcript_goes_on(tokenizer, say):
    session = talked(tokenizer, say, "a")
    other = ChatSession(tokenizer, Script(say("b")))
    other.load(session.transcript())
    other.ask("二")
    assert said(other) == ["一", "a", "二", "b"]
    with pytest.raises(DataError):
        other.load("[1]")
    assert said(other) == ["一", "a", "二", "b"]


def test_the_context_is_counted_whatever_happens_to_the_history(tokenizer, say):
    session = talked(tokenizer, say, "a", "b")
    assert session.context_used == len(session.last_prompt_ids) + len(session.last_reply_ids)
    session.undo()
    whole = tokenizer.build_chat_input("一")["input_ids"].size + len(say("a")) - 1
    assert session.context_used == whole + 1, "and the id that asks for the next answer"
    session.clear()
    assert session.context_used == 0


def test_every_change_is_told_until_nobody_wants_to_know(tokenizer, say):
    session, told = ChatSession(tokenizer, Script(say("一二三"), say("好"))), []
    end = session.observe(lambda: told.append(len(session.messages)))
    session.ask("数数")
    assert told[0] == 2 and told[-1] == 2 and len(told) > 3
    session.clear()
    assert told[-1] == 0
    end()
    count = len(told)
    session.ask("你好")
    assert len(told) == count


# tools

def call(name, **parameters):
    arguments = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    return {"content": f"```python\ntool_call({arguments})\n```", "metadata": name}


def tool_session(tokenizer, say, *replies, tools=(calculate,)):
    ids = [say(**reply) if isinstance(reply, dict) else say(reply) for reply in replies]
    session = ChatSession(tokenizer, Script(*ids), tools=tools)
    session.ask("多少？")
    return session


def observations(session):
    return [message["content"] for message in session.history if message["role"] == "observation"]


def test_tools_run_one_after_the_other_until_the_model_answers(tokenizer, say):
    calls = [call("calculate", expression=expression) for expression in ("2*3", "6*7")]
    session = tool_session(tokenizer, say, *calls, "42。")
    assert session.pending_call == {"name": "calculate", "parameters": {"expression": "2*3"}}
    assert session.run_tools() == "42。"
    assert observations(session) == ["6", "42"]
    assert session.pending_call is None
    assert tokenizer.decode(session.last_prompt_ids).count("42") == 1, "the model has read the result"


def test_at_most_five_calls_are_answered_in_a_row(tokenizer, say):
    session = tool_session(tokenizer, say, *[call("calculate", expression=str(i)) for i in range(9)])
    assert session.run_tools() == {"name": "calculate", "parameters": {"expression": "5"}}
    assert observations(session) == ["0", "1", "2", "3", "4"]
    session.run_tools(rounds=1)
    assert observations(session)[5:] == ["5"]


@pytest.mark.parametrize("wrong, finding", [
    (call("os.system", command="ls"), "there is no tool 'os.system'"),
    (call("calculate", code="1"), "invalid arguments"),
    (call("calculate", expression="x"), "is no arithmetic"),
    ({"content": "tool_call(expression=open('x'))", "metadata": "calculate"}, "is no literal"),
    ({"content": "[1, 2]", "metadata": "calculate"}, "neither tool_call"),
])
def test_a_wrong_call_becomes_an_observation_and_the_model_may_try_again(tokenizer, say, wrong, finding):
    session = tool_session(tokenizer, say, wrong, "对不起。")
    assert session.run_tools() == "对不起。"
    assert finding in json.loads(observations(session)[0])["error"]


def test_a_call_that_is_not_approved_stays_for_a_person_to_answer(tokenizer, say):
    session, asked = tool_session(tokenizer, say, call("calculate", expression="2*3"), "六。"), []
    session.run_tools(approve=lambda call: asked.append(call))
    assert asked == [session.pending_call] and observations(session) == []
    assert session.ask("6", role="observation") == "六。"


def test_a_tool_that_is_only_described_is_left_to_a_person(tokenizer, say):
    for tools in (WEATHER, [calculate, *WEATHER]):
        session = tool_session(tokenizer, say, call("weather", city="北京"), tools=tools)
        assert session.run_tools() == {"name": "weather", "parameters": {"city": "北京"}}
        assert observations(session) == []


def test_a_runaway_tool_costs_its_time_limit_and_the_session_goes_on(tokenizer, say):
    go = threading.Event()

    @tool
    def wait() -> None:
        """Wait."""
        go.wait(30)

    session = tool_session(tokenizer, say, call("wait"), "好。", "好。", tools=[wait])
    assert session.run_tools(timeout_s=0.1) == "好。"
    assert "no result within 0.1 s" in observations(session)[0]
    assert session.ask("再见") == "好。"
    go.set()


def test_a_stop_while_a_tool_runs_leaves_the_call_unanswered(tokenizer, say):
    entered, go = threading.Event(), threading.Event()

    @tool
    def wait() -> None:
        """Wait."""
        entered.set()
        go.wait(30)

    session = tool_session(tokenizer, say, call("wait"), "好。", tools=[wait])
    runner = threading.Thread(target=session.run_tools)
    runner.start()
    assert entered.wait(10)
    assert (session.busy, session.running_tool) == (True, "wait")
    session.stop()
    runner.join(10)
    go.set()
    assert (session.busy, session.running_tool, observations(session)) == (False, None, [])
    assert session.pending_call == {"name": "wait", "parameters": {}}


def test_two_tools_of_one_name_are_refused(tokenizer):
    with pytest.raises(PromptError, match="two tools have one name: calculate, calculate"):
        ChatSession(tokenizer, broken, tools=[calculate, calculate])


# the code interpreter

def test_code_is_offered_and_not_taken_for_a_tool(tokenizer, say):
    code = {"content": "```python\nprint(6 * 7)\n```", "metadata": "interpreter"}
    for tools in ([], [calculate]):
        session = tool_session(tokenizer, say, code, tools=tools)
        assert (session.pending_code, session.pending_call) == ("print(6 * 7)", None)
        session.run_tools()
        assert observations(session) == []


def test_without_code_or_notebook_there_is_no_cell_and_the_error_says_so(tokenizer, say):
    session = tool_session(tokenizer, say, "好。", {"content": "1", "metadata": "interpreter"}, tools=[])
    for action in (session.insert_cell, session.observe_cell):
        with pytest.raises(Glm3KitError, match="the last answer is no code"):
            action()
    session.ask("算")
    with pytest.raises(Glm3KitError, match="no notebook"):
        session.insert_cell()
    with pytest.raises(Glm3KitError, match="no cell was run"):
        session.observe_cell()
