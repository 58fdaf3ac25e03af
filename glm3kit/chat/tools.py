"""Tools that a model may call: typed functions, described by signature and docstring, run within limits.

A call comes from a stranger, the model: its arguments are checked against the tool's signature before anything runs,
and whatever goes wrong becomes an observation that says so, for the model to read. Three examples need no network.

    session = ChatSession(tokenizer, reply, tools=[calculate, calendar, find_products])
    session.ask("What is 12.5% of 640?"); print(session.run_tools())
"""

import ast
import ctypes
import datetime
import functools
import inspect
import itertools
import json
import math
import operator
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema

from glm3kit.errors import PromptError
from glm3kit.text.tokenizer import as_text
from glm3kit.tiny import TRAIN

TIMEOUT_S = 10.0
MAX_OBSERVATION = 4000  # characters; about half of a window of 2048 tokens
_POLL_S = 0.05  # how soon a Stop is noticed while a tool runs


class _Untitled(GenerateJsonSchema):
    """A schema without the titles that repeat each name: the model reads it in every prompt."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. It is still called as a function from Python.

    parameters: the JSON schema of its arguments, for the model.
    arguments: checks them and gives them the annotated types; see `_checked`.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any]
    arguments: TypeAdapter[dict[str, Any]] = field(repr=False, compare=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What the model is told of it in the system turn, in the form of the published ChatGLM3 demos."""
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


def _documentation(function: Callable[..., Any], names: list[str]) -> tuple[str, dict[str, str]]:
    """The description of a function, and of each argument that has a line `name: text` in the docstring."""
    argument = re.compile(r"(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
    about: dict[str, str] = {}
    description, current = [], ""
    for line in map(str.strip, (inspect.getdoc(function) or "").splitlines()):
        match = argument.fullmatch(line)
        if match and match[1] in names:
            current = match[1]
            about[current] = match[2]
        elif line and current:
            about[current] += f" {line}"
        elif line not in ("Args:", "Arguments:", "Parameters:"):
            current = ""
            description.append(line)
    return "\n".join(description).strip(), {name: text.strip() for name, text in about.items()}


def tool(function: Callable[..., Any]) -> Tool:
    """Make a tool of a typed function: its name, its docstring, and the JSON schema of its arguments.

    Every argument needs an annotation that JSON can express; a docstring's line `name: text` describes one.
    Raises PromptError for a function that cannot be described so.
    Example: tool(calculate).parameters["required"] -> ["expression"]
    """
    name = getattr(function, "__name__", "")
    if not callable(function) or not name.isidentifier():
        raise PromptError(f"{str(function)[:60]} is no function with a name; write @tool above a `def`")
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PromptError(f"{name}: {parameter} cannot be given by name; a tool takes named arguments only")
        if parameter.annotation is parameter.empty:
            raise PromptError(f"{name}: argument {parameter.name!r} has no type; annotate it, `{parameter.name}: str`")
    if inspect.iscoroutinefunction(function):
        raise PromptError(f"{name} is a coroutine; a tool is a plain function")
    description, about = _documentation(function, list(signature.parameters))
    if not description:
        raise PromptError(f"{name} has no docstring; the model reads it to know what the tool is for")

    @functools.wraps(function)  # to pydantic it has the signature of the function
    def given(**arguments: Any) -> dict[str, Any]:
        return arguments

    try:
        adapter = TypeAdapter(given)
        parameters = adapter.json_schema(schema_generator=_Untitled)
    except (PydanticUserError, NameError) as err:
        raise PromptError(f"{name}: an argument's type has no JSON schema: {err}") from err
    for argument, text in about.items():
        parameters["properties"][argument]["description"] = text
    return Tool(name, description, parameters, function, adapter)


class _InvalidArguments(Exception):
    """Arguments that do not fit the signature of a tool."""


def _fault(fault: Mapping[str, Any]) -> str:
    """One of pydantic's findings: which argument, what is expected, what it got."""
    got = "" if fault["type"] == "missing_argument" else f", got {fault['input']!r:.60}"
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}{got}"


