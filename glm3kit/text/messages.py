"""Conversations to ids with a loss mask.

Knowledge: THUDM/ChatGLM3, `finetune_chatmodel_demo/preprocess_utils.py` (conversations, tool turns, loss mask).

    ids, mask = conversation_ids({"conversations": [{"role": "user", "content": "你好"}, ...]}, tokenizer)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm3kit.errors import PromptError
from glm3kit.text.tokenizer import ChatGLM3Tokenizer, as_text

TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"
TURNS = ("system", "user", "assistant", "tool", "observation")  # roles in a training record


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
        named = {"metadata": self.metadata} if self.role == "assistant" else {}
        tools = {} if self.tools is None else {"tools": self.tools}
        return {"role": self.role, "content": self.content} | named | tools


def _field(turn: Mapping[str, Any], key: str, kind: type, what: str) -> Any:
    if not isinstance(turn.get(key), kind):
        got = f"{turn[key]!r:.80}" if key in turn else "nothing"
        raise PromptError(f"the {turn['role']} turn's {key!r} is not {what}: got {got}")
    return turn[key]


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
    tools = record.get("tools")
    messages = [] if tools is None else [Message("system", TOOLS_PROMPT, tools=tools)]
    for number, turn in enumerate(turns, 1):
        try:
            messages += _turn_messages(turn)
        except PromptError as err:
            raise PromptError(f"turn {number} of {len(turns)}: {err}") from err
    if turns[-1]["role"] in ("system", "user"):
        raise PromptError(f"the conversation ends with a {turns[-1]['role']} turn: turn {len(turns)} has no answer to "
                          "learn; add the assistant's answer or remove that turn")
    return messages


def conversation_ids(record: Mapping[str, Any], tokenizer: ChatGLM3Tokenizer,
                     tools_indent: int | None = 4) -> tuple[list[int], list[int]]:
    """Ids of a training record and, for each, 1 if the prediction made there counts in the loss.

    tools_indent: indentation of the tools' JSON; 4 is the chat prompt's, None MindFormers'.
    Raises PromptError for a malformed record.
    Example: an assistant's turn of n ids, its role's id included, has n ones.
    """
    ids, mask = list(tokenizer.prefix_ids), [0] * len(tokenizer.prefix_ids)
    for message in conversation_messages(record):
        turn = tokenizer.message_ids(message.to_dict(), tools_indent)
        ids += turn
        mask += [int(message.loss)] * len(turn)
    return [*ids, tokenizer.eos_id], [*mask, 0]
