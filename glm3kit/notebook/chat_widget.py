"""The chat cell: a conversation in a notebook, with roles, tools, Stop, and text that streams in.

The conversation lives in the ChatSession; what is shown is drawn from it, in chat_widget.js, and can be drawn again: in
another cell, or after the page was reloaded. The page asks for something ("send", "undo" ...), the session does it, and
every widget on that session is told. A reply is generated in a thread of its own, because what the page asks for is
served by the kernel's main thread.

    session = ChatSession(tokenizer, net.conversation(), seq_length=2048, sampling={"top_k": 1})
    chat_widget(session)
"""

import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from pydantic import ValidationError

from glm3kit.chat import interpreter
from glm3kit.chat.session import ChatSession
from glm3kit.config.groups import GenerateConfig
from glm3kit.errors import ConfigError, Glm3KitError, PromptError
from glm3kit.text.answers import answer_content, has_tools
from glm3kit.text.tokenizer import as_text

REFRESH_S = 0.05  # between two drawings of a growing reply
HERE = Path(__file__).parent
# What is said in the document of the original, one after the other
GUIDE = [
    {"role": "system", "text": "假设你现在是一个导游，请尽可能贴近这个角色回答问题。"},
    {"role": "user", "text": "我打算1月份去海南玩，可以介绍一下海南有哪些好玩的，好吃的么？"},
    {"role": "user", "text": "哪里适合冲浪和潜水呢？"},
    {"role": "user", "text": "可以帮我做一份旅游攻略吗？"},
]


def _pretty(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, default=str)


def shown_message(message: Mapping[str, Any], at: int, tools: bool, left_out: bool = False) -> dict[str, Any]:
    """A message as the page shows it: all of it plain text, which the page never reads as markup.

    at: its place in the history. tools: whether the conversation has tools, so that a name is a call.
    left_out: whether the model is not shown it any more.
    """
    shown = {"at": at, "role": str(message["role"]), "text": as_text(message["content"]), "left_out": left_out,
             "name": (message.get("metadata") or "").strip(), "tools": len(message.get("tools") or [])}
    content = answer_content(shown["name"], shown["text"], tools) if shown["role"] == "assistant" else ""
    if isinstance(content, dict) and "parameters" in content:
        shown["arguments"] = _pretty(content["parameters"])
    return shown


def shown_state(session: ChatSession) -> dict[str, Any]:
    """All of a session but its messages, as the page shows it."""
    try:
        used = session.context_used
    except PromptError:  # a history that was assigned and cannot be said; the next reply reports it
        used = None
    error, unsent = session.error, session.unsent  # read once: another thread may begin a reply
    if unsent is not None:
        unsent = {"role": unsent["role"], "text": as_text(unsent["content"])}
    if error is not None:  # where it comes from, unless it is one of our own errors, whose message says it all
        trace = "" if isinstance(error, Glm3KitError) else "".join(traceback.format_exception(error))
        error = {"reason": f"{type(error).__name__}: {error}", "trace": trace}
    described = [item if isinstance(item, Mapping) else {"name": as_text(item)} for item in session.tools]
    tools = [{"name": str(item.get("name", "")), "description": str(item.get("description", "")),
              "schema": _pretty(item["parameters"]) if "parameters" in item else "",
              "runs": item.get("name") in session.functions} for item in described]
    busy = session.busy
    call, code = (None, None) if busy else (session.pending_call, session.pending_code)
    if call is not None:
        call = {"name": call["name"], "arguments": _pretty(call["parameters"]) if "parameters" in call else None,
                "reason": call.get("reason"), "runs": session.can_run(call)}
    return {
        "busy": busy, "running": session.running_tool, "error": error, "unsent": unsent,
        "used": used, "window": session.seq_length, "left_out": session.left_out,
        "reply_tokens": len(session.last_reply_ids), "speed": round(session.tokens_per_second, 1),
        "system": session.system, "sampling": session.sampling, "ask_first": session.ask_first,
        "tools": tools, "call": call, "code": code,
    }


