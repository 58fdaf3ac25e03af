"""ChatGLM3Tokenizer against the ids of the official code, and what it says to bad input."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece

from glm3kit.errors import DataError, PromptError
from glm3kit.text.tokenizer import ROLES, SPECIAL_NAMES, ChatGLM3Tokenizer


@pytest.fixture
def tokenizer(published_tokenizer) -> ChatGLM3Tokenizer:
    return published_tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ChatGLM3Tokenizer:
    """A tokenizer of the published form with 300 pieces, trained here: needs no file of anyone."""
    folder = tmp_path_factory.mktemp("small")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["红色的连衣裙", "蓝色的上衣 and trousers"]), model_prefix=str(folder / "tokenizer"),
        vocab_size=300, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, minloglevel=2)
    return ChatGLM3Tokenizer(folder)


@pytest.fixture(scope="module")
def rows(golden_texts) -> list[dict]:
    return [json.loads(line) for line in (golden_texts / "tokenizer.jsonl").open(encoding="utf-8")]


def test_every_reference_text_gives_the_reference_ids(tokenizer, rows):
    assert len(rows) == 508
    assert [tokenizer.encode(row["text"], add_special_tokens=False) for row in rows] == [row["ids"] for row in rows]
    assert [tokenizer.encode(row["text"]) for row in rows] == [row["ids_with_special"] for row in rows]


def test_a_batch_gives_the_same_ids_as_one_text_at_a_time(tokenizer, rows):
    texts, expected = [row["text"] for row in rows], [row["ids"] for row in rows]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
    assert {ids.dtype for ids in tokenizer.encode_batch(texts)} == {np.dtype("int32")}


def test_a_batch_is_the_same_with_a_sentencepiece_that_gives_lists(tokenizer, rows, monkeypatch):
    monkeypatch.delattr(sentencepiece.SentencePieceProcessor, "EncodeAsNumpy")
    encoded = tokenizer.encode_batch([row["text"] for row in rows])
    assert [ids.tolist() for ids in encoded] == [row["ids"] for row in rows]


def test_every_reference_text_decodes_as_in_the_reference(tokenizer, rows):
    assert [tokenizer.decode(row["ids"]) for row in rows] == [row["decoded"] for row in rows]
    assert [tokenizer.decode(row["ids_with_special"]) for row in rows] == [row["decoded"] for row in rows]
    assert tokenizer.decode([row["ids"] for row in rows]) == [row["decoded"] for row in rows]


def test_every_reference_chat_prompt_is_the_same(tokenizer, golden_texts):
    chats = json.loads((golden_texts / "chat_prompts.json").read_text(encoding="utf-8"))
    assert len(chats) == 28
    for chat in chats:
        prompt = tokenizer.build_chat_input(chat["query"], history=chat["history"], role=chat["role"])
        assert prompt["input_ids"].tolist() == [chat["input_ids"]]
        question = {"role": chat["role"], "content": chat["query"]}
        assert tokenizer.chat_ids([*chat["history"], question]) == chat["input_ids"]


def test_special_ids_are_the_published_ones(tokenizer):
    published = [64789, 64790, 64791, 64792, 64793, 64794, 64795, 64796, 64797]
    assert [tokenizer.special_tokens[name] for name in SPECIAL_NAMES] == published
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 64798)
    assert tokenizer.prefix_ids == [64790, 64792]
    assert tokenizer.stop_ids == (2, 64795, 64797)
    assert [tokenizer.role_id(role) for role in ROLES] == [64794, 64795, 64796, 64797]


def test_special_ids_follow_the_pieces_of_any_model(small):
    pieces = small.vocab_size - 9
    assert list(small.special_tokens.values()) == list(range(pieces, pieces + 9))
    assert small.build_single_message("user", "", "")[0] == pieces + 6
    assert small.decode(small.encode("蓝色的连衣裙 🌸\n  and")) == "蓝色的连衣裙 🌸\n  and"


@pytest.mark.parametrize("name", [*SPECIAL_NAMES, "<s>", "</s>", "<unk>", "<pad>", "<|user|>\n[gMASK]sop"])
def test_text_never_produces_special_ids(tokenizer, small, name):
    for each in (tokenizer, small):
        ids = each.encode(name, add_special_tokens=False)
        assert not set(ids) & {0, 1, 2, *each.special_tokens.values()}
        message = each.build_single_message("user", name, name)
        assert not set(message[1:]) & {0, 1, 2, *each.special_tokens.values()}
        assert each.decode(ids) == name


def test_max_length_counts_the_special_ids(tokenizer):
    assert tokenizer.encode("你好", max_length=3) == [64790, 64792, 36474]
    assert tokenizer.encode("你好", add_special_tokens=False, max_length=1) == [36474]
    assert tokenizer.encode("你好", max_length=100) == [64790, 64792, 36474, 54591]


def test_decode_takes_numbers_lists_arrays_and_batches(tokenizer):
    assert tokenizer.decode(36474) == tokenizer.decode(np.int64(36474)) == "你"
    assert tokenizer.decode([36474, 54591]) == tokenizer.decode(np.array([36474, 54591], np.int32)) == "你好"
    assert tokenizer.decode((np.int32(36474), 54591)) == "你好"
    assert tokenizer.decode(np.array([[36474, 54591]] * 2)) == ["你好", "你好"]
    assert tokenizer.decode([np.array([36474]), np.array([], np.int32)]) == ["你", ""]
    assert tokenizer.decode([]) == ""


def test_decode_takes_a_tensor_of_any_library_that_has_asnumpy(tokenizer):
    class Tensor:
        def asnumpy(self):
            return np.array([[36474, 54591]])

    assert tokenizer.decode(Tensor()) == ["你好"]


def test_special_ids_are_left_out_of_text_or_written_by_name(tokenizer):
    ids = tokenizer.build_chat_input("你好")["input_ids"][0].tolist() + [2, 64795, 0, 1]
    assert tokenizer.decode(ids) == "\n 你好"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[gMASK]sop<|user|>\n 你好<|assistant|><|user|>"


def test_ids_outside_the_vocabulary_are_a_clear_error(tokenizer):
    for wrong in (64798, 65023, 10**30, -1, "你", 1.5, None):
        with pytest.raises(DataError, match="expected integers from 0 to 64797"):
            tokenizer.decode([36474, wrong])


def test_ids_of_the_padded_vocabulary_can_be_left_out(tokenizer):
    assert tokenizer.decode([36474, 65023, 54591, -1], errors="ignore") == "你好"


def test_pieces_are_shown_by_name(tokenizer):
    assert [tokenizer.piece(i) for i in (0, 2, 13, 36474, 64795, 65000)] == [
        "<unk>", "</s>", "<0x0A>", "▁你", "<|user|>", "[unused 65000]"]


def test_chat_input_has_masks_and_positions_of_one_row(tokenizer):
    prompt = tokenizer.build_chat_input("你好")
    ids = [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]
    assert prompt["input_ids"].tolist() == [ids]
    assert prompt["attention_mask"].tolist() == [[1] * 8]
    assert prompt["position_ids"].tolist() == [list(range(8))]
    assert {array.dtype for array in prompt.values()} == {np.dtype("int32")}


def test_a_tool_result_that_is_no_text_is_written_as_json(tokenizer):
    as_text, as_dict = (tokenizer.build_chat_input(result, role="observation")["input_ids"]
                        for result in ('{"温度": 21}', {"温度": 21}))
    assert np.array_equal(as_dict, as_text)


def test_building_a_prompt_leaves_the_history_as_it_was(tokenizer):
    history = [{"role": "system", "content": "x", "tools": [{"name": "f"}]}]
    tokenizer.build_chat_input("你好", history)
    assert history == [{"role": "system", "content": "x", "tools": [{"name": "f"}]}]


def test_an_unknown_role_is_an_error_that_lists_the_roles(tokenizer):
    for call in (lambda: tokenizer.build_chat_input("x", role="bot"),
                 lambda: tokenizer.build_chat_input("x", [{"role": "bot", "content": "y"}]),
                 lambda: tokenizer.build_single_message("bot", "", "y")):
        with pytest.raises(PromptError, match="'bot'; expected one of system, user, assistant, observation"):
            call()


@pytest.mark.parametrize("message", ["hello", None, {"role": "user"}, {"role": "user", "content": 5}, {}])
def test_a_malformed_message_is_a_clear_error(tokenizer, message):
    with pytest.raises(PromptError, match="not a message.*expected a dict with a role"):
        tokenizer.build_chat_input("x", [message])


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["list"]])
def test_encoding_something_that_is_no_text_is_a_clear_error(tokenizer, text):
    with pytest.raises(DataError, match="expected a text, got"):
        tokenizer.encode(text)


def test_a_batch_with_something_that_is_no_text_is_a_clear_error(tokenizer):
    with pytest.raises(DataError, match="expected a text, got NoneType"):
        tokenizer.encode_batch(["a", None])


def test_half_a_surrogate_pair_is_a_clear_error(tokenizer):
    with pytest.raises(DataError, match=r"character 2 is U\+D83D"):
        tokenizer.encode("a\ud83d")
    with pytest.raises(DataError, match=r"character 2 is U\+D83D"):
        tokenizer.encode_batch(["ok", "a\ud83d"])


def test_a_missing_tokenizer_file_is_named(tmp_path):
    for path in (tmp_path / "tokenizer.model", tmp_path):
        with pytest.raises(DataError, match=r"tokenizer\.model: there is no tokenizer file"):
            ChatGLM3Tokenizer(path)


@pytest.mark.parametrize("content, finding", [
    (b"", "is empty"),
    (b"not a model " * 50, "not a SentencePiece model"),
    (b'{"model": {"type": "BPE"}}', "not a SentencePiece model"),
    (b"version https://git-lfs.github.com/spec/v1\nsize 1018370\n", "git lfs pull"),
])
def test_a_file_that_is_no_sentencepiece_model_is_a_clear_error(tmp_path, content, finding):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=finding):
        ChatGLM3Tokenizer(tmp_path / "tokenizer.model")


def test_a_cut_tokenizer_file_is_a_clear_error(tmp_path, small):
    content = small.path.read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[:len(content) // 2])
    with pytest.raises(DataError, match="tokenizer.model"):
        ChatGLM3Tokenizer(tmp_path)


def test_a_model_without_the_needed_ids_is_a_clear_error(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"]), model_prefix=str(tmp_path / "tokenizer"), vocab_size=10,
        bos_id=-1, eos_id=-1, hard_vocab_limit=False, minloglevel=2)
    with pytest.raises(DataError, match="without unk, bos or eos"):
        ChatGLM3Tokenizer(tmp_path)


def test_the_digest_is_that_of_the_file(tmp_path, small):
    shutil.copy(small.path, tmp_path / "copy.model")
    assert ChatGLM3Tokenizer(tmp_path / "copy.model").digest == small.digest
