"""The chat cell: a conversation as message bubbles, with roles, a Stop button and text that streams in.

The conversation itself lives in the ChatSession; everything here is drawn from it and can be drawn again. A reply is
generated in a thread of its own, because the buttons of a notebook are served by the kernel's main thread.

    session = ChatSession(tokenizer, lambda ids: net.stream(ids), seq_length=2048)
    chat_widget(session)
"""

import json
import threading
import time
import traceback
from html import escape
from typing import Any

import ipywidgets as widgets

from glm3kit.chat import ROLES, ChatSession
from glm3kit.errors import Glm3KitError

REFRESH_S = 0.05  # between two drawings of a growing reply
NAMES = {"user": "user 用户", "assistant": "assistant 助手", "system": "system 系统", "observation": "observation 观察"}
HINT = "Say something as user, set the scene as system, or give a tool's result as observation."
HINT_ZH = "以用户身份提问，以系统身份设定场景，或以观察身份填入工具结果。"

# JupyterLab's variables follow its light and dark themes; the values behind the commas are for other front ends
STYLE = """<style>
.glm3kit-chat { box-sizing: border-box; width: 100%; max-width: 900px; padding: 12px; border-radius: 10px;
  border: 1px solid var(--jp-border-color2, #e0e0e0); background: var(--jp-layout-color1, #fff);
  font-family: var(--jp-ui-font-family, system-ui), "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  --glm3kit-brand: var(--jp-brand-color1, #1976d2); }
.glm3kit-chat .glm3kit-log { display: flex; flex-direction: column-reverse; /* stays at its end while text grows */
  max-height: 460px; min-height: 96px; overflow-x: hidden; overflow-y: auto; margin: 0 0 8px; padding: 0 4px; }
.glm3kit-chat .glm3kit-messages { flex: none; margin: auto 0 0; overflow: visible; }
.glm3kit-chat .widget-html { height: auto; margin: 3px 0; }
.glm3kit-chat .widget-html-content { min-width: 0; line-height: 1.6; }
.glm3kit-message { box-sizing: border-box; width: fit-content; min-width: 72px; max-width: 86%; padding: 7px 13px 9px;
  border: 1px solid transparent; border-radius: 4px 14px 14px; color: var(--jp-ui-font-color1, #1f1f1f);
  background: var(--jp-layout-color2, #eee); }
.glm3kit-who { font-size: 11px; color: var(--jp-ui-font-color2, #616161); }
.glm3kit-words { font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
.glm3kit-user, .glm3kit-observation { margin-left: auto; border-radius: 14px 4px 14px 14px; }
.glm3kit-user { background: color-mix(in srgb, var(--glm3kit-brand) 18%, var(--jp-layout-color1, #fff)); }
.glm3kit-observation { border-color: var(--jp-success-color1, #388e3c); background: transparent; }
.glm3kit-system { width: auto; max-width: 100%; border: 1px dashed var(--jp-border-color1, #bdbdbd);
  border-radius: 8px; background: transparent; }
.glm3kit-error { border-color: var(--jp-error-color1, #d32f2f); border-radius: 8px; background: transparent; }
.glm3kit-error .glm3kit-who { color: var(--jp-error-color1, #d32f2f); }
.glm3kit-error pre { max-height: 200px; overflow: auto; font-size: 11px; line-height: 1.4; }
.glm3kit-call .glm3kit-words, .glm3kit-observation .glm3kit-words {
  font-family: var(--jp-code-font-family, monospace), "Noto Sans CJK SC", monospace; font-size: 13px; }
.glm3kit-tag { margin-left: 6px; padding: 1px 7px; border-radius: 8px; color: var(--jp-ui-inverse-font-color1, #fff);
  background: var(--glm3kit-brand); }
.glm3kit-live .glm3kit-words::after { content: "▍"; color: var(--glm3kit-brand); animation: glm3kit-blink 1s infinite; }
@keyframes glm3kit-blink { 50% { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .glm3kit-live .glm3kit-words::after { animation: none; } }
.glm3kit-hint { padding: 20px 8px; text-align: center; color: var(--jp-ui-font-color2, #616161); }
.glm3kit-chat .widget-label { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.glm3kit-chat .glm3kit-role { width: 150px; }
.glm3kit-chat .glm3kit-text { width: 100%; margin: 0; }
.glm3kit-chat .glm3kit-text textarea { min-height: 62px; padding: 8px 10px; border-radius: 8px; font-size: 14px;
  line-height: 1.5; font-family: inherit; resize: vertical; }
.glm3kit-chat .glm3kit-controls { flex-wrap: wrap; align-items: center; gap: 6px; margin: 8px 0 0; overflow: visible; }
.glm3kit-chat .glm3kit-controls > * { margin: 0; }
.glm3kit-chat .glm3kit-controls button { width: auto; padding: 0 14px; border-radius: 6px; }
.glm3kit-chat .glm3kit-controls > .glm3kit-clear { margin-left: auto; }
.glm3kit-chat .glm3kit-status { flex: 1 1 100%; min-height: 20px; }
.glm3kit-count { font-size: 12px; color: var(--jp-ui-font-color2, #616161); }
</style>"""


