"""Ids in, text out, one id at a time.

    text = TextStream(tokenizer)
    for token in net.stream(ids): print(text.push(token), end="")
"""

from collections.abc import Iterable, Iterator

from glm3kit.text.messages import ASSISTANT
from glm3kit.text.tokenizer import ChatGLM3Tokenizer


class TextStream:
    """Ids in, text out: one id at a time, and never half of a character.

    A character may be spread over several byte pieces. Until it is whole its text ends with U+FFFD and is held back.
    Only the last few ids are decoded again: those of the last visible text are the context that keeps spaces right.
    Example: the pieces <0xF0> <0x9F> <0x8C> <0xB8> -> "", "", "", "🌸".
    """

    def __init__(self, tokenizer: ChatGLM3Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # the ids from here on are decoded again
        self._told = 0  # the ids before this one have been told
        self._told_text = ""  # of ids[_context:_told]

    def push(self, token: int) -> str:
        """Take one id; return the text that has become certain, often none."""
        self._ids.append(token)
        text = self._decode()
        return "" if text.endswith("\ufffd") else self._tell(text)

    def finish(self) -> str:
        """Return what is still held back, broken characters as U+FFFD."""
        return self._tell(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids[self._context :], errors="ignore")  # an untrained model says anything

    def _tell(self, text: str) -> str:
        news = text[len(self._told_text) :]
        if news.strip():  # a context of spaces alone would lose them: a decoder drops the first space of a text
            self._context = self._told
            text = self._decode()
        self._told, self._told_text = len(self._ids), text
        return news


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
