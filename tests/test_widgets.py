"""The chat cell without a browser: buttons are clicked from Python, the model is scripted."""

import threading
import time
from html import escape
from pathlib import Path

import ipywidgets
import pytest

from glm3kit.chat import ChatSession
from glm3kit.errors import PromptError
from glm3kit.tokenizer import ChatGLM3Tokenizer
from glm3kit.widgets import REFRESH_S, chat_widget, error_html, message_html, status_text

TINY = Path(__file__).resolve().parent.parent / "glm3kit" / "tiny" / "tokenizer.model"
ATTACKS = [
    "<script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "</div></div><iframe srcdoc='<script>parent.hacked = 1</script>'>",
    '" onmouseover="window.hacked = 1',
    "</style><svg onload=window.hacked=1>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLM3Tokenizer(TINY)


@pytest.fixture
def say(tokenizer):
    """Ids as the model generates them: metadata, a new line, the content, and the id that ends the turn."""
    return lambda content, metadata="": [
        *tokenizer.build_single_message("assistant", metadata, content)[1:], tokenizer.role_id("user"),
    ]


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


def part(box, name):
    """The widget of a class name inside a box."""
    found = [box] if f"glm3kit-{name}" in box._dom_classes else []
    for child in getattr(box, "children", ()):
        found += [part(child, name)]
    found = [widget for widget in found if widget is not None]
    return found[0] if found else None


def page(box):
    """The HTML of the conversation, bubble after bubble."""
    return [bubble.value for bubble in part(box, "messages").children]


def until(condition):
    """Wait for something that another thread does."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited 20 s in vain"
        time.sleep(0.01)


def send(box, text, role="user", wait=True):
    part(box, "text").value, part(box, "role").value = text, role
    part(box, "send").click()
    if wait:
        until(lambda: not part(box, "send").disabled)


# talking

def test_a_sent_message_and_its_answer_appear_as_bubbles(session):
    box = chat_widget(session)
    send(box, "你好")
    question, answer = page(box)
    assert "glm3kit-user" in question and ">你好<" in question
    assert "glm3kit-assistant" in answer and ">你好！\n很高兴见到你。<" in answer, "line breaks are kept"
    assert "glm3kit-live" not in answer
    assert part(box, "text").value == ""
    assert [message["role"] for message in session.history] == ["user", "assistant"]


@pytest.mark.parametrize("role", ["user", "system", "observation"])
def test_the_chosen_role_speaks(session, role):
    box = chat_widget(session)
    send(box, "你好", role)
    assert session.history[0] == {"role": role, "content": "你好"}
    assert f"glm3kit-{role}" in page(box)[0]
    assert part(box, "role").value == "user", "the user speaks next"


def test_a_tool_call_shows_its_tool_and_asks_for_the_observation(session, tokenizer, say):
    session.history = [{"role": "system", "content": "工具", "tools": [{"name": "weather"}]}]
    session.reply = lambda ids: iter(say("```python\ntool_call(city='北京')\n```", "weather"))
    box = chat_widget(session)
    send(box, "天气？")
    assert "1 tools" in page(box)[0]
    assert '<span class="glm3kit-tag">weather</span>' in page(box)[-1]
    assert part(box, "role").value == "observation"


def test_an_answer_grows_on_the_page_while_it_is_generated(session, say):
    session.reply = Gate(say("一二三四五六七八"))
    box = chat_widget(session)
    send(box, "数数", wait=False)
    assert (part(box, "send").disabled, part(box, "stop").disabled, part(box, "clear").disabled) == (True, False, True)
    until(lambda: "glm3kit-live" in page(box)[-1])
    session.reply.let(5)
    until(lambda: "一" in page(box)[-1])
    assert "八" not in page(box)[-1]
    session.reply.let(99)
    until(lambda: part(box, "stop").disabled)
    assert ">一二三四五六七八<" in page(box)[-1]
    assert (part(box, "send").disabled, part(box, "clear").disabled) == (False, False)


def test_stop_ends_the_answer_while_tokens_stream_in(session, say):
    session.reply = Gate(say("一二三四五六七八"))
    box = chat_widget(session)
    send(box, "数数", wait=False)
    session.reply.let(4)
    until(lambda: "一" in page(box)[-1])
    part(box, "stop").click()
    session.reply.let(1)
    until(lambda: not session.busy and part(box, "stop").disabled)
    assert "一" in session.history[-1]["content"] and "八" not in session.history[-1]["content"]
    assert "stopped" in part(box, "status").value
    session.reply = lambda ids: iter(say("好"))
    send(box, "继续")
    assert ">好<" in page(box)[-1] and "stopped" not in part(box, "status").value


def test_a_fast_answer_is_drawn_at_a_measured_pace(session, tokenizer):
    def reply(_):
        for _ in range(400):
            time.sleep(0.001)
            yield 300

    session.seq_length, session.reply = None, reply
    box, drawn = chat_widget(session), []
    part(box, "status").observe(drawn.append, "value")
    start = time.monotonic()
    send(box, "数数")
    assert len(session.last_reply_ids) == 400
    assert len(drawn) <= (time.monotonic() - start) / REFRESH_S + 4


def test_a_message_of_spaces_is_not_sent(session):
    box = chat_widget(session)
    send(box, " \n")
    assert session.history == []
    assert "nothing to send" in part(box, "status").value


def test_clear_forgets_the_conversation(session):
    box = chat_widget(session)
    send(box, "你好")
    gone = part(box, "messages").children[1]
    part(box, "clear").click()
    assert session.history == []
    assert len(page(box)) == 1 and "glm3kit-hint" in page(box)[0]
    assert gone.comm is None, "a bubble that is gone is closed, or they would pile up in the page"


def test_the_status_counts_tokens_and_the_window(session):
    box = chat_widget(session)
    send(box, "你好")
    prompt, reply = len(session.last_prompt_ids), len(session.last_reply_ids)
    assert f"{reply} tokens · " in part(box, "status").value
    assert f" tokens/s · context 上下文 {prompt + reply} / 512<" in part(box, "status").value


def test_the_status_says_how_many_messages_were_left_out(session):
    session.history = [{"role": "user", "content": "一二三四五六七八九十" * 20}]
    session.seq_length, session.reserve = 128, 32
    session.ask("你好")
    assert status_text(session).endswith(": 1")


# safety

@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_from_user_or_model_becomes_markup(session, attack):
    session.said = attack
    box = chat_widget(session)
    send(box, attack)
    session.history = [
        *session.history,
        {"role": "assistant", "metadata": attack, "content": attack},
        {"role": attack, "content": attack},
        {"role": "observation", "content": {attack: attack}},
    ]
    part(box, "send").click()  # draws without sending
    html = "".join(page(box))
    assert attack not in html
    assert html.count(escape(attack)) >= 6
    for tag in ("<script", "<img", "<iframe", "<svg", "</style"):
        assert tag not in html


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_an_error_becomes_markup(attack):
    for error in (RuntimeError(attack), PromptError(attack)):
        assert attack not in error_html(error) and escape(attack) in error_html(error)


def test_text_is_shown_as_it_is():
    text = "[a](javascript:alert(1)) **b** $x$ <|user|> &amp;"
    assert f">{escape(text)}</div>" in message_html({"role": "user", "content": text})


# faults

def test_an_error_in_the_model_appears_with_its_reason_and_the_message_comes_back(session, say):
    def reply(ids):
        yield from say("一二三")[:3]
        raise RuntimeError("the card is gone")

    session.reply = reply
    box = chat_widget(session)
    send(box, "你好")
    assert len(page(box)) == 1, "no half turn"
    assert "glm3kit-error" in page(box)[0] and "RuntimeError: the card is gone" in page(box)[0]
    assert "<summary>traceback</summary>" in page(box)[0]
    assert part(box, "text").value == "你好"
    session.reply = lambda ids: iter(say("好"))
    part(box, "send").click()
    until(lambda: not part(box, "send").disabled)
    assert len(page(box)) == 2 and "glm3kit-error" not in "".join(page(box))


def test_a_message_that_is_too_long_is_refused_in_the_chat_and_stays_in_the_box(session):
    box = chat_widget(session)
    send(box, "长" * 2000)
    assert "PromptError: the newest message" in page(box)[0] and "traceback" not in page(box)[0]
    assert part(box, "text").value == "长" * 2000
    send(box, "你好")
    assert len(page(box)) == 2


def test_sending_while_somebody_else_generates_is_refused_in_the_chat(session, say):
    session.reply = Gate(say("一二三"))
    box = chat_widget(session)
    stream = session.stream("数数")
    part(box, "text").value = "你好"
    part(box, "send").click()
    assert "still generating" in page(box)[-1]
    part(box, "clear").click()
    assert "still generating" in page(box)[-1]
    session.reply.let(99)
    assert "".join(stream) == "一二三"


# one conversation, many views

def test_displaying_again_shows_the_same_conversation(session):
    box = chat_widget(session)
    send(box, "你好")
    send(box, "再见")
    again = chat_widget(session)
    assert page(again) == page(box)
    assert len(page(again)) == 4
    assert part(again, "status").value == part(box, "status").value


def test_displaying_again_while_an_answer_is_generated_shows_and_stops_it(session, say):
    session.reply = Gate(say("一二三四五六七八"))
    send(chat_widget(session), "数数", wait=False)
    session.reply.let(4)
    again = chat_widget(session)
    until(lambda: "一" in page(again)[-1])
    part(again, "stop").click()
    session.reply.let(1)
    until(lambda: part(again, "stop").disabled)
    assert len(page(again)) == 2 and "八" not in page(again)[-1]


def test_every_control_has_a_label(session):
    box = chat_widget(session)
    assert isinstance(box, ipywidgets.VBox)
    for name in ("send", "stop", "clear"):
        assert part(box, name).description and part(box, name).tooltip
    for name in ("role", "text"):
        assert part(box, name).description
    assert [value for _, value in part(box, "role").options] == ["user", "system", "observation"]
