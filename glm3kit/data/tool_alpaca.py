"""ToolAlpaca's records to conversations with tool calls: what THUDM/ChatGLM3's format_tool_alpaca.py makes of them.

A record is an API: its documentation for a model, and instances, each a question, the steps that answered it (tool,
input, thought, and what the tool returned), a final thought and the answer. https://github.com/tangqiaoyu/ToolAlpaca

    python -m glm3kit data tool-alpaca train_data.json tool_alpaca.jsonl
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm3kit.data.rows import file_encoding, read_items
from glm3kit.errors import DataError
from glm3kit.files import atomic_path


def _take(holder: Any, key: str, kind: type) -> Any:
    value = holder.get(key) if isinstance(holder, Mapping) else None
    if not isinstance(value, kind):
        raise DataError(f"{key!r} is not a {'text' if kind is str else 'list'}: got {str(value)[:60]!r}")
    return value


def _step_turns(step: Any) -> list[dict[str, Any]]:
    """The turns of one step: what the model thought, if anything, and the tool call with its result."""
    try:
        (name, text, thought), observation = step
    except (TypeError, ValueError) as err:
        raise DataError(f"a step is not ((tool, input, thought), observation): got {str(step)[:60]!r}") from err
    if not isinstance(name, str) or not isinstance(thought, str):
        raise DataError(f"a step's tool and thought are no texts: got {str(step)[:60]!r}")
    try:
        parameters = json.loads(text)
    except (TypeError, ValueError, RecursionError) as err:
        raise DataError(f"a tool's input is no JSON: got {str(text)[:60]!r}") from err
    if not isinstance(parameters, dict):
        raise DataError(f"a tool's input is no JSON object: got {str(text)[:60]!r}")
    spoken = thought.partition("Action:")[0].strip()  # what follows repeats the call
    turns = [{"role": "assistant", "content": spoken}] if spoken else []
    return [*turns, {"role": "tool", "name": name, "parameters": parameters, "observation": observation}]


def tool_conversation(documentation: str, instance: Any) -> dict[str, Any]:
    """One instance of a record as a conversation; DataError says why there is none in it.

    documentation: of the record's tools, as the model is told it.
    """
    if not isinstance(instance, Mapping):
        raise DataError(f"not an object: {str(instance)[:60]!r}")
    if "error" in instance:
        raise DataError(f"its generation failed: {str(instance['error'])[:60]!r}")
    question, thought, answer = (_take(instance, key, str) for key in ("input", "Final Thought", "output"))
    turns = [{"role": "user", "content": question}]
    for step in _take(instance, "intermediate_steps", list):
        turns += _step_turns(step)
    return {"tools": [documentation],
            "conversations": [*turns, {"role": "assistant", "content": f"{thought}\n{answer}"}]}


def _records(path: Path) -> Iterator[tuple[int, str, str, list[Any]]]:
    """(line, name, documentation, instances) of each record."""
    for line, _, record in read_items(path, file_encoding(path)):
        try:
            if isinstance(record, DataError):
                raise record
            yield (line, _take(record, "Name", str), _take(record, "NLDocumentation", str),
                   _take(record, "Instances", list))
        except DataError as err:
            raise DataError(f"{path}:{line}: no record of ToolAlpaca: {err}; give its data/train_data.json or the "
                            "like") from err


def format_tool_alpaca(source: str | Path, destination: str | Path) -> dict[str, Any]:
    """Write the conversations of a ToolAlpaca file as JSON lines, an instance a line; return what became of each.

    Returns {"records", "instances", "written", "without_tool_call", "skipped"}: counts, and for each instance that
    holds no conversation the "line" of its record, "where" and "reason".
    Raises DataError if the source is no file of ToolAlpaca's records, or nothing in it can be used.
    """
    source = Path(source)
    report: dict[str, Any] = {"records": 0, "instances": 0, "written": 0, "without_tool_call": 0, "skipped": []}
    with atomic_path(destination) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for line, name, documentation, instances in _records(source):
            report["records"] += 1
            report["instances"] += len(instances)
            for number, instance in enumerate(instances, 1):
                try:
                    row = tool_conversation(documentation, instance)
                except DataError as err:
                    report["skipped"].append({"line": line, "where": f"{name}, instance {number} of {len(instances)}",
                                              "reason": str(err)})
                    continue
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                report["written"] += 1
                if all(turn["role"] != "tool" for turn in row["conversations"]):
                    report["without_tool_call"] += 1
        if not report["written"]:
            raise DataError(f"{source}: none of {report['instances']} instances can be used")
    return report
