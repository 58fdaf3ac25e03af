"""The chat cell without a browser: what the page asks for, and what it is given to show; the model is scripted."""

import json
import re
import threading
import time

import pytest
import traitlets
from support import until

from glm3kit.chat.session import ChatSession
from glm3kit.chat.tools import calculate
from glm3kit.chat.transcript import read_transcript
from glm3kit.config.groups import GenerateConfig
from glm3kit.notebook import chat_widget as widgets
from glm3kit.notebook.chat_widget import REFRESH_S, chat_widget, shown_state
from glm3kit.text.tokenizer import as_text


@pytest.fixture
def say(tokenizer):
    """Ids as the model generates them: metadata, a new line, the content, and the id that ends the turn."""
    return lambda content, metadata="": [*tokenizer.build_single_message("assistant", metadata, content)[1:],
                                         tokenizer.role_id("user")]


@pytest.fixture
def session(tokenizer, say):
    """A session whose model repeats what was said to it."""
    session = ChatSession(tokenizer, lambda ids: iter(say(session.said)), seq_length=512)
    session.said = "你好！\n很高兴见到你。"
    return session


class Gate:
    """A model that waits before each token until it is let go on."""

    def __init__(self, ids):
        self.ids, self.permits = ids, threading.Semaphore(0)

    def __call__(self, _):
        for id_ in self.ids:
            assert self.permits.acquire(timeout=20)
            yield id_

    def let(self, tokens):
        self.permits.release(tokens)


def settle(chat):
    """Wait until the session is idle and the page shows it as it is."""
    for thread in threading.enumerate():
        if thread.name == "glm3kit chat":
            thread.join(20)
    session = chat.session
    until(lambda: not session.busy and chat.state == shown_state(session) | {"model_id": chat.model_id}
          and page(chat) == [(message["role"], as_text(message["content"])) for message in session.history])


def ask(chat, action, **arguments):
    """What the page asks for, in the form in which it comes."""
    chat._handle_custom_msg({"action": action, **arguments}, [])
    settle(chat)


def send(chat, text, role="user", **more):
    ask(chat, "send", text=text, role=role, **more)


def page(chat):
    """What was said, as the page shows it."""
    return [(message["role"], message["text"]) for message in chat.messages + chat.growing]


@pytest.fixture
def sent(monkeypatch):
    """Messages to the page that are no state."""
    messages = []
    monkeypatch.setattr(widgets.ChatWidget, "send", lambda self, content, buffers=None: messages.append(content))
    return messages


# talking

def test_a_sent_message_and_its_answer_are_shown(session):
    chat = chat_widget(session)
    send(chat, "你好")
    assert page(chat) == [("user", "你好"), ("assistant", "你好！\n很高兴见到你。")]
    assert chat.growing == []
    assert [message["role"] for message in session.history] == ["user", "assistant"]


@pytest.mark.parametrize("role", ["user", "system", "observation"])
def test_the_chosen_role_speaks(session, role):
    chat = chat_widget(session)
    send(chat, "你好", role)
    assert session.history[0] == {"role": role, "content": "你好"}
    assert chat.messages[0]["role"] == role


def test_an_answer_grows_on_the_page_while_it_is_generated_and_can_be_stopped(session, say):
    session.reply = Gate(say("一二三四五六七八"))
    chat = chat_widget(session)
    chat.do("send", text="数数", role="user")
    until(lambda: chat.state["busy"] and page(chat)[0] == ("user", "数数"))
    session.reply.let(5)
    until(lambda: chat.growing and "一" in chat.growing[0]["text"])
    assert "八" not in chat.growing[0]["text"]
    chat.do("stop")
    session.reply.let(1)
    settle(chat)
    assert "一" in chat.messages[-1]["text"] and "八" not in chat.messages[-1]["text"] and chat.growing == []
    session.reply = lambda ids: iter(say("好"))
    send(chat, "继续")
    assert page(chat)[-1] == ("assistant", "好")


