"""Ids in, text out, one id at a time.

    text = TextStream(tokenizer)
    for token in net.stream(ids): print(text.push(token), end="")
"""

from glm3kit.tokenizer import ChatGLM3Tokenizer


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