def message_html(message: dict[str, Any], live: bool = False) -> str:
    """One message as a bubble; every word of it is escaped, line breaks and spaces are kept.

    live: whether it is still growing.
    """
    role, metadata = escape(message["role"]), escape((message.get("metadata") or "").strip())
    name = escape(NAMES.get(message["role"], message["role"]))
    tag = f'<span class="glm3kit-tag">{metadata}</span>' if metadata else ""
    if message.get("tools"):
        tag += f'<span class="glm3kit-tag">{len(message["tools"])} tools 工具</span>'
    content = message["content"]
    words = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)  # a tool's result
    classes = f"glm3kit-message glm3kit-{role}" + " glm3kit-call" * bool(metadata) + " glm3kit-live" * live
    return (
        f'<div class="{classes}" role="article" aria-label="{name}"><div class="glm3kit-who">{name}{tag}</div>'
        f'<div class="glm3kit-words">{escape(words)}</div></div>'
    )


def error_html(error: Exception) -> str:
    """An error as a bubble: its reason, and where it comes from unless it is one of ours, whose message says it all."""
    trace = ""
    if not isinstance(error, Glm3KitError):
        lines = escape("".join(traceback.format_exception(error)))
        trace = f"<details><summary>traceback</summary><pre>{lines}</pre></details>"
    return (
        '<div class="glm3kit-message glm3kit-error" role="alert"><div class="glm3kit-who">error 出错</div>'
        f'<div class="glm3kit-words">{escape(type(error).__name__)}: {escape(str(error))}</div>{trace}</div>'
    )


def status_text(session: ChatSession) -> str:
    """Tokens and speed of the last reply, and how much of the window prompt and reply use."""
    prompt, reply = len(session.last_prompt_ids), len(session.last_reply_ids)
    if not prompt:
        return ""
    window = "" if session.seq_length is None else f" / {session.seq_length}"
    speed = [f"{session.tokens_per_second:.1f} tokens/s"] if session.tokens_per_second else []
    parts = [f"{reply} tokens", *speed, f"context 上下文 {prompt + reply}{window}"]
    if session.left_out:
        parts.append(f"oldest messages left out 略去最早的消息: {session.left_out}")
    return " · ".join(parts)


