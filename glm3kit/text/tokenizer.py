"""ChatGLM3Tokenizer: text to ids and back, and chat turns to ids.

The vocabulary is a SentencePiece model; nine special ids are numbered on from its last piece and are never produced
from text: a user who types `<|user|>` gets ordinary pieces. Knowledge: THUDM/chatglm3-6b, `tokenization_chatglm.py`.

    python -c "from glm3kit import ChatGLM3Tokenizer as T; print(T('tokenizer.model').encode('你好'))"
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from glm3kit.errors import DataError, PromptError

ROLES = ("system", "user", "assistant", "observation")
SPECIAL_NAMES = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(f"<|{role}|>" for role in ROLES))


def _read_pieces(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """Read a SentencePiece model and the SHA-256 of its bytes."""
    if not path.is_file():
        raise DataError(f"{path}: there is no tokenizer file; expected the tokenizer.model published with ChatGLM3-6B; "
                        "download it or correct model.tokenizer_path")
    content = path.read_bytes()
    advice = "download the published tokenizer.model again"
    if content.startswith(b"version https://git-lfs"):
        advice = "this is a Git LFS pointer: run `git lfs pull` where it was cloned"
    if not content:  # SentencePiece accepts no bytes at all as a model without pieces
        raise DataError(f"{path}: the tokenizer file is empty, expected a SentencePiece model; {advice}")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as err:
        raise DataError(f"{path}: not a SentencePiece model ({len(content):,} bytes, beginning with {content[:16]!r}); "
                        f"{advice}") from err
    if min(pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) < 0:
        raise DataError(f"{path}: a SentencePiece model without unk, bos or eos (ids {pieces.unk_id()}, "
                        f"{pieces.bos_id()}, {pieces.eos_id()}); ChatGLM3 needs all three: train it with them")
    return pieces, hashlib.sha256(content).hexdigest()


def check_text(text: Any) -> None:
    """Raise DataError if `text` is no string or cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise DataError(f"expected a text, got {type(text).__name__} {str(text)[:40]!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise DataError(f"character {err.start + 1} is U+{ord(text[err.start]):04X}, half of a surrogate pair, which "
                        "UTF-8 cannot hold; remove or replace it") from err


def _plain(ids: Any) -> Any:
    """Arrays and tensors as Python numbers and lists of them; lists as they came."""
    if hasattr(ids, "asnumpy"):  # a MindSpore tensor, without importing MindSpore
        ids = ids.asnumpy()
    return ids.tolist() if isinstance(ids, np.ndarray | np.generic) else ids