def test_a_fast_answer_is_drawn_at_a_measured_pace(session, tokenizer):
    def reply(_):
        for _ in range(400):
            time.sleep(0.001)
            yield 300

    session.seq_length, session.reply = None, reply
    chat, drawn = chat_widget(session), []
    chat.observe(drawn.append, "growing")
    start = time.monotonic()
    send(chat, "数数")
    assert len(session.last_reply_ids) == 400
    assert len(drawn) <= (time.monotonic() - start) / REFRESH_S + 4


def test_the_last_token_before_a_long_pause_is_shown(session, say):
    session.reply = Gate(say("一二三四五六七八"))
    chat = chat_widget(session)
    chat.do("send", text="数数", role="user")
    session.reply.let(6)
    until(lambda: len(session.last_reply_ids) == 6)
    until(lambda: chat.growing and chat.growing[0]["text"] == session.progress[1][0]["content"])
    session.reply.let(99)
    settle(chat)


# changing what was said

def test_regenerate_edit_rewrite_undo_and_clear_do_what_they_say(session, sent):
    chat = chat_widget(session)
    send(chat, "一")
    send(chat, "二")
    session.said = "新"
    ask(chat, "regenerate")
    assert page(chat)[2:] == [("user", "二"), ("assistant", "新")]
    send(chat, "改", at=0)
    assert page(chat) == [("user", "改"), ("assistant", "新")]
    ask(chat, "rewrite", at=1, text="旧")
    assert page(chat) == [("user", "改"), ("assistant", "旧")]
    ask(chat, "undo")
    assert page(chat) == []
    assert sent == [{"draft": "改", "role": "user"}], "what was taken back can be written anew"
    send(chat, "你好")
    ask(chat, "clear")
    assert page(chat) == [] and chat.state["used"] == 0


def test_the_system_prompt_is_set_and_kept(session):
    chat = chat_widget(session)
    send(chat, "你好")
    ask(chat, "set_system", text="你是导游。")
    assert page(chat)[0] == ("system", "你是导游。") and chat.state["system"] == "你是导游。"
    ask(chat, "clear")
    assert page(chat) == [("system", "你是导游。")]


@pytest.mark.parametrize("form", ["json", "md"])
def test_a_saved_conversation_is_opened_again(session, sent, form):
    chat = chat_widget(session)
    send(chat, "你好")
    ask(chat, "save", form=form)
    (file,) = sent
    assert file["file"] == f"chat.{form}"
    assert read_transcript(file["text"]) == session.history
    before = page(chat)
    ask(chat, "clear")
    ask(chat, "load", text=file["text"])
    assert page(chat) == before


def test_a_file_that_is_no_conversation_is_refused_and_changes_nothing(session):
    chat = chat_widget(session)
    send(chat, "你好")
    before = page(chat)
    ask(chat, "load", text="<html>")
    assert "line 1: '<html>', expected JSON or Markdown" in chat.note
    assert page(chat) == before
    ask(chat, "undo")
    assert chat.note == ""


# settings

def test_sampling_starts_from_the_configuration_and_is_checked_by_its_rules(session, say):
    seen = []
    session.reply = lambda ids, **options: seen.append(options) or iter(say("好"))
    session.sampling = GenerateConfig(top_k=1).model_dump()
    chat = chat_widget(session)
    assert chat.state["sampling"] == GenerateConfig(top_k=1).model_dump()
    ask(chat, "set_sampling", temperature=0.5, do_sample=True)
    send(chat, "你好")
    assert seen == [GenerateConfig(top_k=1, temperature=0.5, do_sample=True).model_dump()]
    ask(chat, "set_sampling", temperature=-1)
    assert "temperature: Input should be greater than 0" in chat.note
    assert chat.state["sampling"]["temperature"] == 0.5


