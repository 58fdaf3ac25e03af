"""The embedded data keeps what its generator promises, and the generator makes it again."""

import json
import re

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from glm3kit import tiny
from glm3kit.text.messages import conversation_ids
from tiny_data.generate_data import VALUES, asked_contents, content_key, generate, train_tokenizer, value_pieces
from tiny_data.grammar import ATTRIBUTES, GARMENTS, KIND, found_values, read_content

FILES = (tiny.TOKENIZER, tiny.TRAIN, tiny.DEV, tiny.CONVERSATIONS)


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def train():
    return read_lines(tiny.TRAIN)


@pytest.fixture(scope="module")
def dev():
    return read_lines(tiny.DEV)


@pytest.fixture(scope="module")
def records():
    return read_lines(tiny.CONVERSATIONS)


def test_generating_again_gives_the_same_bytes(tmp_path):
    generate(tmp_path)
    for path in FILES:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in FILES)


def test_another_seed_gives_other_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_data.generate_data.train_tokenizer", lambda texts: tiny.TOKENIZER.read_bytes())
    generate(tmp_path, seed=1)
    assert (tmp_path / "train.json").read_bytes() != tiny.TRAIN.read_bytes()


def test_there_is_enough_and_not_too_much(train, dev, records):
    assert len(train) >= 2400 and len(dev) >= 240 and len(records) >= 400
    assert sum(path.stat().st_size for path in FILES) < 2_500_000


def test_rows_have_three_to_seven_attributes_of_the_known_values(train, dev):
    for row in train + dev:
        assert list(row) == ["content", "summary"]
        (kind, garment), *pairs = read_content(row["content"])
        assert kind == KIND and garment in GARMENTS and 2 <= len(pairs) <= 6
        assert len({name for name, _ in pairs}) == len(pairs)
        assert all(value in ATTRIBUTES[name].values for name, value in pairs)


def test_a_summary_holds_every_value_of_its_row_and_no_other(train, dev):
    for row in train + dev:
        values = [value for _, value in read_content(row["content"])]
        assert all(value in row["summary"] for value in values), row
        assert sorted(found_values(row["summary"])) == sorted(values), row


def test_a_summary_has_another_order_than_its_content(train, dev):
    for row in train + dev:
        values = [value for _, value in read_content(row["content"])][1:]
        assert sorted(values, key=row["summary"].index) != values, row


def test_each_attribute_has_eight_to_twenty_five_values_that_no_other_has():
    assert all(8 <= len(each.values) <= 25 for each in ATTRIBUTES.values())
    values = [value for each in ATTRIBUTES.values() for value in each.values]
    assert len(set(values)) == len(values)


def test_held_out_contents_do_not_occur_in_training(train, dev, records):
    held_out = {content_key(row["content"]) for row in dev}
    asked = [content for record in records for content in asked_contents(record)]
    assert len(held_out) == len(dev) and len(asked) > 200
    assert not held_out & {content_key(content) for content in [row["content"] for row in train] + asked}


def test_no_row_and_no_record_occurs_twice(train, dev, records):
    for items in (train, dev, train + dev, records):
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        assert len(set(lines)) == len(lines)


def test_rows_differ_in_wording(train):
    """Paragraphs with their values taken out: hardly two of them are the same."""
    patterns = {re.sub("|".join(sorted(VALUES, key=len, reverse=True)), "_", row["summary"]) for row in train}
    assert len(patterns) > 0.95 * len(train)


def test_all_roles_occur_and_most_records_ask_for_an_advertisement(records):
    roles = {turn["role"] for record in records for turn in record["conversations"]}
    assert roles == {"system", "user", "assistant", "tool"}
    assert sum(bool(asked_contents(record)) for record in records) > len(records) / 2
    assert sum("tools" in record for record in records) > 50
    assert all(record["conversations"][-1]["role"] == "assistant" for record in records)