def as_text(value: Any) -> str:
    """What a tool returned, as the model reads it: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class ChatGLM3Tokenizer:
    """The published tokenizer, or any SentencePiece model of its form.

    path: a `tokenizer.model`, or a folder that holds one.
    Raises DataError if there is no file or it is no SentencePiece model.
    Example: ChatGLM3Tokenizer("tokenizer.model").encode("你好") -> [64790, 64792, 36474, 54591]
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.is_dir():
            self.path = self.path / "tokenizer.model"
        self._pieces, self.digest = _read_pieces(self.path)
        count = self._pieces.vocab_size()
        self.special_tokens: dict[str, int] = {name: count + i for i, name in enumerate(SPECIAL_NAMES)}
        self._special_names = {id_: name for name, id_ in self.special_tokens.items()}
        self.vocab_size: int = count + len(SPECIAL_NAMES)
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.pad_id: int = self._pieces.unk_id()  # the published model pads with its unknown id, 0
        self.prefix_ids: list[int] = [self.special_tokens["[gMASK]"], self.special_tokens["sop"]]
        self.stop_ids: tuple[int, ...] = (self.eos_id, self.role_id("user"), self.role_id("observation"))

    def role_id(self, role: str) -> int:
        """The id that opens a turn of `role`; PromptError names the roles there are."""
        if role not in ROLES:
            raise PromptError(f"unknown role {role!r}; expected one of {', '.join(ROLES)}")
        return self.special_tokens[f"<|{role}|>"]

    def encode(self, text: str, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """Ids of a text, after `[gMASK] sop` if add_special_tokens; cut to max_length ids in all.

        Raises DataError if text is no string or holds half a surrogate pair.
        """
        check_text(text)
        ids = self._pieces.encode(text)
        if add_special_tokens:
            ids = self.prefix_ids + ids
        return ids if max_length is None else ids[:max_length]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts without special ids, int32 arrays, by SentencePiece's own threads (one a core)."""
        texts = list(texts)
        try:
            if hasattr(self._pieces, "EncodeAsNumpy"):  # since 0.2.3: spares a Python number for each id
                return self._pieces.encode(texts, out_type="numpy", num_threads=-1)
            return [np.array(ids, np.int32) for ids in self._pieces.encode(texts, num_threads=-1)]
        except (RuntimeError, TypeError) as err:  # SentencePiece does not say which text: find it
            for text in texts:
                check_text(text)
            raise DataError(f"{self.path}: SentencePiece cannot encode these texts: {err}") from err

    def decode(self, ids: Any, skip_special_tokens: bool = True, errors: str = "strict") -> str | list[str]:
        """Text of ids; nested ids (a batch) give a list of texts.

        ids: a number, a list, an array or a tensor of ids, or a list of them.
        skip_special_tokens: leave role marks and the like out, or write them by name (`<|user|>`); unk, bos and eos
            have no text in either case.
        errors: "strict" raises DataError for an id that is not in the vocabulary; "ignore" leaves it out (a model's
            vocabulary is padded, 65,024 for 64,798 ids, and an untrained one may choose such an id).
        Example: decode([64790, 64792, 36474, 54591, 2]) -> "你好"
        """
        ids = _plain(ids)
        ids = [_plain(item) for item in ids] if isinstance(ids, list | tuple) else [ids]
        if any(isinstance(row, list | tuple) for row in ids):
            return [self.decode(row, skip_special_tokens, errors) for row in ids]
        # Each stretch between special ids was encoded by itself, with a leading space of its own: decode it so too.
        texts, stretch = [], []
        for id_ in ids:
            if not isinstance(id_, int) or not 0 <= id_ < self.vocab_size:
                if errors == "ignore" and isinstance(id_, int):
                    continue
                raise DataError(f"cannot decode id {id_!r}: expected integers from 0 to {self.vocab_size - 1} "
                                f"({self.path.name}); check that model and tokenizer belong together")
            if id_ in self._special_names:
                texts += [self._pieces.decode(stretch), "" if skip_special_tokens else self._special_names[id_]]
                stretch = []
            elif id_ not in (self.pad_id, self.bos_id, self.eos_id):
                stretch.append(id_)
        return "".join([*texts, self._pieces.decode(stretch)])

    def piece(self, id_: int) -> str:
        """One id as it is shown to people: a piece (`▁hello`, `<0x0A>`), a special name, or `[unused 64800]`."""
        if 0 <= id_ < self._pieces.vocab_size():
            return self._pieces.id_to_piece(int(id_))
        return self._special_names.get(id_, f"[unused {id_}]")

    def build_single_message(self, role: str, metadata: str, content: str) -> list[int]:
        """Ids of one turn: the role's id, metadata and a new line, the content.

        metadata: "" or, in an assistant's turn, the name of the tool that it calls.
        """
        return [self.role_id(role), *self.encode(f"{metadata}\n", False), *self.encode(content, False)]

    def message_ids(self, message: Mapping[str, Any], tools_indent: int | None = 4) -> list[int]:
        """Ids of one entry of a history: `role`, `content`, and where they apply `metadata` and `tools`.

        tools: a system turn's tools are written as JSON below its content, indented by tools_indent.
        Raises PromptError for a message without role or content, or of another form.
        """
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role == "observation" and content is not None:
            content = as_text(content)  # a tool's result is as it was in training
        if not isinstance(content, str):
            raise PromptError(f"not a message: {str(message)[:80]!r}; expected a dict with a role ({', '.join(ROLES)}) "
                              "and a content that is a string")
        if role == "system" and message.get("tools") is not None:
            content += "\n" + json.dumps(message["tools"], indent=tools_indent, ensure_ascii=False)
        return self.build_single_message(role, message.get("metadata") or "", content)

    def chat_ids(self, messages: Iterable[Mapping[str, Any]]) -> list[int]:
        """The prompt that asks for an answer to `messages`: `[gMASK] sop`, each turn, then `<|assistant|>` alone.

        Raises PromptError for an unknown role or a malformed message.
        """
        turns = [self.message_ids(message) for message in messages]
        return [*self.prefix_ids, *chain.from_iterable(turns), self.role_id("assistant")]

    def build_chat_input(self, query: str, history: Sequence[Mapping[str, Any]] | None = None,
                         role: str = "user") -> dict[str, np.ndarray]:
        """`chat_ids` of a history and a query said by `role`, in the form of the published tokenizer.

        Returns input_ids, attention_mask and position_ids, int32 arrays of shape (1, T).
        """
        ids = self.chat_ids([*(history or []), {"role": role, "content": query}])
        input_ids = np.array([ids], np.int32)  # (1, T)
        return {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids),
                "position_ids": np.arange(len(ids), dtype=np.int32)[None]}
