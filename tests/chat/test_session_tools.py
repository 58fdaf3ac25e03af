"""Tool calls and code in a conversation: what is run, what is left to a person, what the model reads."""

import json
import threading

import pytest

from glm3kit.chat.session import ChatSession
from glm3kit.chat.tools import calculate, tool
from glm3kit.errors import Glm3KitError, PromptError

WEATHER = [{"name": "weather", "description": "weather of a city", "parameters": {"city": {"type": "string"}}}]


# tools

def call(name, **parameters):
    arguments = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    return {"content": f"```python\ntool_call({arguments})\n```", "metadata": name}


def tool_session(tokenizer, model, *replies, tools=(calculate,)):
    session = ChatSession(tokenizer, model(*replies), tools=tools)
    session.ask("多少？")
    return session


def observations(session):
    return [message["content"] for message in session.history if message["role"] == "observation"]


def test_tools_run_one_after_the_other_until_the_model_answers(tokenizer, model):
    calls = [call("calculate", expression=expression) for expression in ("2*3", "6*7")]
    session = tool_session(tokenizer, model, *calls, "42。")
    assert session.pending_call == {"name": "calculate", "parameters": {"expression": "2*3"}}
    assert session.run_tools() == "42。"
    assert observations(session) == ["6", "42"]
    assert session.pending_call is None
    assert tokenizer.decode(session.last_prompt_ids).count("42") == 1, "the model has read the result"


def test_at_most_five_calls_are_answered_in_a_row(tokenizer, model):
    session = tool_session(tokenizer, model, *[call("calculate", expression=str(i)) for i in range(9)])
    assert session.run_tools() == {"name": "calculate", "parameters": {"expression": "5"}}
    assert observations(session) == ["0", "1", "2", "3", "4"]
    session.run_tools(rounds=1)
    assert observations(session)[5:] == ["5"]


@pytest.mark.parametrize("wrong, finding", [
    (call("os.system", command="ls"), "there is no tool 'os.system'"),
    (call("calculate", code="1"), "invalid arguments"),
    (call("calculate", expression="x"), "is no arithmetic"),
    ({"content": "tool_call(expression=open('x'))", "metadata": "calculate"}, "is no literal"),
    ({"content": "[1, 2]", "metadata": "calculate"}, "neither tool_call"),
])
def test_a_wrong_call_becomes_an_observation_and_the_model_may_try_again(tokenizer, model, wrong, finding):
    session = tool_session(tokenizer, model, wrong, "对不起。")
    assert session.run_tools() == "对不起。"
    assert finding in json.loads(observations(session)[0])["error"]


def test_a_call_that_is_not_approved_stays_for_a_person_to_answer(tokenizer, model):
    session, asked = tool_session(tokenizer, model, call("calculate", expression="2*3"), "六。"), []
    session.run_tools(approve=lambda call: asked.append(call))
    assert asked == [session.pending_call] and observations(session) == []
    assert session.ask("6", role="observation") == "六。"


def test_a_tool_that_is_only_described_is_left_to_a_person(tokenizer, model):
    for tools in (WEATHER, [calculate, *WEATHER]):
        session = tool_session(tokenizer, model, call("weather", city="北京"), tools=tools)
        assert session.run_tools() == {"name": "weather", "parameters": {"city": "北京"}}
        assert observations(session) == []


def test_a_runaway_tool_costs_its_time_limit_and_the_session_goes_on(tokenizer, model):
    go = threading.Event()

    @tool
    def wait() -> None:
        """Wait."""
        go.wait(30)

    session = tool_session(tokenizer, model, call("wait"), "好。", "好。", tools=[wait])
    assert session.run_tools(timeout_s=0.1) == "好。"
    assert "no result within 0.1 s" in observations(session)[0]
    assert session.ask("再见") == "好。"
    go.set()


def test_a_stop_while_a_tool_runs_leaves_the_call_unanswered(tokenizer, model):
    entered, go = threading.Event(), threading.Event()

    @tool
    def wait() -> None:
        """Wait."""
        entered.set()
        go.wait(30)

    session = tool_session(tokenizer, model, call("wait"), "好。", tools=[wait])
    runner = threading.Thread(target=session.run_tools)
    runner.start()
    assert entered.wait(10)
    assert (session.busy, session.running_tool) == (True, "wait")
    session.stop()
    runner.join(10)
    go.set()
    assert (session.busy, session.running_tool, observations(session)) == (False, None, [])
    assert session.pending_call == {"name": "wait", "parameters": {}}


def test_two_tools_of_one_name_are_refused(tokenizer):
    with pytest.raises(PromptError, match="two tools have one name: calculate, calculate"):
        ChatSession(tokenizer, iter, tools=[calculate, calculate])


# the code interpreter

def test_code_is_offered_and_not_taken_for_a_tool(tokenizer, model):
    code = {"content": "```python\nprint(6 * 7)\n```", "metadata": "interpreter"}
    for tools in ([], [calculate]):
        session = tool_session(tokenizer, model, code, tools=tools)
        assert (session.pending_code, session.pending_call) == ("print(6 * 7)", None)
        session.run_tools()
        assert observations(session) == []


def test_without_code_or_notebook_there_is_no_cell_and_the_error_says_so(tokenizer, model):
    session = tool_session(tokenizer, model, "好。", {"content": "1", "metadata": "interpreter"}, tools=[])
    for action in (session.insert_cell, session.observe_cell):
        with pytest.raises(Glm3KitError, match="the last answer is no code"):
            action()
    session.ask("算")
    with pytest.raises(Glm3KitError, match="no notebook"):
        session.insert_cell()
    with pytest.raises(Glm3KitError, match="no cell was run"):
        session.observe_cell()