class ChatWidget(anywidget.AnyWidget):
    """One view of a session. messages, growing and state are what the page shows; `do` is what the page may ask for."""

    _esm = "\n".join((HERE / name).read_text(encoding="utf-8")
                     for name in ("chat_page.js", "chat_panels.js", "chat_widget.js"))
    _css = HERE / "chat_widget.css"

    messages = traitlets.List().tag(sync=True)  # that stand
    growing = traitlets.List().tag(sync=True)  # parts of the reply that is being generated
    state = traitlets.Dict().tag(sync=True)
    note = traitlets.Unicode().tag(sync=True)  # why something that was asked for was not done
    guide = traitlets.List(GUIDE).tag(sync=True)
    texts = traitlets.Dict(json.loads((HERE / "chat_texts.json").read_text(encoding="utf-8"))).tag(sync=True)

    def __init__(self, session: ChatSession):
        super().__init__()
        self.session = session
        self._drawing = threading.Lock()
        self._planned = threading.Lock()  # held while a timer waits to draw
        self._drawn = 0.0  # seconds, of time.monotonic
        self.draw()
        self._end = session.observe(self._draw_soon)
        self.on_msg(lambda _, content, buffers: self.do(**content))

    def close(self) -> None:
        """Take the widget from the page and from its session."""
        if self.comm is not None:
            self._end()
        super().close()

    def draw(self) -> None:
        """Bring the page to the session's state. Only what has changed is sent."""
        with self._drawing, self.hold_sync():  # one message to the page
            self._drawn = time.monotonic()
            standing, growing = self.session.progress
            tools = has_tools(standing)
            first = 1 if standing and standing[0]["role"] == "system" else 0
            gone = range(first, first + self.session.left_out)
            self.messages = [shown_message(message, at, tools, at in gone) for at, message in enumerate(standing)]
            self.growing = [shown_message(message, at, tools) for at, message in enumerate(growing, len(standing))]
            self.state = shown_state(self.session) | {"model_id": self.model_id}

    def _draw_soon(self) -> None:
        """Draw after every change, but not more often than each REFRESH_S."""
        def due() -> None:
            self._planned.release()
            self.draw()

        if self._planned.acquire(blocking=False):  # else it will be drawn anyway
            timer = threading.Timer(max(0.0, self._drawn + REFRESH_S - time.monotonic()), due)
            timer.daemon = True
            timer.start()

    # what the page may ask for

    def do(self, action: str, **arguments: Any) -> None:
        """Do what the page asks for; if the session refuses, `note` says why. Raises KeyError for an unknown action."""
        session = self.session
        actions: dict[str, Callable[..., Any]] = {
            "send": self._speaking(session.stream), "regenerate": self._speaking(session.stream_again),
            "run_tool": self._speaking(lambda: session.stream_tools(rounds=1)),
            "observe_cell": self._speaking(session.stream_cell), "watch_cells": interpreter.watch, "stop": session.stop,
            "rewrite": session.rewrite, "undo": self._undo, "clear": session.clear, "set_system": session.set_system,
            "set_sampling": self._set_sampling, "set_ask_first": session.set_ask_first, "save": self._save,
            "load": session.load}
        self.note = ""
        try:
            actions[action](**arguments)
        except Glm3KitError as err:
            if err is not session.error:  # that one is shown in the conversation
                self.note = str(err)

    def _speaking(self, stream: Callable[..., Iterator[str]]) -> Callable[..., None]:
        """An action that begins a reply and reads it to its end in a thread; then it runs the tools that are called.

        Where a person is asked first, the tools wait for that.
        """
        def speak(deltas: Iterator[str]) -> None:
            try:
                for _ in deltas:
                    pass
                if not (self.session.ask_first or self.session.stopped):
                    self.session.run_tools()
            except Exception as err:  # whatever a model may raise; the session has kept it, to be shown in the chat
                if err is not self.session.error:
                    self.note = f"{type(err).__name__}: {err}"

        return lambda **said: threading.Thread(target=speak, args=(stream(**said),), name="glm3kit chat",
                                               daemon=True).start()

    def _undo(self) -> None:
        taken = self.session.undo()
        self.send({"draft": as_text(taken["content"]), "role": taken["role"]})

    def _set_sampling(self, **options: Any) -> None:
        try:
            checked = GenerateConfig.model_validate((self.session.sampling or {}) | options)
        except ValidationError as err:
            raise ConfigError("; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in err.errors())) from err
        self.session.set_sampling(**{key: getattr(checked, key) for key in options})

    def _save(self, form: str) -> None:
        self.send({"file": f"chat.{form}", "text": self.session.transcript(form)})


def chat_widget(session: ChatSession) -> ChatWidget:
    """Return a chat cell for a session; another one for the same session shows the same conversation.

    Example: chat_widget(ChatSession(tokenizer, net.conversation()))
    """
    return ChatWidget(session)