def test_the_meter_counts_tokens_the_window_and_what_was_left_out(session):
    chat = chat_widget(session)
    send(chat, "你好")
    used = len(session.last_prompt_ids) + len(session.last_reply_ids)
    assert (chat.state["used"], chat.state["window"], chat.state["left_out"]) == (used, 512, 0)
    assert chat.state["reply_tokens"] == len(session.last_reply_ids) and chat.state["speed"] > 0
    assert not any(message["left_out"] for message in chat.messages)
    session.seq_length, session.reserve = 128, 32
    session.history = [{"role": "system", "content": "导游"}, {"role": "user", "content": "一二三四五六七八九十" * 20},
                       {"role": "assistant", "metadata": "", "content": "好"}]
    send(chat, "你好")
    assert chat.state["left_out"] == 2
    assert [message["left_out"] for message in chat.messages] == [False, True, True, False, False]


# tools

@pytest.fixture
def tool_session(tokenizer, say):
    replies = [say("```python\ntool_call(expression='6*7')\n```", "calculate"), say("42。")]
    return ChatSession(tokenizer, lambda ids: iter(replies.pop(0)), tools=[calculate])


def test_tools_run_by_themselves_and_every_step_is_shown(tool_session):
    chat = chat_widget(tool_session)
    (shown,) = chat.state["tools"]
    assert (shown["name"], shown["runs"]) == ("calculate", True)
    assert json.loads(shown["schema"]) == calculate.parameters
    send(chat, "多少？")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "observation", "assistant"]
    assert json.loads(chat.messages[2]["arguments"]) == {"expression": "6*7"}
    assert page(chat)[3:] == [("observation", "42"), ("assistant", "42。")]


def test_ask_first_shows_the_arguments_and_waits(tool_session):
    chat = chat_widget(tool_session)
    ask(chat, "set_ask_first", ask_first=True)
    send(chat, "多少？")
    call = chat.state["call"]
    assert (call["name"], json.loads(call["arguments"]), call["runs"]) == ("calculate", {"expression": "6*7"}, True)
    assert len(page(chat)) == 3, "nothing has run"
    ask(chat, "run_tool")
    assert page(chat)[3:] == [("observation", "42"), ("assistant", "42。")] and chat.state["call"] is None


def test_a_stop_also_keeps_the_tool_from_running(tool_session, say):
    ids = say("```python\ntool_call(expression='6*7')\n```", "calculate")
    tool_session.reply = Gate(ids)
    chat = chat_widget(tool_session)
    chat.do("send", text="多少？", role="user")
    tool_session.reply.let(len(ids) - 2)
    until(lambda: len(tool_session.last_reply_ids) == len(ids) - 2)
    chat.do("stop")
    tool_session.reply.let(1)
    settle(chat)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.state["error"] is None, "nothing more was asked of the model"
    assert chat.state["call"]["runs"], "a person may still run it"


def test_a_tool_that_is_only_described_waits_for_an_observation(session, say):
    session = ChatSession(session.tokenizer, lambda ids: iter(say("```\ntool_call(city='北京')\n```", "weather")),
                          tools=[{"name": "weather", "description": "天气"}])
    chat = chat_widget(session)
    send(chat, "天气？")
    assert (chat.state["call"]["name"], chat.state["call"]["runs"]) == ("weather", False)


def test_code_is_offered_and_not_run(session, say):
    session.reply = lambda ids: iter(say("```python\nprint(1)\n```", "interpreter"))
    chat = chat_widget(session)
    send(chat, "算")
    assert (chat.state["code"], chat.state["call"]) == ("print(1)", None)
    ask(chat, "observe_cell")
    assert "no cell was run" in chat.note and len(page(chat)) == 2


# faults