def test_an_advertisement_in_a_chat_holds_every_value_asked_for(records):
    for record in records:
        turns = record["conversations"]
        for asked, answer in zip(turns, turns[1:], strict=False):
            if asked["role"] == "user" and f"{KIND}#" in asked["content"]:
                content = asked["content"][asked["content"].index(f"{KIND}#"):]
                assert all(value in answer["content"] for _, value in read_content(content))


def test_tool_calls_fit_the_tool_and_answers_use_the_observation(records):
    for record in (record for record in records if "tools" in record):
        (tool,), (_, call, answer) = record["tools"], record["conversations"]
        assert call["name"] == tool["name"]
        assert list(call["parameters"]) == tool["parameters"]["required"] == list(tool["parameters"]["properties"])
        assert all(str(value) in answer["content"] for value in call["observation"].values() if value != 0)


def test_rows_and_records_fit_the_token_budgets(train, dev, records, tokenizer):
    for row in train + dev:
        assert len(tokenizer.encode(row["content"])) <= 64
        assert len(tokenizer.encode(row["summary"], add_special_tokens=False)) <= 126
    assert max(len(conversation_ids(record, tokenizer)[0]) for record in records) <= 192


def test_a_value_is_one_or_two_tokens_the_same_in_content_and_summary(train, dev, tokenizer):
    for row in train + dev:
        for _, value in read_content(row["content"]):
            pieces = value_pieces(tokenizer, row["content"], value)
            assert pieces is not None and len(pieces) <= 2
            assert pieces == value_pieces(tokenizer, row["summary"], value)


def test_the_tokenizer_has_the_published_form(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny.TOKENIZER))
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    assert pieces.vocab_size() == 2000
    assert all(pieces.is_byte(3 + byte) for byte in range(256))
    assert tokenizer.special_tokens["[MASK]"] == 2000 and tokenizer.vocab_size == 2009


def test_the_tokenizer_has_the_published_settings(shared):
    """Specifications of both models, but for what names the training run and its size."""
    ours, published = sentencepiece_model_pb2.ModelProto(), sentencepiece_model_pb2.ModelProto()
    ours.ParseFromString(tiny.TOKENIZER.read_bytes())
    published.ParseFromString((shared / "data/tokenizer/tokenizer.model").read_bytes())
    for setting in ("name", "precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces",
                    "escape_whitespaces", "normalization_rule_tsv"):  # fmt: skip
        assert getattr(ours.normalizer_spec, setting) == getattr(published.normalizer_spec, setting), setting
    for setting in ("model_type", "byte_fallback", "split_digits", "split_by_whitespace", "split_by_unicode_script",
                    "allow_whitespace_only_pieces", "treat_whitespace_as_suffix", "unk_surface"):  # fmt: skip
        assert getattr(ours.trainer_spec, setting) == getattr(published.trainer_spec, setting), setting
    assert not ours.trainer_spec.input and not ours.trainer_spec.model_prefix, "names of files stand in the model"


@pytest.mark.parametrize(
    "text",
    ["全角ＡＢＣ１２３，。！？", "two  spaces   and four    ", "a\nb\n\n    c\n", "\ttab", " 前", "类型#裙*颜色#红色",
     "🙂👗", "e\u0301é ﬁ"],  # an accent of its own and a ligature: what a normaliser would change
)
def test_every_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_new_lines_are_bytes_and_digits_stand_alone(tokenizer):
    pieces = [tokenizer.piece(id_) for id_ in tokenizer.encode("12\n    34", add_special_tokens=False)]
    assert pieces == ["▁", "1", "2", "<0x0A>", "▁▁▁▁", "3", "4"]


def test_an_emoji_becomes_its_bytes(tokenizer):
    pieces = [tokenizer.piece(id_) for id_ in tokenizer.encode("🙂", add_special_tokens=False)]
    assert pieces == ["▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]


def test_training_the_tokenizer_does_not_depend_on_earlier_training():
    texts = ["类型#裙*颜色#红色", "这条裙子以红色为主色调。"] * 2000 + ["".join(map(chr, range(0x4E00, 0x5200)))] * 3
    assert train_tokenizer(texts) == train_tokenizer(texts)
