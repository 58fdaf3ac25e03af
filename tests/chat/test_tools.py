"""Tools: what the model is told of a function, what may run, what comes back, and what becomes of a runaway call."""

import datetime
import json
import threading
import time
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import Field
from support import until

from glm3kit.chat.tools import MAX_OBSERVATION, calculate, calendar, find_products, run_call, tool
from glm3kit.errors import PromptError

EXAMPLES = {item.name: item for item in (calculate, calendar, find_products)}


def run(function, timeout_s=10.0, **parameters):
    """The observation of a call of one tool, read as JSON where it is some."""
    return run_call({function.name: function}, {"name": function.name, "parameters": parameters}, timeout_s)


def error_of(observation):
    return json.loads(observation)["error"]


# what the model is told

def test_a_tool_is_described_by_its_signature_and_docstring():
    @tool
    def weather(city: str, days: Annotated[int, Field(ge=1)] = 1, unit: Literal["C", "F"] = "C") -> str:
        """Forecast the weather.
        Slow.

        city: its name,
            in English
        days (int): how many
        """
        return f"{city} {days} {unit}"

    assert weather.to_dict() == {
        "name": "weather",
        "description": "Forecast the weather.\nSlow.",
        "parameters": {
            "type": "object",
            "additionalProperties": False,
            "required": ["city"],
            "properties": {
                "city": {"type": "string", "description": "its name, in English"},
                "days": {"type": "integer", "minimum": 1, "default": 1, "description": "how many"},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            },
        },
    }
    assert weather("北京") == "北京 1 C", "still a function"


def test_every_example_has_a_valid_schema_whose_arguments_are_all_described():
    for example in EXAMPLES.values():
        jsonschema.Draft202012Validator.check_schema(example.parameters)
        assert all(argument["description"] for argument in example.parameters["properties"].values())


def untyped(x):
    """About."""


def many(*words: str):
    """About."""


def undocumented(x: int):
    pass


async def later(x: int):
    """About."""


def odd(x: threading.Lock):
    """About."""


@pytest.mark.parametrize("function, finding", [
    (untyped, "'x' has no type; annotate it, `x: str`"), (many, "named arguments only"),
    (undocumented, "no docstring"), (later, "coroutine"), (odd, "odd: an argument's type has no JSON schema"),
    (lambda x: x, "write @tool above a `def`"), (5, "write @tool above a `def`"),
])
def test_a_function_that_cannot_be_described_is_refused_with_the_reason(function, finding):
    with pytest.raises(PromptError, match=finding):
        tool(function)


# what runs, and what does not

doubled = []


@tool
def double(x: int) -> int:
    """Double a number."""
    doubled.append(x)
    return 2 * x


@pytest.mark.parametrize("parameters, finding", [
    ({"x": "1"}, "x: Input should be a valid integer, got '1'"), ({}, "x: Missing required argument"),
    ({"x": 1, "y": 2}, "y: Unexpected keyword argument, got 2"),
    ({"x": True}, "x: Input should be a valid integer, got True"),
    ({"x": None}, "x: Input should be a valid integer, got None"), ({"x": {1, 2}}, "no JSON: "),
    ({"x": (1, 2)}, "no JSON: {'x': (1, 2)} has a tuple"), ({"x": float("inf")}, "no JSON: "),
    ({"x": "1", "y": 2}, "x: Input should be a valid integer, got '1'; y: Unexpected"),
])
def test_arguments_that_do_not_fit_the_signature_are_told_and_nothing_runs(parameters, finding):
    doubled.clear()
    assert error_of(run(double, **parameters)).startswith(f"double: invalid arguments: {finding}")
    assert doubled == []


INT, WORD = Annotated[int, Field(ge=1, le=10)], Annotated[str, Field(min_length=2, pattern="^[a-z]+$")]
TYPES = [int, float, str, bool, None, Any, list, dict, int | None, int | str, list[int], list[int | None], INT, WORD,
         dict[str, int], dict[str, list[float]], list[dict[str, list[int]]], tuple[int, str], tuple[int, ...],
         Annotated[float, Field(gt=0, lt=1)], Annotated[list[int], Field(min_length=1, max_length=2)],
         Annotated[int, Field(multiple_of=3)], Literal["a", "b"], Literal["a", 2, None], datetime.date, datetime.time]
VALUES = [None, True, False, 0, 1, 2, 3, 11, -1, 10**30, 0.5, 1.5, 1.0, float("inf"), 1j, b"ab", "", "a", "ab", "AB",
          "1", "true", "null", "2024-02-29", "2024-02-30", "12:30", "ends\ud83d", [], [1], [1, 2], [1, 2, 3], [1, "a"],
          [1.0], [True], ["1"], [None], [[1]], (), (1, "a"), {1, 2}, {}, {"a": 1}, {"a": "1"}, {"a": [1]},
          {"a": [0.5]}, {"a": True}, {1: "a"}, [{"a": [1]}], [{"a": ["1"]}], {"a": (1,)}]