def _checked(tool: Tool, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in the types of the tool's signature, such as dates; _InvalidArguments says all that does not fit.

    As in JSON: "1" is no number, true is none, 1.0 is no integer, and there are no tuples, sets or infinite numbers.
    """
    try:
        text = json.dumps(parameters, allow_nan=False, ensure_ascii=False).encode()
        if json.loads(text) != parameters:
            raise ValueError(f"{parameters!r:.80} has a tuple or a key that is no text; use lists and texts")
    except (TypeError, ValueError, RecursionError) as err:
        raise _InvalidArguments(f"no JSON: {err}") from err
    try:
        return tool.arguments.validate_json(text, strict=True)
    except ValidationError as err:
        raise _InvalidArguments("; ".join(map(_fault, err.errors()))) from err


def _abandon(thread: threading.Thread) -> None:
    """Ask a thread to end, by an exception raised in it at its next step in Python.

    A loop in Python ends so. A call into C (a socket, a sleep) goes on until it returns, as a daemon thread whose
    result nobody reads. A process could be killed, but one forked beside MindSpore's threads may lock up, and one
    started afresh does not know the functions of a notebook.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def _run(function: Callable[[], Any], timeout_s: float, stopped: Callable[[], bool]) -> Any:
    """Result and exception of a call made in a thread of its own; None if it is not waited for any longer."""
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((function(), None))
        except BaseException as err:  # also what would end a program: the thread that waits reports it
            outcome.put((None, err))

    thread = threading.Thread(target=work, name="glm3kit tool", daemon=True)
    thread.start()
    end = time.monotonic() + timeout_s
    while (left := end - time.monotonic()) > 0 and not stopped():
        try:
            return outcome.get(timeout=min(_POLL_S, left))
        except queue.Empty:
            continue
    _abandon(thread)
    return None


def cut(text: str) -> str:
    """A text of at most MAX_OBSERVATION characters, saying so where it was longer."""
    if len(text) <= MAX_OBSERVATION:
        return text
    return f"{text[:MAX_OBSERVATION]}\n[cut: {MAX_OBSERVATION:,} of {len(text):,} characters]"


def _error(text: str) -> str:
    return json.dumps({"error": cut(text)}, ensure_ascii=False)


def run_call(tools: Mapping[str, Tool], call: Mapping[str, Any], timeout_s: float = TIMEOUT_S,
             stopped: Callable[[], bool] = lambda: False) -> str:
    """Run a call that process_response has read; return the observation, as the model will read it.

    call: {"name", "parameters"}, or {"name", "reason"} for one that could not be read.
    stopped: asked again and again while the tool runs; true ends the waiting.
    An unknown tool, arguments that do not fit, an exception and a time-out are {"error": ...}. After a time-out the
    call is abandoned: see _abandon. Raises InterruptedError if `stopped`.
    """
    name = call["name"]
    if name not in tools:
        return _error(f"there is no tool {name!r}; there are: {', '.join(tools) or 'none'}")
    if "parameters" not in call:
        return _error(call.get("reason", "no tool call"))
    tool, parameters = tools[name], call["parameters"]
    outcome = _run(lambda: tool.function(**_checked(tool, parameters)), timeout_s, stopped)
    if outcome is None:
        if stopped():
            raise InterruptedError(f"{name} was stopped")
        return _error(f"{name}: no result within {timeout_s:g} s")
    result, error = outcome
    if isinstance(error, _InvalidArguments):
        return _error(f"{name}: invalid arguments: {error}")
    if error is not None:
        return _error(f"{name}: {type(error).__name__}: {error}")
    try:
        return cut(as_text(result))
    except (TypeError, ValueError, RecursionError) as err:
        return _error(f"{name}: its result cannot be written as JSON: {err}")


# Three tools that need no network

_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: math.pow,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}
_FUNCTIONS = {"abs": abs, "sqrt": math.sqrt, "exp": math.exp, "log": math.log, "sin": math.sin, "cos": math.cos,
              "round": round, "min": min, "max": max}


def _value(node: ast.AST) -> float:
    match node:
        case ast.Expression(body):
            return _value(body)
        case ast.Constant(int() | float() as number):
            return float(number)  # powers of floats overflow, powers of integers would fill the memory
        case ast.BinOp(left, sign, right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(left), _value(right))
        case ast.UnaryOp(sign, operand) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(operand))
        case ast.Call(ast.Name(name), arguments, []) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_value, arguments))
    raise ValueError(f"{ast.unparse(node)[:60]!r} is no arithmetic; use numbers, + - * / // % **, brackets and "
                     f"{', '.join(_FUNCTIONS)}")


@tool
def calculate(expression: str) -> float:
    """Calculate an arithmetic expression. 计算算术表达式。

    expression: such as 2 * (3 + 4) or sqrt(2)
    """
    if len(expression) > 500:
        raise ValueError(f"{len(expression)} characters, at most 500 are read")
    value = _value(ast.parse(expression.strip(), mode="eval"))
    return int(value) if math.isfinite(value) and value == int(value) and abs(value) < 2**53 else value


@tool
def calendar(date: datetime.date | None = None, days: int = 0) -> dict[str, Any]:
    """Say the date and the day of the week. 查询日期和星期。

    date: as 2024-05-01; today if it is left out
    days: this many days later, or earlier if negative
    """
    day = (date or datetime.date.today()) + datetime.timedelta(days=days)
    return {"date": day.isoformat(), "weekday": f"{day:%A}", "星期": "一二三四五六日"[day.weekday()]}


@tool
def find_products(words: list[str], limit: Annotated[int, Field(ge=1, le=10)] = 3) -> list[dict[str, str]]:
    """Find clothes in the shop's catalogue by their attributes. 按属性查找商品。

    words: what each has to have, such as ["裙", "红色"]
    limit: how many at most
    """
    with TRAIN.open(encoding="utf-8") as rows:  # the rows that come with the kit
        found = (row for row in map(json.loads, rows) if all(word in row["content"] for word in words))
        return [{"attributes": row["content"], "text": row["summary"]} for row in itertools.islice(found, limit)]
