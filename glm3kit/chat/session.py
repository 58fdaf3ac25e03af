"""A conversation with a ChatGLM3: history, roles, tools, and text that appears while the model speaks.

The form of the history and of tool calls is that of the published ChatGLM3 demos. The model is any callable from the
ids of a prompt to an iterator of generated ids, so that a test can script it:

    session = ChatSession(tokenizer, lambda ids: net.stream(ids), seq_length=config.seq_length)
    for text in session.stream("你好"): print(text, end="", flush=True)
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from glm3kit.chat import interpreter as cells
from glm3kit.chat import transcript
from glm3kit.chat.floor import Floor
from glm3kit.chat.history import fit_prompt
from glm3kit.chat.tools import TIMEOUT_S, Tool, cut, run_call
from glm3kit.errors import Glm3KitError, PromptError
from glm3kit.text.answers import answer_texts
from glm3kit.text.messages import (
    ASSISTANT,
    TOOLS_PROMPT,
    answer_content,
    chat_ids,
    code_block,
    has_tools,
    last_name,
    process_response,
)
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

ROLES = ("user", "system", "observation")  # those that speak to the model; it answers as "assistant"
MAX_RESERVE = 256  # tokens; MindFormers' max_decode_length
MAX_ROUNDS = 5  # tool calls that are answered one after the other before a person is asked
INTERPRETER = "interpreter"  # the published model names no tool but this when it answers with code


class ChatSession:
    """A conversation: its history, and the reply that is being generated.

    tokenizer: turns messages into ids and ids into text.
    reply: callable from the ids of a prompt to an iterator of generated ids; a stop id may end them.
    system: text of a system turn that opens the conversation.
    tools: functions made with @tool, which `run_tools` runs, or descriptions alone, whose calls you answer yourself
        as observation; the model is shown both in the system turn.
    seq_length: the model's window in tokens, prompt and reply together; None: no limit.
    reserve: tokens of the window kept free for the reply, 256 or a quarter of the window if that is less.
    sampling: options of generation that may be changed later (`session.sampling`); `reply` gets them as keywords.
        None: it gets the ids alone.

    If a prompt would not fit into seq_length - reserve, the oldest turns are left out of it (see glm3kit.chat.history);
    `history` keeps everything.

    history: list of {"role", "content"[, "metadata", "tools"]}; may be assigned while no reply is being generated.
    last_prompt_ids, last_reply_ids: ids of the last turn; left_out: how many messages its prompt left out.
    last_reply: what `ask` returned last.
    error, unsent: what ended the last reply before its time, and the message that was not answered; None if nothing.
    """

    def __init__(
        self,
        tokenizer: ChatGLM3Tokenizer,
        reply: Callable[..., Iterable[int]],
        system: str | None = None,
        tools: Sequence[Tool | Any] | None = None,
        seq_length: int | None = None,
        reserve: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ):
        self.tokenizer, self.reply, self.seq_length = tokenizer, reply, seq_length
        self.reserve = min(MAX_RESERVE, (seq_length or 0) // 4) if reserve is None else reserve
        self.sampling = None if sampling is None else dict(sampling)
        registered = [item for item in tools or [] if isinstance(item, Tool)]
        self.functions = {item.name: item for item in registered}
        if len(self.functions) < len(registered):
            raise PromptError(f"two tools have one name: {', '.join(item.name for item in registered)}; rename one")
        self.tools = [item.to_dict() if isinstance(item, Tool) else item for item in tools or []]
        self._ask_first = False
        self._opening = self._system_turn(system)
        self._floor = Floor()
        self._state = threading.Lock()  # history and pending change together
        self._begin(self._opening)

    def _system_turn(self, text: str | None) -> list[dict[str, Any]]:
        if text is None and not self.tools:
            return []
        turn = {"role": "system", "content": TOOLS_PROMPT if text is None else text}
        return [turn | ({"tools": self.tools} if self.tools else {})]

    def _begin(self, history: Sequence[dict[str, Any]]) -> None:
        """Go on from another history."""
        self.history: list[dict[str, Any]] = list(history)
        self._pending: tuple[list[dict[str, Any]], str] | None = None  # up to the message being answered; the answer
        self._counted: list[dict[str, Any]] | None = None  # the history that last_prompt_ids and last_reply_ids end
        self.last_prompt_ids: list[int] = []
        self.last_reply_ids: list[int] = []
        self.last_reply: str | dict[str, Any] = ""
        self.left_out = 0
        self.error: Exception | None = None
        self.unsent: dict[str, Any] | None = None
        self.running_tool: str | None = None
        self._token_times = (0.0, 0.0)  # seconds; first and last token of the last reply

    # what there is to see

    @property
    def busy(self) -> bool:
        """Whether a reply is being generated or a tool runs."""
        return self._floor.taken

    @property
    def stopped(self) -> bool:
        """Whether `stop` has ended the last reply, or the one being generated will end so."""
        return self._floor.stopped

    @property
    def progress(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The messages that stand, the one being answered included, and the parts of the reply so far."""
        with self._state:
            history, pending = self.history, self._pending
        if pending is None:
            return list(history), []
        said = process_response(pending[1], pending[0])[1]
        return said[: len(pending[0])], said[len(pending[0]) :]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The history, and while a reply is being generated also its question and what has been said so far."""
        standing, growing = self.progress
        return standing + growing

    @property
    def system(self) -> str:
        """The text of the system turn at the beginning; "" if there is none."""
        return self.history[0]["content"] if self.history and self.history[0]["role"] == "system" else ""

    @property
    def tokens_per_second(self) -> float:
        """Speed of the last reply, counted from its first token on; 0.0 before the second."""
        first, last = self._token_times
        return (len(self.last_reply_ids) - 1) / (last - first) if last > first else 0.0

    @property
    def context_used(self) -> int:
        """Tokens of the last prompt and its reply; of all messages where the history was changed since."""
        if self.busy or self._counted == self.history:
            return len(self.last_prompt_ids) + len(self.last_reply_ids)
        return len(chat_ids(self.history, self.tokenizer)) if self.history else 0

    @property
    def pending_code(self) -> str | None:
        """Code with which the model answered last, for the user to run: its message is named `interpreter`."""
        name, text = last_name(self.history)
        return code_block(text) if name == INTERPRETER and name not in self.functions else None

    @property
    def pending_call(self) -> dict[str, Any] | None:
        """The tool call that the newest message is, as process_response reads it; None if it is none."""
        name, text = last_name(self.history)
        content = answer_content(name, text, has_tools(self.history))
        return content if isinstance(content, dict) and self.pending_code is None else None

    def can_run(self, call: Mapping[str, Any]) -> bool:
        """Whether `run_tools` would answer a call; else you do, as observation."""
        described = {item.get("name") for item in self.tools if isinstance(item, Mapping)} - set(self.functions)
        return bool(self.functions) and call["name"] not in described

    def observe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed`, from any thread, after every change; return a function that ends that."""
        return self._floor.observe(changed)

    @property
    def ask_first(self) -> bool:
        """Whether whoever shows the session asks a person before a tool is run; may be assigned."""
        return self._ask_first

    @ask_first.setter
    def ask_first(self, ask_first: bool) -> None:
        self._ask_first = ask_first
        self._floor.tell()

    # changing the conversation without the model

    def stop(self) -> None:
        """End the reply after its next token, or the waiting for a tool, from any thread; what was said is kept."""
        self._floor.stop()

    def clear(self) -> None:
        """Forget the conversation but for the system turn it was opened with.

        Raises Glm3KitError while a reply is being generated, as all changes do.
        """
        with self._floor.take("cannot clear the conversation"):
            self._begin(self._opening)

    def set_system(self, text: str) -> None:
        """Put another text into the system turn at the beginning; the conversation goes on.

        "" takes the turn away, or with tools gives it its default text.
        """
        with self._floor.take("cannot change the system turn"):
            self._opening = self._system_turn(text.strip() or None)
            rest = self.history[1:] if self.history and self.history[0]["role"] == "system" else self.history
            self._begin(self._opening + rest)

    def set_sampling(self, **options: Any) -> None:
        """Change options of generation, from the next reply on."""
        with self._floor.take("cannot change the sampling"):
            self.sampling = (self.sampling or {}) | options

    def _spoken(self) -> int:
        """Where the newest message stands that was said to the model; the opening does not count."""
        opening = len(self._opening) if self.history[: len(self._opening)] == self._opening else 0
        for i in range(len(self.history) - 1, opening - 1, -1):
            if self.history[i]["role"] != "assistant":
                return i
        raise Glm3KitError("nothing has been said yet")

    def undo(self) -> dict[str, Any]:
        """Take back the newest message to the model and what was answered; return that message."""
        with self._floor.take("cannot undo"):
            at = self._spoken()
            taken = self.history[at]
            self._begin(self.history[:at])
            return taken

    def rewrite(self, at: int, text: str) -> None:
        """Let an answer have said something else; what came after it is dropped. at: its place in the history."""
        with self._floor.take("cannot rewrite an answer"):
            if not 0 <= at < len(self.history) or self.history[at]["role"] != "assistant":
                raise PromptError(f"message {at} is no answer; to say something else, use stream(text, role, at={at})")
            self._begin([*self.history[:at], self.history[at] | {"content": text}])

    def load(self, text: str) -> None:
        """Go on from a transcript, JSON or Markdown. Raises DataError for a text that is none."""
        history = transcript.read_transcript(text)
        with self._floor.take("cannot load a conversation"):
            self._begin(history)

    def transcript(self) -> str:
        """The history as JSON text."""
        return transcript.to_json(self.history)

    # talking to the model

    def stream(self, text: Any, role: str = "user", at: int | None = None) -> Iterator[str]:
        """Say something as `role` and yield the reply's text while it is generated, without white space around it.

        text: a string; an observation may also be what a tool returned, which is shown to the model as JSON.
        role: "user", "system" or "observation". The reply ends at one of the tokenizer's stop ids, when the window is
        full, or after `stop()`. Then message and reply are appended to the history together; leaving the loop early
        keeps what was said so far, an exception in `reply` leaves the history as it was.
        at: say it instead of this message of the history, and drop all after it; default: after the last one.
        Raises PromptError for a message that cannot be sent, Glm3KitError while another reply is being generated.
        """
        if role not in ROLES:
            raise PromptError(f"role {role!r} cannot speak to the model; expected one of {', '.join(ROLES)}")
        if at is not None and not 0 <= at <= len(self.history):
            raise PromptError(f"there is no message {at} to go on from; the history has {len(self.history)}")
        return self._hold("cannot start another reply", self._turn({"role": role, "content": text}, at))

    def ask(self, text: Any, role: str = "user") -> str | dict[str, Any]:
        """Say something as `role` and return the whole reply: text, or the dict that process_response makes of a call.

        Arguments and errors as for `stream`.
        """
        return self._whole(self.stream(text, role))

    def _whole(self, deltas: Iterator[str]) -> str | dict[str, Any]:
        for _ in deltas:
            pass
        return self.last_reply

    def stream_again(self) -> Iterator[str]:
        """Say the newest message again and yield another reply, which takes the place of the last; see `stream`."""
        at = self._spoken()
        return self.stream(self.history[at]["content"], self.history[at]["role"], at)

    def regenerate(self) -> str | dict[str, Any]:
        """Say the newest message again and return another reply, which takes the place of the last."""
        return self._whole(self.stream_again())

    def stream_tools(self, approve: Callable[[dict[str, Any]], bool] | None = None, rounds: int = MAX_ROUNDS,
                     timeout_s: float = TIMEOUT_S) -> Iterator[str]:
        """Answer the model's tool calls, and yield the text of its replies to them; arguments as for `run_tools`."""
        return self._hold("cannot run a tool", self._answer_calls(approve, rounds, timeout_s))

    def run_tools(self, approve: Callable[[dict[str, Any]], bool] | None = None, rounds: int = MAX_ROUNDS,
                  timeout_s: float = TIMEOUT_S) -> str | dict[str, Any]:
        """While the newest message calls a tool: run it, and say its result as observation. Return the last reply.

        Arguments are checked against the tool's schema first. An unknown tool, arguments that do not fit, an
        exception and no result in time become an observation that says so: the model may try again.
        approve: is shown each call, {"name", "parameters"}; False leaves it unanswered. Default: all are run.
        rounds: how many calls are answered; after that the last one is returned, not run.
        timeout_s: of one call; a tool that takes longer is abandoned, see glm3kit.chat.tools.
        A call of a tool that is only described is left to you: ask(result, role="observation").
        """
        return self._whole(self.stream_tools(approve, rounds, timeout_s))

    def insert_cell(self) -> None:
        """Put the code of the last answer into a new cell below the running one. The user reads it, and runs it.

        Raises Glm3KitError if the last answer is no code, or outside of a notebook.
        """
        cells.insert_cell(self._code())

    def stream_cell(self) -> Iterator[str]:
        """Say as observation what the cell of the last answer's code has printed, and yield the reply as `stream`.

        Raises Glm3KitError if the last answer is no code, or no cell has been run since.
        """
        return self.stream(cut(cells.last_run(self._code())), "observation")

    def observe_cell(self) -> str | dict[str, Any]:
        """Say as observation what the cell of the last answer's code has printed; return the reply."""
        return self._whole(self.stream_cell())

    def _code(self) -> str:
        code = self.pending_code
        if code is None:
            raise Glm3KitError(f"the last answer is no code (its message is not named {INTERPRETER!r})")
        return code

    def _hold(self, what: str, steps: Iterator[str]) -> Iterator[str]:
        """Take some steps with the session claimed. The first is taken at once: what is wrong shows here."""
        def held() -> Iterator[str]:
            with self._floor.take(what):
                try:
                    self.error = self.unsent = None
                    yield from steps
                except Exception as err:
                    self.error = err
                    raise
                finally:
                    self._pending = self.running_tool = None

        holding = held()
        next(holding)
        return holding

    def _turn(self, message: dict[str, Any], at: int | None = None) -> Iterator[str]:
        history = self.history[:at]
        try:
            self.last_prompt_ids, self.left_out = fit_prompt(
                self.tokenizer, history, message, self.seq_length, self.reserve)
            self.last_reply_ids, self._token_times = [], (0.0, 0.0)
            asked = [*history, message]
            self._pending = asked, ""
            self._floor.tell()
            try:
                yield ""
                yield from self._generate(asked)
            except GeneratorExit:  # the reader has left the loop
                if self.last_reply_ids:
                    self._append(asked)
                raise
        except Exception:
            self.unsent = message
            raise
        self._append(asked)

    def _answer_calls(self, approve: Callable[[dict[str, Any]], bool] | None, rounds: int,
                      timeout_s: float) -> Iterator[str]:
        yield ""
        for _ in range(rounds):
            call = self.pending_call
            if call is None or not self.can_run(call) or (approve is not None and not approve(call)):
                return
            self.running_tool = call["name"]
            self._floor.tell()
            try:
                observation = run_call(self.functions, call, timeout_s, lambda: self._floor.stopped)
            except InterruptedError:  # by `stop`: the call stays unanswered
                return
            self.running_tool = None
            yield from self._turn({"role": "observation", "content": observation})
            if self._floor.stopped:
                return

    def _generate(self, asked: list[dict[str, Any]]) -> Iterator[str]:
        """Yield the reply's text; the whole of it, with its white space and part marks, grows in `_pending`."""
        source, told = iter(self.reply(list(self.last_prompt_ids), **(self.sampling or {}))), 0
        try:
            for said in answer_texts(self.tokenizer, self._until_stop(source)):
                self._pending = asked, said
                self._floor.tell()
                shown = said.replace(ASSISTANT, "\n").strip()
                if len(shown) > told:
                    yield shown[told:]
                    told = len(shown)
        finally:
            if hasattr(source, "close"):
                source.close()  # a generator that holds a model's cache lets go of it now, not when it is collected

    def _until_stop(self, source: Iterator[int]) -> Iterator[int]:
        for token in map(int, source):
            if token in self.tokenizer.stop_ids:
                return
            now = time.perf_counter()
            self._token_times = self._token_times[0] or now, now
            self.last_reply_ids.append(token)
            yield token
            used = len(self.last_prompt_ids) + len(self.last_reply_ids)
            if self._floor.stopped or (self.seq_length is not None and used >= self.seq_length):
                return

    def _append(self, asked: list[dict[str, Any]]) -> None:
        assert self._pending is not None
        self.last_reply, history = process_response(self._pending[1], asked)
        for said in history[len(asked) :]:  # a call's content was encoded by itself in training: this space is none
            said["content"] = said["content"].removeprefix(" ")
        with self._state:
            self.history, self._pending = history, None
        self._counted = list(history)
        if self.pending_code is not None:
            cells.watch()  # from now on, what the user's cells print is kept
