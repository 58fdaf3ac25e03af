"""Ids in, text out; a model's answer back to a message or a tool call.

Knowledge: MindFormers 1.1's document of GLM3 (process_response). A model's answer is a stranger's text: it is read as
literals and never evaluated.

    text = TextStream(tokenizer)
    for token in net.stream(ids): print(text.push(token), end="")

    parse_tool_call("tool_call(city='Beijing', days=3)")  # {"city": "Beijing", "days": 3}
"""

import ast
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from glm3kit.errors import PromptError
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

ASSISTANT = "<|assistant|>"  # between the parts of one answer
MAX_TOOL_CALL = 100_000  # characters; nothing longer is parsed
# A quoted string (an open one reaches to the end), a bracket or a comma: what arguments are split by.
_ARGUMENT_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*(?:'|$)|"(?:\\.|[^"\\])*(?:"|$)|[()\[\]{},]""", re.DOTALL)
# Any name, also those that Python does not take: ToolAlpaca has `from=` and `x-api-key=`.
_ARGUMENT = re.compile(r"""([^\s=,'"()\[\]{}*]+)\s*=\s*(.+)""", re.DOTALL)


def _literal(text: str, *readers: Any) -> Any:
    """The value of a literal by the first reader that takes it; PromptError if none does."""
    for read in readers:
        try:
            with warnings.catch_warnings():  # such as "invalid escape sequence": not the user's mistake
                warnings.simplefilter("ignore")
                return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last two: deep nesting
            continue
    raise PromptError(f"{text[:60]!r} is no literal")


def _split_arguments(text: str) -> list[str]:
    """Split at the commas that are outside of quotes and brackets; one comma at the end is allowed."""
    parts, depth, start = [], 0, 0
    for token in _ARGUMENT_TOKEN.finditer(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token[0], 0)
        if token[0] == "," and depth == 0:
            parts.append(text[start:token.start()])
            start = token.end()
    return [*parts, text[start:]] if text[start:].strip() else parts


def code_block(text: str) -> str:
    """What stands between the first line of three backquotes and the next; all of a text without them."""
    lines = text.strip().split("\n")
    fences = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    if fences:
        lines = lines[fences[0] + 1 : fences[1] if len(fences) > 1 else None]
    return "\n".join(lines).rstrip().removesuffix("```").rstrip().strip("\n")


def parse_tool_call(text: str) -> dict[str, Any]:
    """Parameters of `tool_call(name=literal, ...)` or of a JSON object, fenced or bare.

    Raises PromptError for any other text, with the reason.
    Example: "```python\\ntool_call(symbol='10111')\\n```" -> {"symbol": "10111"}
    """
    if len(text) > MAX_TOOL_CALL:
        raise PromptError(f"{len(text):,} characters, more than {MAX_TOOL_CALL:,}")
    code = code_block(text).strip().removesuffix(";")
    call = re.match(r"tool_call\s*\(", code)
    if not call or not code.endswith(")"):
        value = _literal(code, json.loads, ast.literal_eval)
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise PromptError(f"{code[:60]!r} is neither tool_call(name=value, ...) nor a JSON object")
        return value
    parameters: dict[str, Any] = {}
    for argument in _split_arguments(code[call.end():-1]):
        match = _ARGUMENT.fullmatch(argument.strip())
        if not match:
            raise PromptError(f"argument {argument.strip()[:60]!r} is not of the form name=value")
        name, value = match.groups()
        if name in parameters:
            raise PromptError(f"argument {name!r} is given twice")
        parameters[name] = _literal(value, ast.literal_eval, json.loads)  # json: true, false, null
    return parameters


def has_tools(history: Sequence[Any]) -> bool:
    """Whether the first message of a history is a system turn with tools: then a part with a name is a call."""
    first = history[0] if history and isinstance(history[0], Mapping) else {}
    return first.get("role") == "system" and "tools" in first


def answer_content(metadata: str, text: str, tools: bool) -> str | dict[str, Any]:
    """What one assistant's message says: a text, or the dict of a named part (see process_response).

    tools: whether the conversation has tools.
    """
    name = metadata.strip()
    if not name:
        return text.replace("[[训练时间]]", "2023年")  # the published model writes this mark for its date
    if not tools:
        return {"name": name, "content": text}
    try:
        return {"name": name, "parameters": parse_tool_call(text)}
    except PromptError as err:
        return {"name": name, "content": text, "reason": f"no tool call: {err}"}


def last_call(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the newest message says if it names a tool or the like, as process_response reads it."""
    if not history or history[-1].get("role") != "assistant":
        return None
    content = answer_content(history[-1].get("metadata") or "", history[-1]["content"], has_tools(history))
    return content if isinstance(content, dict) else None


def process_response(output: str, history: Sequence[Any] | None) -> tuple[str | dict[str, Any], list[Any]]:
    """Read a model's answer; return its content and the history with the answer added. Never raises on any text.

    output: the answer, perhaps of several parts between `<|assistant|>`. The first line of a part names a tool, or is
        blank; a part of one line is an answer.
    history: messages so far; left as it came. If the first one is a system turn with tools, a part that names a tool
        is parsed as a call.
    The content is that of the last part: a text; {"name", "parameters"} for a tool call; {"name", "content", "reason"}
    for one that cannot be parsed; {"name", "content"} where there are no tools.
    Example: process_response("\\n 你好", []) -> ("你好", [{"role": "assistant", "metadata": "", "content": "你好"}])
    """
    known = history if isinstance(history, list | tuple) else []
    messages = [dict(message) if isinstance(message, Mapping) else message for message in known]
    tools = has_tools(messages)
    content: str | dict[str, Any] = ""
    for part in [part for part in output.split(ASSISTANT) if part.strip() or "\n" in part] or [""]:
        head, _, body = part.partition("\n") if "\n" in part else ("", "", part)
        text = body if head.strip() else body.strip()
        messages.append({"role": "assistant", "metadata": head, "content": text})
        content = answer_content(head, text, tools)
    return content, messages


class TextStream:
    """Ids in, text out: one id at a time, and never half of a character.

    A character may be spread over several byte pieces. Until it is whole its text ends with U+FFFD and is held back.
    Only the last few ids are decoded again: those of the last visible text are the context that keeps spaces right.
    Example: the pieces <0xF0> <0x9F> <0x8C> <0xB8> -> "", "", "", "🌸".
    """

    def __init__(self, tokenizer: ChatGLM3Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._held: list[int] = []  # ids that have not been told

    def push(self, token: int) -> str:
        """Take one id; return the text that has become certain, often none."""
        self._held.append(token)
        return "" if self._text(self._context + self._held).endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """Return what is still held back, broken characters as U+FFFD."""
        news = self._text(self._context + self._held)[len(self._text(self._context)):]
        # Spaces alone are no context: a decoder drops the first space of a text.
        self._context = self._held if news.strip() else self._context + self._held
        self._held = []
        return news

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, errors="ignore")  # an untrained model says anything


def answer_texts(tokenizer: ChatGLM3Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """All of an answer's text after each of its ids, as process_response reads it: `<|assistant|>` between its parts.

    At the end once more, with what was held back as part of a character.
    """
    assistant = tokenizer.role_id("assistant")
    said, text = "", TextStream(tokenizer)
    for token in tokens:
        if token == assistant:  # another part of the same answer begins
            said += text.finish() + ASSISTANT
            text = TextStream(tokenizer)
        else:
            said += text.push(token)
        yield said
    yield said + text.finish()