class ChatView:
    """The widgets that show one session, and what its buttons do. `box` is what a notebook displays."""

    def __init__(self, session: ChatSession):
        self.session = session
        self._error: Exception | None = None
        self._note = ""  # said in front of the counts
        self._drawing = threading.Lock()  # the buttons' thread and the watching thread both draw

        self.messages = widgets.VBox().add_class("glm3kit-messages")
        log = widgets.Box([self.messages]).add_class("glm3kit-log")
        # descriptions are heard, not seen: a screen reader says them, STYLE hides them
        self.text = widgets.Textarea(description="Message to the model 发给模型的消息", placeholder="Message 消息")
        self.text.add_class("glm3kit-text")
        self.role = widgets.Dropdown(
            description="Role that speaks 发言角色", options=[(NAMES[role], role) for role in ROLES]
        ).add_class("glm3kit-role")
        self.send = self._button("send", "Send 发送", "Send the message 发送消息", "paper-plane", self._on_send)
        self.stop = self._button("stop", "Stop 停止", "End the reply here 停止生成", "stop", self._on_stop)
        self.clear = self._button("clear", "Clear 清空", "Forget the conversation 清空对话", "trash", self._on_clear)
        self.send.button_style = "primary"
        self.status = widgets.HTML().add_class("glm3kit-status")
        controls = widgets.HBox([self.role, self.send, self.stop, self.clear, self.status])
        controls.add_class("glm3kit-controls")
        style = widgets.HTML(STYLE, layout=widgets.Layout(display="none"))
        self.box = widgets.VBox([style, log, self.text, controls]).add_class("glm3kit-chat")

        if session.busy:  # displayed again while a reply is being generated
            self._watch()
        else:
            self.draw()

    @staticmethod
    def _button(name: str, label: str, tooltip: str, icon: str, action: Any) -> widgets.Button:
        button = widgets.Button(description=label, tooltip=tooltip, icon=icon).add_class(f"glm3kit-{name}")
        button.on_click(action)
        return button

    def draw(self) -> None:
        """Bring the widgets to the session's state. Only what has changed is sent to the page."""
        with self._drawing:
            busy, said = self.session.busy, self.session.messages
            views = [message_html(message, live=busy and message is said[-1]) for message in said]
            if self._error is not None:
                views.append(error_html(self._error))
            if not views:
                views = [f'<div class="glm3kit-hint">{HINT}<br>{HINT_ZH}</div>']
            shown = list(self.messages.children)
            for bubble, view in zip(shown, views, strict=False):
                bubble.value = view
            if len(shown) != len(views):
                added = [widgets.HTML(view) for view in views[len(shown) :]]
                self.messages.children = [*shown[: len(views)], *added]
                for bubble in shown[len(views) :]:
                    bubble.close()
            self.send.disabled = self.clear.disabled = busy
            self.stop.disabled = not busy
            note = "generating 生成中…" if busy else self._note
            line = " · ".join(filter(None, [note, status_text(self.session)]))
            self.status.value = f'<span class="glm3kit-count" role="status">{escape(line)}</span>'

    def _on_send(self, _: widgets.Button) -> None:
        text, self._error = self.text.value, None
        if not text.strip():
            self._note = "nothing to send 没有内容"
            self.draw()
            return
        try:
            deltas = self.session.stream(text, self.role.value)
        except Glm3KitError as err:  # the text stays where it was, to be changed
            self._error, self._note = err, ""
            self.draw()
            return
        self.text.value = self._note = ""
        speaker = threading.Thread(target=self._speak, args=(deltas, text), daemon=True)
        speaker.start()
        self._watch(speaker)

    def _speak(self, deltas: Any, text: str) -> None:
        try:
            for _ in deltas:
                pass
        except Exception as err:  # whatever a model may raise: it is shown in the chat, nobody else could see it here
            self._error = err
            self.text.value = self.text.value or text  # the message is not in the history: give it back
        else:
            reply = self.session.last_reply if isinstance(self.session.last_reply, dict) else {}
            self._note = self._note or reply.get("reason", "")  # why what looks like a tool call is none
            self.role.value = "observation" if "parameters" in reply else "user"  # who most likely speaks next

    def _watch(self, speaker: threading.Thread | None = None) -> None:
        """Draw again and again until the reply is complete, in a thread of its own."""
        self.draw()

        def watch() -> None:
            while self.session.busy or (speaker is not None and speaker.is_alive()):
                self.draw()
                time.sleep(REFRESH_S)
            self.draw()

        threading.Thread(target=watch, daemon=True).start()

    def _on_stop(self, _: widgets.Button) -> None:
        self._note = "stopped 已停止"
        self.session.stop()

    def _on_clear(self, _: widgets.Button) -> None:
        self._error, self._note = None, ""
        try:
            self.session.clear()
        except Glm3KitError as err:
            self._error = err
        self.draw()


def chat_widget(session: ChatSession) -> widgets.VBox:
    """Return a chat cell for a session: bubbles, role selector, text area, Send, Stop, Clear and a status line.

    Displaying it again, or calling this again after the page was reloaded, shows the same conversation.
    Example: chat_widget(ChatSession(tokenizer, net.stream))
    """
    return ChatView(session).box
