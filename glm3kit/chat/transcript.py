"""A conversation as a text: JSON, as sessions and training data have it, or Markdown, for people. Both are read back.

In Markdown a message is a heading of its role, a blank line and the content. A line of a content that would read as
one of ours gets a backslash in front, which Markdown does not show.

    print(to_markdown(session.history))
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm3kit.errors import DataError
from glm3kit.text.messages import Message
from glm3kit.text.tokenizer import ROLES, as_text, check_text

_HEADING = re.compile(rf"^## ({'|'.join(ROLES)})(?: · (.*))?$")
_TOOLS = "```json tools"
_OURS = re.compile(rf"^\\*(## |{_TOOLS})")  # a line that is one of ours, or has backslashes in front of one
_FORM = 'a list of messages as {"role": "user", "content": "..."}'


def to_json(history: Sequence[Mapping[str, Any]]) -> str:
    """A history as JSON text."""
    return json.dumps(history, ensure_ascii=False, indent=2)


def to_markdown(history: Sequence[Mapping[str, Any]]) -> str:
    """A history as Markdown; an observation that is no string becomes the text that the model reads."""
    parts = []
    for message in history:
        metadata = " ".join((message.get("metadata") or "").splitlines())
        heading = f"{message['role']} · {metadata}" if metadata else message["role"]
        content = "\n".join(f"\\{line}" if _OURS.match(line) else line
                            for line in as_text(message["content"]).split("\n"))
        if message.get("tools") is not None:
            content = f"{_TOOLS}\n{json.dumps(message['tools'], ensure_ascii=False, indent=2)}\n```\n\n{content}"
        parts.append(f"## {heading}\n\n{content}\n")
    return "\n".join(parts)


def _check(message: Any, number: int) -> dict[str, Any]:
    """A message as it stands in a history; DataError if it is none."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise DataError(f"message {number}: {str(message)[:60]!r}, expected {_FORM}, a role of {', '.join(ROLES)}")
    content, metadata = message.get("content"), message.get("metadata") or ""
    if content is None or not (isinstance(content, str) or role == "observation"):
        raise DataError(f"message {number} ({role}): 'content' is {str(content)[:40]!r}, expected a text")
    if not isinstance(metadata, str):
        raise DataError(f"message {number} ({role}): 'metadata' is {str(metadata)[:40]!r}, expected a tool's name")
    for text in (as_text(content), metadata):
        check_text(text)
    return Message(role, content, metadata, message.get("tools") if role == "system" else None).to_dict()


def _read_markdown(text: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        heading = _HEADING.match(line)
        if heading:
            messages.append({"role": heading[1], "metadata": heading[2] or "", "content": []})
        elif messages:
            messages[-1]["content"].append(line)
        elif line.strip():
            raise DataError(f"line {number}: {line[:60]!r}, expected JSON or Markdown with a heading, `## user`")
    for message in messages:
        lines = message["content"]
        lines = lines[1:] if lines and not lines[0] else lines
        lines = lines[:-1] if lines and not lines[-1] else lines  # the end of the file, or the line before a heading
        if lines[:1] == [_TOOLS] and "```" in lines:
            end = lines.index("```")
            message["tools"] = _loads("\n".join(lines[1:end]), "its tools")
            lines = lines[end + 2:]
        message["content"] = "\n".join(line[1:] if line.startswith("\\") and _OURS.match(line) else line
                                       for line in lines)
    return messages


def _loads(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise DataError(f"{what}: no JSON ({err}); expected {_FORM}") from err


def read_transcript(text: str) -> list[dict[str, Any]]:
    """The history in a text that to_json or to_markdown has written, or that looks so.

    Raises DataError, with the number of line or message, for anything else.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    messages = _loads(text, "the file") if text.lstrip()[:1] in ("[", "{") else _read_markdown(text)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{str(messages)[:60]!r} is no conversation; expected {_FORM}")
    return [_check(message, number) for number, message in enumerate(messages, 1)]
