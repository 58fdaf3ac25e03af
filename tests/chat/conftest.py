"""What the tests of this room share: a model that says what it is told to."""

import pytest

from glm3kit.chat.session import ChatSession


@pytest.fixture
def say(tokenizer):
    """Ids as the model generates them: metadata, a new line, the content, and the id that ends the turn."""
    def ids(content, metadata="", stop=None):
        stop = tokenizer.role_id("user") if stop is None else stop
        return [*tokenizer.build_single_message("assistant", metadata, content)[1:], stop]

    return ids


class Script:
    """Answers with one list of ids after the other, and remembers its prompts."""

    def __init__(self, replies):
        self.replies, self.prompts = list(replies), []

    def __call__(self, ids):
        self.prompts.append(ids)
        yield from self.replies.pop(0)


@pytest.fixture
def model(say):
    """Make a model of its answers: texts, dicts of content and metadata, or ids."""
    def ids(reply):
        return reply if isinstance(reply, list) else say(**reply) if isinstance(reply, dict) else say(reply)

    return lambda *replies: Script(map(ids, replies))


@pytest.fixture
def talked(tokenizer, model):
    """Make a session in which "一", "二" ... were said and answered with these replies."""
    def session(*replies, **options):
        session = ChatSession(tokenizer, model(*replies), **options)
        for question in "一二三四五"[: len(replies)]:
            session.ask(question)
        return session

    return session
