"""A conversation without a model: which of its turns fit into a window, and how it is changed, one change at a time.

The system turn at the beginning and the newest message always stay in a prompt. The oldest turns leave it first, and a
question leaves together with its tool calls, observations and answers: a prompt begins where somebody asks.

    ids, left_out = fit_prompt(tokenizer, history, {"role": "user", "content": "你好"}, seq_length=2048, reserve=256)
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from glm3kit.chat import transcript
from glm3kit.errors import Glm3KitError, PromptError
from glm3kit.text.messages import TOOLS_PROMPT, Message
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

History = list[dict[str, Any]]  # messages: {"role", "content"[, "metadata", "tools"]}


def fit_prompt(tokenizer: ChatGLM3Tokenizer, history: History, message: dict[str, Any], seq_length: int | None,
               reserve: int) -> tuple[list[int], int]:
    """Ids of a prompt of at most seq_length - reserve tokens, and how many messages of the history it leaves out.

    message: what is said to the model now, a dict with role and content.
    seq_length: the window in tokens, prompt and reply together; None: no limit.
    reserve: tokens of it that are kept free for the reply.
    Raises PromptError if the shortest prompt there is does not fit.
    """
    ids = tokenizer.chat_ids([*history, message])
    room = len(ids) if seq_length is None else seq_length - reserve
    if len(ids) <= room:
        return ids, 0

    opening = 1 if history and history[0]["role"] == "system" else 0
    starts = [i for i in range(opening, len(history)) if i == opening or history[i]["role"] in ("user", "system")]
    if message["role"] != "observation" or not starts:  # an observation means nothing without its tool call
        starts.append(len(history))

    def prompt(start: int) -> list[int]:
        return tokenizer.chat_ids([*history[:opening], *history[start:], message])

    # what fits still fits with less; if nothing fits, the shortest is left to be reported
    first = bisect_left(starts, True, hi=len(starts) - 1, key=lambda start: len(prompt(start)) <= room)
    ids = prompt(starts[first])
    if len(ids) > room:
        company = " together with the system turn" if opening else ""
        if message["role"] == "observation":
            company += " and the tool call that it answers"
        raise PromptError(f"the newest message ({message['role']}) takes {len(ids)} tokens as a prompt{company}, but "
                          f"at most {room} fit (seq_length {seq_length}, {reserve} of it kept free for the reply); "
                          "shorten the message or the system turn, or use a larger seq_length")
    return ids, starts[first] - opening


class Conversation:
    """A history, its opening, and whoever watches it; it is changed by one at a time, in any thread.

    system: text of a system turn that opens it. tools: descriptions, which the system turn tells the model.
    history: may be assigned while nothing else changes it.
    """

    def __init__(self, system: str | None, tools: list[Any]):
        self.tools = tools
        self._changing = threading.Lock()  # held by a reply or a change; another thread may end it than began it
        self._stop = threading.Event()
        self._observers: list[Callable[[], None]] = []
        self._opening = self._system_turn(system)
        self._begin(self._opening)

    def _system_turn(self, text: str | None) -> History:
        if text is None and not self.tools:
            return []
        return [Message("system", TOOLS_PROMPT if text is None else text, tools=self.tools or None).to_dict()]

    def _begin(self, history: Sequence[dict[str, Any]]) -> None:
        """Go on from another history."""
        self.history: History = list(history)

    @property
    def busy(self) -> bool:
        """Whether a reply is being generated or a tool runs."""
        return self._changing.locked()

    @property
    def stopped(self) -> bool:
        """Whether `stop` has ended the last reply, or the one being generated will end so."""
        return self._stop.is_set()

    @property
    def system(self) -> str:
        """The text of the system turn at the beginning; "" if there is none."""
        return self.history[0]["content"] if self.history and self.history[0]["role"] == "system" else ""

    def observe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed`, from any thread, after every change; return a function that ends that."""
        self._observers.append(changed)
        return lambda: self._observers.remove(changed)

    def _tell(self) -> None:
        for changed in list(self._observers):
            changed()

    @contextmanager
    def _change(self, what: str) -> Iterator[None]:
        """Change something, alone; the observers are told at the end. what: begins the message of a refusal."""
        if not self._changing.acquire(blocking=False):
            raise Glm3KitError(f"{what}: this session is still generating a reply; "
                               "read its stream to the end, close it, or call session.stop() first")
        self._stop.clear()
        try:
            yield
        finally:
            self._changing.release()
            self._tell()

    def stop(self) -> None:
        """End the reply after its next token, or the waiting for a tool, from any thread; what was said is kept."""
        self._stop.set()

    def clear(self) -> None:
        """Forget the conversation but for the system turn it was opened with.

        Raises Glm3KitError while a reply is being generated, as all changes do.
        """
        with self._change("cannot clear the conversation"):
            self._begin(self._opening)

    def set_system(self, text: str) -> None:
        """Put another text into the system turn at the beginning; the conversation goes on.

        "" takes the turn away, or with tools gives it its default text.
        """
        with self._change("cannot change the system turn"):
            self._opening = self._system_turn(text.strip() or None)
            rest = self.history[1:] if self.history and self.history[0]["role"] == "system" else self.history
            self._begin(self._opening + rest)

    def _spoken(self) -> int:
        """Where the newest message stands that was said to the model; the opening does not count."""
        opening = len(self._opening) if self.history[:len(self._opening)] == self._opening else 0
        for i in range(len(self.history) - 1, opening - 1, -1):
            if self.history[i]["role"] != "assistant":
                return i
        raise Glm3KitError("nothing has been said yet")

    def undo(self) -> dict[str, Any]:
        """Take back the newest message to the model and what was answered; return that message."""
        with self._change("cannot undo"):
            at = self._spoken()
            taken = self.history[at]
            self._begin(self.history[:at])
            return taken

    def rewrite(self, at: int, text: str) -> None:
        """Let an answer have said something else; what came after it is dropped. at: its place in the history."""
        with self._change("cannot rewrite an answer"):
            if not 0 <= at < len(self.history) or self.history[at]["role"] != "assistant":
                raise PromptError(f"message {at} is no answer; to say something else, use stream(text, role, at={at})")
            self._begin([*self.history[:at], self.history[at] | {"content": text}])

    def load(self, text: str) -> None:
        """Go on from a transcript, JSON or Markdown. Raises DataError for a text that is none."""
        history = transcript.read_transcript(text)
        with self._change("cannot load a conversation"):
            self._begin(history)

    def transcript(self, form: str = "json") -> str:
        """The history as a text: "json", or "md" for Markdown."""
        return {"json": transcript.to_json, "md": transcript.to_markdown}[form](self.history)
