"""Conversations to ids and loss mask against the reference's; a model is asked in the form it was trained in."""

import json

import pytest
from support import TOKENIZER

from glm3kit import tiny
from glm3kit.chat.session import ChatSession
from glm3kit.errors import PromptError
from glm3kit.text.messages import TOOLS_PROMPT, Message, conversation_ids, conversation_messages
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture
def tokenizer(published_tokenizer) -> ChatGLM3Tokenizer:
    return published_tokenizer


# --- conversations to ids


def test_every_reference_conversation_has_the_reference_ids_and_loss(tokenizer, encoded):
    assert len(encoded) == 23
    for row in encoded:
        ids, mask = conversation_ids(row["record"], tokenizer, tools_indent=None)
        size = min(len(ids), row["max_seq_length"])
        assert ids[:size] == row["input_ids"][:size]
        wanted = [ids[i + 1] if mask[i] else -100 for i in range(size - 1)]
        assert wanted == row["labels"][:size - 1]


def test_a_model_is_trained_on_the_prompt_that_it_is_asked_with(tokenizer, encoded):
    record = encoded[0]["record"]
    question = record["conversations"][0]["content"]
    system = {"role": "system", "content": TOOLS_PROMPT, "tools": record["tools"]}
    asked = tokenizer.chat_ids([system, {"role": "user", "content": question}])
    assert conversation_ids(record, tokenizer)[0][:len(asked)] == asked


def test_only_the_predictions_inside_answers_count(tokenizer):
    ids, mask = conversation_ids({"conversations": [USER, ANSWER, USER, ANSWER | {"loss": False}]}, tokenizer)
    # gMASK sop | user: mark, "▁" "\n", content | assistant: the same | eos. "q" and "a" are one piece each.
    turn = 1 + 2 + 1
    assert mask == [0, 0] + [0] * turn + [1] * turn + [0] * turn + [0] * turn + [0]
    assert len(ids) == len(mask) and ids[-1] == 2


def test_a_tool_turn_becomes_a_call_that_counts_and_a_result_that_does_not():
    tool = {"role": "tool", "name": "track", "parameters": {"symbol": "it's", "n": 1}, "observation": {"价格": 12}}
    assert conversation_messages({"conversations": [USER, tool]})[1:] == [
        Message("assistant", "```python\ntool_call(symbol=\"it's\", n=1)\n```", metadata="track", loss=True),
        Message("observation", '{"价格": 12}')]
    assert not any(message.loss for message in conversation_messages({"conversations": [USER, tool | {"loss": False}]}))


def test_calls_and_results_may_also_stand_as_in_a_chat_history():
    call = {"role": "assistant", "metadata": "track", "content": "```python\ntool_call()\n```"}
    result = {"role": "observation", "content": "12"}
    assert conversation_messages({"conversations": [USER, call, result, ANSWER]})[1:3] == [
        Message("assistant", call["content"], metadata="track", loss=True), Message("observation", "12")]


@pytest.mark.parametrize("record, finding", [
    ({"conversations": [USER]}, "ends with a user turn"),
    ({"conversations": [USER, ANSWER, {"role": "system", "content": "x"}]}, "ends with a system turn"),
    ({"conversations": []}, "not a list of turns"),
    ({"conversations": "hello"}, "not a list of turns"),
    ({}, "not a list of turns"),
    ([], "not a list of turns"),
    ({"conversations": [USER, "hello"]}, "turn 2 of 2: not a dict: got 'hello'"),
    ({"conversations": [{"role": "bot", "content": "x"}]}, "unknown role 'bot': expected .* system, user, assistant"),
    ({"conversations": [USER, {"role": "assistant"}]}, "the assistant turn's 'content' is not a text: got nothing"),
    ({"conversations": [USER, {"role": "assistant", "content": 5}]}, "'content' is not a text: got 5"),
    ({"conversations": [USER, {"role": "assistant", "content": " \n"}]}, "the assistant turn is blank"),
    ({"conversations": [USER, ANSWER | {"loss": "False"}]}, "'loss' is not true or false: got 'False'"),
    ({"conversations": [USER, {"role": "tool", "name": "f", "parameters": {}}]}, "'observation' is missing"),
    ({"conversations": [USER, {"role": "tool", "name": "f", "observation": ""}]}, "'parameters' is not a dict"),
    ({"conversations": [USER, {"role": "tool", "parameters": {}, "observation": ""}]}, "'name' is not a tool's name"),
])
def test_a_malformed_record_is_a_clear_error(record, finding):
    with pytest.raises(PromptError, match=finding):
        conversation_messages(record)


# --- a model is asked in the form that it was trained in


def asked_again(record, tokenizer) -> int:
    """Check each answer's prompt in the training row against the chat's; how many answers there were."""
    ids, messages = conversation_ids(record, tokenizer)[0], conversation_messages(record)
    answers = 0
    for number, message in enumerate(messages):
        before = messages[number - 1]
        if message.role != "assistant" or number == 0 or before.role == "assistant":  # a second answer: nobody asks
            continue
        history = [earlier.to_dict() for earlier in messages[:number - 1]]
        if before.role == "system":
            continue
        asked = tokenizer.build_chat_input(before.content, history, before.role)["input_ids"][0].tolist()
        assert ids[:len(asked)] == asked
        answers += 1
    return answers


def test_every_answer_is_trained_after_the_prompt_that_build_chat_input_gives(tokenizer, encoded):
    assert sum(asked_again(row["record"], tokenizer) for row in encoded) > 30
    small = ChatGLM3Tokenizer(TOKENIZER)
    records = map(json.loads, tiny.CONVERSATIONS.read_text(encoding="utf-8").splitlines())
    assert sum(asked_again(record, small) for record in records) > 480


def test_a_chat_session_asks_in_the_form_of_the_training_row_with_tools_and_results(tokenizer):
    tools = [{"name": "track", "description": "追踪股票", "parameters": {"type": "object"}}]
    record = {"tools": tools, "conversations": [
        {"role": "user", "content": "查股价"},
        {"role": "tool", "name": "track", "parameters": {"symbol": "10111"}, "observation": {"price": 12412}},
        {"role": "assistant", "content": "是 12412。"}]}
    ids, messages = conversation_ids(record, tokenizer)[0], conversation_messages(record)
    answers = [tokenizer.message_ids(message.to_dict())[1:] for message in messages if message.role == "assistant"]
    replies = iter([[*answers[0], tokenizer.role_id("observation")], [*answers[1], tokenizer.eos_id]])
    session = ChatSession(tokenizer, lambda prompt: iter(next(replies)), tools=tools)
    assert session.ask("查股价") == {"name": "track", "parameters": {"symbol": "10111"}}
    assert ids[:len(session.last_prompt_ids)] == list(session.last_prompt_ids)
    assert session.ask('{"price": 12412}', role="observation") == "是 12412。"
    asked = list(session.last_prompt_ids)
    assert ids == [*asked, *answers[1], tokenizer.eos_id]