def json_has(value):
    """Whether a value can stand in JSON; its half of a surrogate pair cannot."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError):
        return False
    return json.loads(text) == value


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("required", [True, False])
def test_what_the_schema_in_the_prompt_allows_is_what_a_tool_accepts(kind, required):
    """Refused beyond the schema: what JSON has not, a whole number written as a fraction, a text that is no date."""
    def function(x, *, more: int = 3):
        """About."""
        return None

    function.__annotations__["x"] = kind
    function.__defaults__ = None if required else (None,)
    checked, told = tool(function), json.loads(json.dumps(tool(function).parameters))
    accepted = 0
    calls = [{"x": value} | more for value in VALUES for more in ({}, {"more": 1}, {"more": "1"}, {"other": 1})]
    for parameters in [*calls, {}, {"more": 1}]:
        accepts = "invalid arguments" not in run(checked, **parameters)
        value = parameters.get("x")
        allowed = json_has(value) and jsonschema.Draft202012Validator(told).is_valid(parameters)
        if allowed and not accepts:
            assert repr(value) in ("1.0", "[1.0]") or kind in (datetime.date, datetime.time) and isinstance(value, str)
        assert allowed or not accepts, value
        accepted += accepts
    assert accepted > 0


def test_json_values_become_the_annotated_types():
    @tool
    def year(day: datetime.date) -> int:
        """The year of a day."""
        return day.year

    assert run(year, day="2024-02-29") == "2024"
    assert "invalid arguments: day: " in error_of(run(year, day="2024-02-30"))


def test_an_unknown_tool_is_told_with_the_known_ones():
    assert error_of(run_call(EXAMPLES, {"name": "os.system", "parameters": {}})) == (
        "there is no tool 'os.system'; there are: calculate, calendar, find_products")


def test_a_call_that_could_not_be_read_is_told_with_its_reason():
    call = {"name": "double", "content": "x", "reason": "no tool call: 'x' is no literal"}
    assert error_of(run_call({"double": double}, call)) == "no tool call: 'x' is no literal"


@pytest.mark.parametrize("fault", [ValueError("no such city"), SystemExit("bye"), TimeoutError("socket"),
                                   KeyboardInterrupt("x")], ids=lambda fault: type(fault).__name__)
def test_an_exception_in_a_tool_is_told_and_goes_no_further(fault):
    @tool
    def fail() -> None:
        """Fail."""
        raise fault

    assert error_of(run(fail)) == f"fail: {type(fault).__name__}: {fault}"


def test_a_result_is_text_as_it_is_or_json():
    @tool
    def echo(value: list | dict | str | None) -> object:
        """Say it."""
        return {1, 2} if value == "set" else value

    assert run(echo, value="晴 {}") == "晴 {}"
    assert run(echo, value={"天气": ["晴"]}) == '{"天气": ["晴"]}'
    assert run(echo, value=None) == "null"
    assert "cannot be written as JSON" in error_of(run(echo, value="set"))


def test_a_long_result_is_cut_and_says_so():
    @tool
    def talk() -> str:
        """Talk."""
        return "x" * 10**6

    told = run(talk)
    assert told == "x" * MAX_OBSERVATION + "\n[cut: 4,000 of 1,000,000 characters]"


# time

def test_a_runaway_loop_is_abandoned_and_its_thread_ends():
    entered = threading.Event()

    @tool
    def spin() -> None:
        """Never return."""
        entered.set()
        while True:
            try:
                time.sleep(0)
            except Exception:  # a tool that catches everything ends all the same
                continue

    assert error_of(run(spin, timeout_s=0.2)) == "spin: no result within 0.2 s"
    assert entered.is_set()
    until(lambda: not any(thread.name == "glm3kit tool" for thread in threading.enumerate()), timeout_s=20)


def test_a_call_that_waits_outside_of_python_blocks_nobody_and_its_late_result_is_dropped():
    done = threading.Event()

    @tool
    def wait() -> str:
        """Wait."""
        done.wait(30)
        return "late"

    assert "no result within" in error_of(run(wait, timeout_s=0.1))
    done.set()
    assert run(double, x=2) == "4"


def test_a_stop_ends_the_waiting():
    go = threading.Event()

    @tool
    def wait() -> None:
        """Wait."""
        go.wait(30)

    with pytest.raises(InterruptedError, match="wait was stopped"):
        run_call({"wait": wait}, {"name": "wait", "parameters": {}}, stopped=lambda: True)
    go.set()


# the examples

@pytest.mark.parametrize("expression, value", [
    ("2 * (3 + 4)", "14"), ("640 * 12.5 / 100", "80"), ("1 / 4", "0.25"), ("-2 ** 2", "-4"), ("7 // 2 + 7 % 4", "6"),
    ("sqrt(16) + max(1, 2)", "6"), ("0.1 + 0.2", "0.30000000000000004"), ("10 ** 20", "1e+20"),
])
def test_arithmetic_is_calculated(expression, value):
    assert run(calculate, expression=expression) == value


@pytest.mark.parametrize("expression", [
    "__import__('os').getcwd()", "open('x')", "(1).__class__", "[1]", "'a' * 9", "lambda: 1", "x", "1 if 1 else 2",
    "9 ** 9 ** 9", "1 / 0", "", "1 +", "(" * 400, "abs(*[1])", "f'{1}'", "1" * 501, "True.real", "1j", "sqrt(-1)",
    "round(1.5, ndigits=0)",
])
def test_what_is_no_arithmetic_is_an_error_and_nothing_else(expression):
    assert error_of(run(calculate, expression=expression)).startswith("calculate: ")


def test_the_calendar_counts_days_and_names_them():
    assert json.loads(run(calendar, date="2024-02-28", days=2)) == {
        "date": "2024-03-01", "weekday": "Friday", "星期": "五"}
    assert json.loads(run(calendar))["date"] == datetime.date.today().isoformat()


def test_products_have_every_word_that_was_asked_for():
    found = json.loads(run(find_products, words=["裙", "红色"], limit=2))
    assert 1 <= len(found) <= 2
    assert all("裙" in row["attributes"] and "红色" in row["attributes"] for row in found)
    assert json.loads(run(find_products, words=["宇宙飞船"])) == []
    assert "invalid arguments" in error_of(run(find_products, words=["裙"], limit=99))
