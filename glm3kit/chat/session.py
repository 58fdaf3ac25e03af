"""A conversation with a ChatGLM3: roles, tools, and text that appears while the model speaks.

The form of the history and of tool calls is that of the published ChatGLM3 demos. The model is any callable from the
ids of a prompt to an iterator of generated ids, so that a test can script it:

    session = ChatSession(tokenizer, lambda ids: net.stream(ids), seq_length=config.seq_length)
    for text in session.stream("你好"): print(text, end="", flush=True)
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from glm3kit.chat import interpreter
from glm3kit.chat.history import Conversation, History, fit_prompt
from glm3kit.chat.tools import TIMEOUT_S, Tool, cut, run_call
from glm3kit.errors import Glm3KitError, PromptError
from glm3kit.text.answers import ASSISTANT, answer_texts, code_block, last_call, process_response
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

SPEAKERS = ("user", "system", "observation")  # the roles that speak to the model; it answers as "assistant"
MAX_RESERVE = 256  # tokens; MindFormers' max_decode_length
MAX_ROUNDS = 5  # tool calls that are answered one after the other before a person is asked
INTERPRETER = "interpreter"  # the published model names no tool but this when it answers with code

Approve = Callable[[dict[str, Any]], bool]


class ChatSession(Conversation):
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

    def __init__(self, tokenizer: ChatGLM3Tokenizer, reply: Callable[..., Iterable[int]], system: str | None = None,
                 tools: Sequence[Tool | Any] | None = None, seq_length: int | None = None, reserve: int | None = None,
                 sampling: Mapping[str, Any] | None = None):
        self.tokenizer, self.reply, self.seq_length = tokenizer, reply, seq_length
        self.reserve = min(MAX_RESERVE, (seq_length or 0) // 4) if reserve is None else reserve
        self.sampling = None if sampling is None else dict(sampling)
        registered = [item for item in tools or [] if isinstance(item, Tool)]
        self.functions = {item.name: item for item in registered}
        if len(self.functions) < len(registered):
            raise PromptError(f"two tools have one name: {', '.join(item.name for item in registered)}; rename one")
        self.ask_first = False  # see set_ask_first
        super().__init__(system, [item.to_dict() if isinstance(item, Tool) else item for item in tools or []])

    def _begin(self, history: Sequence[dict[str, Any]]) -> None:
        super()._begin(history)
        self._pending: tuple[History, str] | None = None  # up to the message being answered; the answer
        self._counted: History | None = None  # the history that last_prompt_ids and last_reply_ids end
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
    def progress(self) -> tuple[History, History]:
        """The messages that stand, the one being answered included, and the parts of the reply so far."""
        pending = self._pending
        if pending is None:
            return list(self.history), []
        said = process_response(pending[1], pending[0])[1]
        return said[:len(pending[0])], said[len(pending[0]):]

    @property
    def messages(self) -> History:
        """The history, and while a reply is being generated also its question and what has been said so far."""
        standing, growing = self.progress
        return standing + growing

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
        return len(self.tokenizer.chat_ids(self.history)) if self.history else 0

    @property
    def pending_code(self) -> str | None:
        """Code with which the model answered last, for the user to run: its message is named `interpreter`."""
        call = last_call(self.history)
        is_code = call is not None and call["name"] == INTERPRETER and INTERPRETER not in self.functions
        return code_block(self.history[-1]["content"]) if is_code else None

    @property
    def pending_call(self) -> dict[str, Any] | None:
        """The tool call that the newest message is, as process_response reads it; None if it is none."""
        return last_call(self.history) if self.pending_code is None else None

    def can_run(self, call: Mapping[str, Any]) -> bool:
        """Whether `run_tools` would answer a call; else you do, as observation."""
        described = {item.get("name") for item in self.tools if isinstance(item, Mapping)} - set(self.functions)
        return bool(self.functions) and call["name"] not in described

    # how it goes on

    def set_ask_first(self, ask_first: bool) -> None:
        """Whether whoever shows the session asks a person before a tool is run."""
        self.ask_first = ask_first
        self._tell()

    def set_sampling(self, **options: Any) -> None:
        """Change options of generation, from the next reply on."""
        with self._change("cannot change the sampling"):
            self.sampling = (self.sampling or {}) | options

    # talking to the model: each way yields the reply's text, and each has a partner that returns the whole reply

    def stream(self, text: Any, role: str = "user", at: int | None = None) -> Iterator[str]:
        """Say something as `role` and yield the reply's text while it is generated, without white space around it.

        text: a string; an observation may also be what a tool returned, which is shown to the model as JSON.
        role: "user", "system" or "observation". The reply ends at one of the tokenizer's stop ids, when the window is
        full, or after `stop()`. Then message and reply are appended to the history together; leaving the loop early
        keeps what was said so far, an exception in `reply` leaves the history as it was.
        at: say it instead of this message of the history, and drop all after it; default: after the last one.
        Raises PromptError for a message that cannot be sent, Glm3KitError while another reply is being generated.
        """
        if role not in SPEAKERS:
            raise PromptError(f"role {role!r} cannot speak to the model; expected one of {', '.join(SPEAKERS)}")
        if at is not None and not 0 <= at <= len(self.history):
            raise PromptError(f"there is no message {at} to go on from; the history has {len(self.history)}")
        return self._hold("cannot start another reply", self._turn({"role": role, "content": text}, at))

    def ask(self, text: Any, role: str = "user") -> str | dict[str, Any]:
        """`stream`, read to its end: text, or the dict that process_response makes of a call."""
        return self._whole(self.stream(text, role))

    def stream_again(self) -> Iterator[str]:
        """Say the newest message again and yield another reply, which takes the place of the last; see `stream`."""
        at = self._spoken()
        return self.stream(self.history[at]["content"], self.history[at]["role"], at)

    def regenerate(self) -> str | dict[str, Any]:
        """`stream_again`, read to its end."""
        return self._whole(self.stream_again())

    def stream_tools(self, approve: Approve | None = None, rounds: int = MAX_ROUNDS,
                     timeout_s: float = TIMEOUT_S) -> Iterator[str]:
        """While the newest message calls a tool: run it, say its result as observation, and yield the reply's text.

        What goes wrong becomes an observation that says so, see run_call: the model may try again.
        approve: is shown each call, {"name", "parameters"}; False leaves it unanswered. Default: all are run.
        rounds: how many calls are answered; after that the last one is left, not run.
        timeout_s: of one call; a tool that takes longer is abandoned, see glm3kit.chat.tools.
        A call of a tool that is only described is left to you: ask(result, role="observation").
        """
        return self._hold("cannot run a tool", self._answer_calls(approve, rounds, timeout_s))

    def run_tools(self, approve: Approve | None = None, rounds: int = MAX_ROUNDS,
                  timeout_s: float = TIMEOUT_S) -> str | dict[str, Any]:
        """`stream_tools`, read to its end: the last reply, or the call that was left."""
        return self._whole(self.stream_tools(approve, rounds, timeout_s))

    def insert_cell(self) -> None:
        """Put the code of the last answer into a new cell below the running one. The user reads it, and runs it.

        Raises Glm3KitError if the last answer is no code, or outside of a notebook.
        """
        interpreter.insert_cell(self._code())

    def stream_cell(self) -> Iterator[str]:
        """Say as observation what the cell of the last answer's code has printed, and yield the reply as `stream`.

        Raises Glm3KitError if the last answer is no code, or no cell has been run since.
        """
        return self.stream(cut(interpreter.last_run(self._code())), "observation")

    def observe_cell(self) -> str | dict[str, Any]:
        """`stream_cell`, read to its end."""
        return self._whole(self.stream_cell())

    def _code(self) -> str:
        code = self.pending_code
        if code is None:
            raise Glm3KitError(f"the last answer is no code (its message is not named {INTERPRETER!r})")
        return code

    def _whole(self, deltas: Iterator[str]) -> str | dict[str, Any]:
        for _ in deltas:
            pass
        return self.last_reply

    def _hold(self, what: str, steps: Iterator[str]) -> Iterator[str]:
        """Take some steps while nobody else may. The first is taken at once: what is wrong shows here."""
        def held() -> Iterator[str]:
            with self._change(what):
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
            self._tell()
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

    def _answer_calls(self, approve: Approve | None, rounds: int, timeout_s: float) -> Iterator[str]:
        yield ""
        for _ in range(rounds):
            call = self.pending_call
            if call is None or not self.can_run(call) or (approve is not None and not approve(call)):
                return
            self.running_tool = call["name"]
            self._tell()
            try:
                observation = run_call(self.functions, call, timeout_s, self._stop.is_set)
            except InterruptedError:  # by `stop`: the call stays unanswered
                return
            self.running_tool = None
            yield from self._turn({"role": "observation", "content": observation})
            if self.stopped:
                return

    def _generate(self, asked: History) -> Iterator[str]:
        """Yield the reply's text; the whole of it, with its white space and part marks, grows in `_pending`."""
        source, told = iter(self.reply(list(self.last_prompt_ids), **(self.sampling or {}))), 0
        try:
            for said in answer_texts(self.tokenizer, self._until_stop(source)):
                self._pending = asked, said
                self._tell()
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
            if self.stopped or (self.seq_length is not None and used >= self.seq_length):
                return

    def _append(self, asked: History) -> None:
        assert self._pending is not None
        self.last_reply, history = process_response(self._pending[1], asked)
        for said in history[len(asked):]:  # a call's content was encoded by itself in training: this space is none
            said["content"] = said["content"].removeprefix(" ")
        self.history = history
        self._pending = None  # in this order: whoever sees no pending reply any more sees it in the history
        self._counted = list(history)
        if self.pending_code is not None:
            interpreter.watch()  # from now on, what the user's cells print is kept
