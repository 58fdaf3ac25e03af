"""A conversation with a ChatGLM3: history, roles, tool calls, and text that appears while the model speaks.

The form of the history and of tool calls is that of the published ChatGLM3 demos. The model is any callable from the
ids of a prompt to an iterator of generated ids, so that a test can script it:

    session = ChatSession(tokenizer, lambda ids: net.stream(ids), seq_length=config.seq_length)
    for text in session.stream("你好"): print(text, end="", flush=True)
"""

import json
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from glm3kit.errors import Glm3KitError, PromptError
from glm3kit.prompt import ASSISTANT, TOOLS_PROMPT, process_response
from glm3kit.tokenizer import ChatGLM3Tokenizer

ROLES = ("user", "system", "observation")  # those that speak to the model; it answers as "assistant"
MAX_RESERVE = 256  # tokens; MindFormers' max_decode_length


class TextStream:
    """Ids in, text out: one id at a time, and never half of a character.

    A character may be spread over several byte pieces. Until it is whole its text ends with U+FFFD and is held back.
    Only the last few ids are decoded again: those of the last visible text are the context that keeps spaces right.
    Example: the pieces <0xF0> <0x9F> <0x8C> <0xB8> -> "", "", "", "🌸".
    """

    def __init__(self, tokenizer: ChatGLM3Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # the ids from here on are decoded again
        self._told = 0  # the ids before this one have been told
        self._told_text = ""  # of ids[_context:_told]

    def push(self, token: int) -> str:
        """Take one id; return the text that has become certain, often none."""
        self._ids.append(token)
        text = self._decode()
        return "" if text.endswith("\ufffd") else self._tell(text)

    def finish(self) -> str:
        """Return what is still held back, broken characters as U+FFFD."""
        return self._tell(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids[self._context :], errors="ignore")  # an untrained model says anything

    def _tell(self, text: str) -> str:
        news = text[len(self._told_text) :]
        if news.strip():  # a context of spaces alone would lose them: a decoder drops the first space of a text
            self._context = self._told
            text = self._decode()
        self._told, self._told_text = len(self._ids), text
        return news


class ChatSession:
    """A conversation: its history, and the reply that is being generated.

    tokenizer: turns messages into ids and ids into text.
    reply: callable from the ids of a prompt to an iterator of generated ids; a stop id may end them.
    system: text of a system turn that opens the conversation.
    tools: descriptions of tools, shown to the model in that turn.
    seq_length: the model's window in tokens, prompt and reply together; None: no limit.
    reserve: tokens of the window kept free for the reply, 256 or a quarter of the window if that is less.

    If a prompt would not fit into seq_length - reserve, the oldest turns are left out of it: the system turn and the
    newest message always stay, a question leaves together with its tool calls and answers, `history` keeps everything.

    history: list of {"role", "content"[, "metadata", "tools"]}; may be assigned while no reply is being generated.
    last_prompt_ids, last_reply_ids: ids of the last turn; left_out: how many messages its prompt left out.
    last_reply: what `ask` returned last.
    """

    def __init__(
        self,
        tokenizer: ChatGLM3Tokenizer,
        reply: Callable[[list[int]], Iterable[int]],
        system: str | None = None,
        tools: list[Any] | None = None,
        seq_length: int | None = None,
        reserve: int | None = None,
    ):
        self.tokenizer, self.reply, self.seq_length = tokenizer, reply, seq_length
        self.reserve = min(MAX_RESERVE, (seq_length or 0) // 4) if reserve is None else reserve
        self._opening: list[dict[str, Any]] = []
        if system is not None or tools:
            turn = {"role": "system", "content": TOOLS_PROMPT if system is None else system}
            self._opening = [turn | ({"tools": tools} if tools else {})]
        self._busy = threading.Lock()  # held while a reply is being generated
        self._stop = threading.Event()
        self._state = threading.Lock()  # history and pending change together
        self._forget()

    def _forget(self) -> None:
        self.history: list[dict[str, Any]] = list(self._opening)
        self._pending: tuple[dict[str, Any], str] | None = None  # the message being answered, the answer so far
        self.last_prompt_ids: list[int] = []
        self.last_reply_ids: list[int] = []
        self.last_reply: str | dict[str, Any] = ""
        self.left_out = 0
        self._token_times = (0.0, 0.0)  # seconds; first and last token of the last reply

    @property
    def busy(self) -> bool:
        """Whether a reply is being generated."""
        return self._busy.locked()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The history, and while a reply is being generated also its question and what has been said so far."""
        with self._state:
            history, pending = self.history, self._pending
        if pending is None:
            return list(history)
        message, said = pending
        return process_response(said, [*history, message])[1]

    @property
    def tokens_per_second(self) -> float:
        """Speed of the last reply, counted from its first token on; 0.0 before the second."""
        first, last = self._token_times
        return (len(self.last_reply_ids) - 1) / (last - first) if last > first else 0.0

    def stop(self) -> None:
        """End the reply after its next token, from any thread; what was said so far is kept."""
        self._stop.set()

    def clear(self) -> None:
        """Forget the conversation but for the system turn it was opened with.

        Raises Glm3KitError while a reply is being generated.
        """
        self._claim("cannot clear the conversation")
        try:
            self._forget()
        finally:
            self._busy.release()

    def transcript(self) -> str:
        """The history as JSON text."""
        return json.dumps(self.history, ensure_ascii=False, indent=2)

    def _claim(self, what: str) -> None:
        if not self._busy.acquire(blocking=False):
            raise Glm3KitError(
                f"{what}: this session is still generating a reply; "
                "read its stream to the end, close it, or call session.stop() first"
            )

    def _prompt(self, message: dict[str, Any]) -> tuple[list[int], int]:
        """Ids of a prompt that fits into the window, and how many messages of the history it leaves out."""
        history, role = self.history, message["role"]

        def prompt(told: list[dict[str, Any]]) -> list[int]:
            return self.tokenizer.build_chat_input(message["content"], history=told, role=role)["input_ids"][0].tolist()

        ids = prompt(history)
        room = len(ids) if self.seq_length is None else self.seq_length - self.reserve
        if len(ids) <= room:
            return ids, 0

        opening = 1 if history and history[0]["role"] == "system" else 0
        # a prompt may begin where somebody asks; tool calls, observations and answers belong to the question before
        starts = [i for i in range(opening, len(history)) if i == opening or history[i]["role"] in ("user", "system")]
        if role != "observation" or not starts:  # an observation means nothing without its tool call
            starts.append(len(history))
        # what fits still fits with less; if nothing fits, the shortest is left to be reported
        shortest = len(starts) - 1
        first = bisect_left(
            starts, True, hi=shortest, key=lambda start: len(prompt(history[:opening] + history[start:])) <= room
        )
        ids = prompt(history[:opening] + history[starts[first] :])
        if len(ids) > room:
            company = " together with the system turn" * opening
            company += " and the tool call that it answers" * (role == "observation")
            raise PromptError(
                f"the newest message ({role}) takes {len(ids)} tokens as a prompt{company}, but at most {room} fit "
                f"(seq_length {self.seq_length}, {self.reserve} of it kept free for the reply); shorten the message "
                "or the system turn, or use a larger seq_length"
            )
        return ids, starts[first] - opening

    def stream(self, text: Any, role: str = "user") -> Iterator[str]:
        """Say something as `role` and yield the reply's text while it is generated, without white space around it.

        text: a string; an observation may also be what a tool returned, which is shown to the model as JSON.
        role: "user", "system" or "observation". The reply ends at one of the tokenizer's stop ids, when the window is
        full, or after `stop()`. Then message and reply are appended to the history together; leaving the loop early
        keeps what was said so far, an exception in `reply` leaves the history as it was.
        Raises PromptError for a message that cannot be sent, Glm3KitError while another reply is being generated.
        """
        if role not in ROLES:
            raise PromptError(f"role {role!r} cannot speak to the model; expected one of {', '.join(ROLES)}")
        turn = self._turn({"role": role, "content": text})
        next(turn)  # up to its empty first yield: what is wrong with the message shows here, not at the first token
        return turn

    def ask(self, text: Any, role: str = "user") -> str | dict[str, Any]:
        """Say something as `role` and return the whole reply: text, or the dict that process_response makes of a call.

        Arguments and errors as for `stream`.
        """
        for _ in self.stream(text, role):
            pass
        return self.last_reply

    def _turn(self, message: dict[str, Any]) -> Iterator[str]:
        self._claim("cannot start another reply")
        try:
            self._stop.clear()
            self.last_prompt_ids, self.left_out = self._prompt(message)
            self.last_reply_ids, self._token_times = [], (0.0, 0.0)
            self._pending = message, ""
            try:
                yield ""
                yield from self._generate(message)
            except GeneratorExit:  # the reader has left the loop
                if self.last_reply_ids:
                    self._append(message)
                raise
            self._append(message)
        finally:
            self._pending = None
            self._busy.release()

    def _generate(self, message: dict[str, Any]) -> Iterator[str]:
        """Yield the reply's text; the whole of it, with its white space and part marks, grows in `_pending`."""
        assistant = self.tokenizer.role_id("assistant")
        said, told, text = "", 0, TextStream(self.tokenizer)
        source = iter(self.reply(list(self.last_prompt_ids)))
        try:
            for token in self._until_stop(source):
                if token == assistant:  # another part of the same reply begins
                    said += text.finish() + ASSISTANT
                    text = TextStream(self.tokenizer)
                else:
                    said += text.push(token)
                self._pending = message, said
                shown = said.replace(ASSISTANT, "\n").strip()
                if len(shown) > told:
                    yield shown[told:]
                    told = len(shown)
        finally:
            said += text.finish()
            self._pending = message, said
            if hasattr(source, "close"):
                source.close()  # a generator that holds a model's cache lets go of it now, not when it is collected
        rest = said.replace(ASSISTANT, "\n").strip()[told:]
        if rest:
            yield rest

    def _until_stop(self, source: Iterator[int]) -> Iterator[int]:
        for token in map(int, source):
            if token in self.tokenizer.stop_ids:
                return
            now = time.perf_counter()
            self._token_times = self._token_times[0] or now, now
            self.last_reply_ids.append(token)
            yield token
            used = len(self.last_prompt_ids) + len(self.last_reply_ids)
            if self._stop.is_set() or (self.seq_length is not None and used >= self.seq_length):
                return

    def _append(self, message: dict[str, Any]) -> None:
        assert self._pending is not None
        self.last_reply, history = process_response(self._pending[1], [*self.history, message])
        with self._state:
            self.history, self._pending = history, None