def test_an_error_in_the_model_is_shown_with_its_reason_and_the_session_stays_usable(session, say):
    def reply(ids):
        yield from say("一二三")[:3]
        raise RuntimeError("the card is gone")

    session.reply = reply
    chat = chat_widget(session)
    send(chat, "你好")
    assert page(chat) == [], "no half turn"
    assert chat.state["error"]["reason"] == "RuntimeError: the card is gone"
    assert "in reply" in chat.state["error"]["trace"]
    assert chat.state["unsent"] == {"role": "user", "text": "你好"}
    assert chat_widget(session).state["error"] == chat.state["error"], "also where it is displayed again"
    session.reply = lambda ids: iter(say("好"))
    send(chat, "你好")
    assert len(page(chat)) == 2 and chat.state["error"] is None and chat.state["unsent"] is None


def test_a_message_that_is_too_long_is_refused_in_the_chat(session):
    chat = chat_widget(session)
    send(chat, "长" * 2000)
    assert chat.state["error"]["reason"].startswith("PromptError: the newest message")
    assert chat.state["error"]["trace"] == "", "our own error says it all"
    assert chat.state["unsent"]["text"] == "长" * 2000
    send(chat, "你好")
    assert len(page(chat)) == 2


def test_what_is_asked_for_while_somebody_else_generates_is_refused_with_the_reason(session, say):
    session.reply = Gate(say("一二三"))
    chat = chat_widget(session)
    stream = session.stream("数数")
    for action in ("send", "clear", "undo", "regenerate", "run_tool"):
        chat.note = ""
        chat.do(action, **({"text": "你好", "role": "user"} if action == "send" else {}))
        assert re.search("still generating|nothing has been said", chat.note), action
    session.reply.let(99)
    assert "".join(stream) == "一二三"


def test_a_history_that_cannot_be_said_is_shown_all_the_same(session):
    session.history = [{"role": "pilot", "content": {"a": 1}}]
    chat = chat_widget(session)
    assert page(chat) == [("pilot", '{"a": 1}')] and chat.state["used"] is None


def test_text_reaches_the_page_as_it_was_said(session):
    text = "[a](javascript:alert(1)) <script>1</script> <|user|> &amp;"
    session.said = text
    chat = chat_widget(session)
    send(chat, text)
    assert page(chat) == [("user", text), ("assistant", text)]


# one conversation, many views

def test_displaying_again_shows_the_same_conversation(session):
    chat = chat_widget(session)
    send(chat, "你好")
    send(chat, "再见")
    again = chat_widget(session)
    assert page(again) == page(chat) and len(page(again)) == 4
    same = {key for key in chat.state if key != "model_id"}
    assert {key: again.state[key] for key in same} == {key: chat.state[key] for key in same}


def test_two_widgets_and_python_on_one_session_stay_equal(session):
    one, two = chat_widget(session), chat_widget(session)
    send(one, "一")
    settle(two)
    assert page(one) == page(two) and len(page(two)) == 2
    ask(two, "undo")
    settle(one)
    assert page(one) == page(two) == []
    session.ask("二")
    for chat in (one, two):
        settle(chat)
        assert page(chat)[0] == ("user", "二")


def test_displaying_again_while_an_answer_is_generated_shows_and_stops_it(session, say):
    session.reply = Gate(say("一二三四五六七八"))
    chat_widget(session).do("send", text="数数", role="user")
    session.reply.let(4)
    again = chat_widget(session)
    until(lambda: again.growing and "一" in again.growing[0]["text"])
    again.do("stop")
    session.reply.let(1)
    settle(again)
    assert len(page(again)) == 2 and "八" not in page(again)[-1][1]


def test_a_closed_widget_is_told_nothing_more(session):
    chat = chat_widget(session)
    chat.close()
    chat.close()
    session.ask("你好")
    assert session._observers == []


def test_the_state_of_the_page_is_json(session):
    chat = chat_widget(session)
    send(chat, "你好")
    shown = {name: getattr(chat, name) for name in ("messages", "growing", "state", "note", "guide", "texts")}
    assert json.loads(json.dumps(shown)) == shown
    assert isinstance(chat.traits()["messages"], traitlets.List)
