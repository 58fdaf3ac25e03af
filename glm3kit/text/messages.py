"""Conversations to ids with a loss mask, and a model's answer back to a message or a tool call.

Knowledge: THUDM/ChatGLM3, `finetune_chatmodel_demo/preprocess_utils.py` (conversations, tool turns, loss mask), and
MindFormers 1.1's document of GLM3 (process_response). A model's answer is a stranger's text: it is read as literals and
never evaluated.

    python -c "from glm3kit.text.messages import parse_tool_call as p; p('tool_call(city=\\"Beijing\\", days=3)')"
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm3kit.errors import PromptError
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"
TURNS = ("system", "user", "assistant", "tool", "observation")  # roles in a training record
ASSISTANT = "<|assistant|>"  # between the parts of one answer
MAX_TOOL_CALL = 100_000  # characters; nothing longer is parsed
# A quoted string (an open one reaches to the end), a bracket or a comma: what arguments are split by.
_ARGUMENT_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*(?:'|$)|"(?:\\.|[^"\\])*(?:"|$)|[()\[\]{},]""", re.DOTALL)
# Any name, also those that Python does not take: ToolAlpaca has `from=` and `x-api-key=`.
_ARGUMENT = re.compile(r"""([^\s=,'"()\[\]{}*]+)\s*=\s*(.+)""", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, what, and whether the predictions made in it count in training.

    metadata: in an assistant's turn, the name of the tool that it calls.
    tools: in a system turn, descriptions of the tools that there are.
    """

    role: str
    content: str
    metadata: str = ""
    tools: Any = None
    loss: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The message as an entry of a history."""
        entry: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.role == "assistant":
            entry["metadata"] = self.metadata
        if self.tools is not None:
            entry["tools"] = self.tools
        return entry


def chat_ids(
    messages: Sequence[Message | Mapping[str, Any]], tok: ChatGLM3Tokenizer, tools_indent: int | None = 4
) -> list[int]:
    """The prompt that asks for an answer to `messages`: `[gMASK] sop`, each turn, then `<|assistant|>` alone.

    Raises PromptError for an unknown role or a malformed message.
    """
    ids = list(tok.prefix_ids)
    for message in messages:
        ids += tok.message_ids(message.to_dict() if isinstance(message, Message) else message, tools_indent)
    return [*ids, tok.role_id("assistant")]


def _field(turn: Mapping[str, Any], key: str, kind: type, article_kind: str) -> Any:
    if not isinstance(turn.get(key), kind):
        got = f"{turn[key]!r:.80}" if key in turn else "nothing"
        raise PromptError(f"the {turn['role']} turn's {key!r} is not {article_kind}: got {got}")
    return turn[key]


def as_text(value: Any) -> str:
    """What a tool returned, as the model reads it: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _turn_messages(turn: Any) -> list[Message]:
    """Messages of one turn of a record: one, or two for a tool turn (the call and its result)."""
    role = turn.get("role") if isinstance(turn, Mapping) else None
    if role not in TURNS:
        found = f"unknown role {role!r}" if isinstance(turn, Mapping) else f"not a dict: got {str(turn)[:40]!r}"
        raise PromptError(f"{found}: expected a dict with one of the roles {', '.join(TURNS)}")
    loss = turn.get("loss", True)
    if not isinstance(loss, bool):
        raise PromptError(f"the {role} turn's 'loss' is not true or false: got {loss!r}")
    if role == "tool":
        if "observation" not in turn:
            raise PromptError("the tool turn's 'observation' is missing: expected the tool's result")
        name, parameters = _field(turn, "name", str, "a tool's name"), _field(turn, "parameters", dict, "a dict")
        arguments = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
        call = f"```python\ntool_call({arguments})\n```"
        return [Message("assistant", call, metadata=name, loss=loss),
                Message("observation", as_text(turn["observation"]))]
    if role == "observation" and turn.get("content") is not None:
        return [Message(role, as_text(turn["content"]))]
    content = _field(turn, "content", str, "a text")
    if role != "assistant":
        return [Message(role, content)]
    if not content.strip():
        raise PromptError("the assistant turn is blank; write an answer or remove the record")
    return [Message(role, content, metadata=turn.get("metadata") or "", loss=loss)]


def conversation_messages(record: Mapping[str, Any]) -> list[Message]:
    """Messages of a training record, its tools as a system turn before the others.

    record: "conversations", a list of turns (role, content, and "loss": false where an answer shall not be learnt; a
        tool turn has name, parameters and observation instead), and optionally "tools".
    Raises PromptError, with the number of the turn, for a malformed one and for a conversation without an answer at
    its end.
    """
    turns = record.get("conversations") if isinstance(record, Mapping) else None
    if not isinstance(turns, list) or not turns:
        raise PromptError(f"'conversations' is not a list of turns: got {str(turns)[:40]!r}")
    messages = []
    if record.get("tools") is not None:
        messages.append(Message("system", TOOLS_PROMPT, tools=record["tools"]))
    for number, turn in enumerate(turns, 1):
        try:
            messages += _turn_messages(turn)
        except PromptError as err:
            raise PromptError(f"turn {number} of {len(turns)}: {err}") from err
    if turns[-1]["role"] in ("system", "user"):
        raise PromptError(f"the conversation ends with a {turns[-1]['role']} turn: turn {len(turns)} has no answer to "
                          "learn; add the assistant's answer or remove that turn")
    return messages


def conversation_ids(
    record: Mapping[str, Any], tok: ChatGLM3Tokenizer, tools_indent: int | None = 4
) -> tuple[list[int], list[int]]:
    """Ids of a training record and, for each, 1 if the prediction made there counts in the loss.

    tools_indent: indentation of the tools' JSON; 4 is the chat prompt's, None MindFormers'.
    Raises PromptError for a malformed record.
    Example: an assistant's turn of n ids, its role's id included, has n ones.
    """
    ids, mask = list(tok.prefix_ids), [0] * len(tok.prefix_ids)
    for message in conversation_messages(record):
        turn = tok.message_ids(message.to_dict(), tools_indent)
        ids += turn
        mask += [int(message.loss)] * len(turn)
    return [*ids, tok.eos_id], [*mask, 0]


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
            parts.append(text[start : token.start()])
            start = token.end()
    return [*parts, text[start:]] if text[start:].strip() else parts


def code_block(text: str) -> str:
    """What stands between the first line of three backquotes and the next; all of a text without them."""
    lines = text.strip().split("\n")
    fences = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    if fences:
        lines = lines[fences[0] + 1 : fences[1] if len(fences) > 1 else None]
    return "\n".join(lines).rstrip().removesuffix("```").rstrip().strip("\n")


def _read_tool_call(text: str) -> dict[str, Any]:
    """Parameters of a tool call; PromptError says why a text is none."""
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
    for argument in _split_arguments(code[call.end() : -1]):
        match = _ARGUMENT.fullmatch(argument.strip())
        if not match:
            raise PromptError(f"argument {argument.strip()[:60]!r} is not of the form name=value")
        name, value = match.groups()
        if name in parameters:
            raise PromptError(f"argument {name!r} is given twice")
        parameters[name] = _literal(value, ast.literal_eval, json.loads)  # json: true, false, null
    return parameters


def parse_tool_call(text: str) -> dict[str, Any] | None:
    """Parameters of `tool_call(name=literal, ...)` or of a JSON object, fenced or bare; None for any other text.

    Example: "```python\\ntool_call(symbol='10111')\\n```" -> {"symbol": "10111"}
    """
    try:
        return _read_tool_call(text)
    except PromptError:
        return None


def has_tools(history: Sequence[Any]) -> bool:
    """Whether the first message of a history is a system turn with tools: then a part with a name is a call."""
    first = history[0] if history and isinstance(history[0], Mapping) else {}
    return first.get("role") == "system" and "tools" in first


def last_name(history: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Name and text of the newest message if it names a tool or the like; else two empty texts."""
    last = history[-1] if history else {}
    name = (last.get("metadata") or "").strip() if last.get("role") == "assistant" else ""
    return (name, last["content"]) if name else ("", "")


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
        return {"name": name, "parameters": _read_tool_call(text)}
    except PromptError as err:
        return {"name": name, "content": text, "reason": f"no tool call: {err}"}


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
