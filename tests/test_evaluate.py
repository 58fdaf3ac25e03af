"""Measures: held against hand arithmetic, and against a model whose answers are known."""

import json
import math
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from support import TOKENIZER

from glm3kit.config.groups import DataConfig, GenerateConfig, ModelConfig, RunConfig, TrainConfig
from glm3kit.errors import DataError
from glm3kit.evaluate import (
    answer_text,
    attribute_coverage,
    attribute_values,
    evaluate,
    predict_rows,
    rouge_bleu,
)
from glm3kit.model.held_out import HeldOutLoss

ROWS = [{"content": "类型#裙*颜色#红色", "summary": "这条红色的裙子很好看。"},
        {"content": "类型#上衣*版型#宽松*颜色#蓝色", "summary": "蓝色的上衣，宽松。"},
        {"content": "类型#裤*颜色#黑色", "summary": "黑色的裤子。"}]


class ScriptedNet(nn.Cell):
    """A model that answers each ADGEN row as told, and whose loss is the sum of the labels that count."""

    def __init__(self, tokenizer, answers, stop_id=2):
        super().__init__()
        self.answers = {tuple(tokenizer.encode(source)): tokenizer.encode(answer, add_special_tokens=False)
                        for source, answer in answers.items()}
        self.stop_id = stop_id
        self.batches = []  # (number of prompts, max_new_tokens, eos_token_id) of each call

    def generate(self, prompts, max_new_tokens, eos_token_id):
        self.batches.append((len(prompts), max_new_tokens, tuple(eos_token_id)))
        return [np.array([*prompt, *self.answers[tuple(prompt)], self.stop_id], np.int32) for prompt in prompts]

    def loss_sum(self, input_ids, labels, segment_ids=None):
        return (labels.astype(ms.float32) * (labels >= 0).astype(ms.float32)).sum()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return RunConfig(output_dir=str(tmp_path / "output"), train=TrainConfig(batch_size=2),
                     model=ModelConfig(tokenizer_path=str(TOKENIZER), padded_vocab_size=2048),
                     data=DataConfig(eval_path=str(path), max_source_length=32, max_target_length=31))


def test_words_and_characters_of_a_shortened_answer_score_as_by_hand():
    # jieba: 我 爱 北京 against 我 爱 北京 天安门: 3 of 3 words right, 3 of 4 found; bigrams 2 of 2 and 2 of 3
    scores = rouge_bleu(["我爱北京"], ["我爱北京天安门"])
    assert scores["rouge-1"] == pytest.approx(100 * 2 * 1 * (3 / 4) / (1 + 3 / 4))
    assert scores["rouge-2"] == pytest.approx(100 * 2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert scores["rouge-l"] == pytest.approx(scores["rouge-1"])
    # every n-gram of the 4 characters is in the reference of 7: only the brevity penalty counts
    assert scores["bleu-4"] == pytest.approx(100 * math.exp(1 - 7 / 4))


def test_missing_ngrams_are_smoothed_by_method_3():
    # characters right: 2 of 4, bigrams 1 of 3, no trigram of 2 -> 1/(2 * 2), no 4-gram of 1 -> 1/(4 * 1)
    expected = 100 * (1 / 2 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25
    assert rouge_bleu(["我爱你呀"], ["我爱北京"])["bleu-4"] == pytest.approx(expected)


def test_equal_answers_score_100_and_scores_are_averaged_over_the_answers():
    names = {"rouge-1", "rouge-2", "rouge-l", "bleu-4"}
    assert rouge_bleu(["红色的裙子很好看"], ["红色的裙子很好看"]) == pytest.approx(dict.fromkeys(names, 100))
    assert rouge_bleu(["红色的裙子很好看", ""], ["红色的裙子很好看"] * 2) == pytest.approx(dict.fromkeys(names, 50))


@pytest.mark.parametrize("answer", ["", " ", "\n\n", "。", "......", "? ?", "\x00", "😀"])
def test_an_answer_that_shares_nothing_scores_0(answer):
    assert rouge_bleu([answer], ["蓝色的上衣"]) == dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "bleu-4"), 0)


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["一"], ["一", "二"])])
def test_scores_of_nothing_or_of_unequal_numbers_are_an_error(predictions, references):
    with pytest.raises(DataError, match="one reference a prediction"):
        rouge_bleu(predictions, references)


def test_cutting_words_prints_nothing_and_leaves_no_file(tmp_path):
    code = "from glm3kit.evaluate import rouge_bleu; rouge_bleu(['我爱北京'], ['我爱'])"
    done = subprocess.run([sys.executable, "-c", code], env={"TMPDIR": str(tmp_path), "PATH": "", "GLOG_v": "3"},
                          cwd=TOKENIZER.parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_attribute_values_are_what_follows_the_hash():
    assert attribute_values("类型#裙*颜色#红色*颜色#白色") == ["裙", "红色", "白色"]
    assert attribute_values("裙*颜色#*") == ["裙"]
    assert attribute_values("") == []


def test_attribute_coverage_counts_the_values_that_occur():
    assert attribute_coverage(ROWS, ["红色的裙子", "宽松", ""]) == (2 + 1 + 0, 2 + 3 + 2)


def test_held_out_loss_weighs_every_token_alike(tokenizer):
    # labels that count: 1, 2, 3 in one batch and 8 in another; a batch that counts nothing changes nothing
    batches = [np.array([[1, 2, -100], [-100, 3, -100]]), np.array([[8, -100, -100]]), np.array([[-100, -100, -100]])]
    net = ScriptedNet(tokenizer, {})
    assert HeldOutLoss(net).mean([(np.zeros_like(labels), labels) for labels in batches]) == (1 + 2 + 3 + 8) / 4


def test_a_model_in_training_is_so_again_after_measuring_even_where_a_batch_fails(tokenizer):
    net = ScriptedNet(tokenizer, {}).set_train()
    with pytest.raises(TypeError, match="positional argument"):
        HeldOutLoss(net).mean([(np.zeros((1, 2)),)])
    assert net.training


def test_held_out_loss_of_no_tokens_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no label counts"):
        HeldOutLoss(ScriptedNet(tokenizer, {})).mean([(np.zeros((1, 2)), np.full((1, 2), -100))])


@pytest.mark.parametrize("stop", ["eos", "user"])
def test_answers_come_in_batches_in_order_and_end_before_the_stop_id(tokenizer, config, stop, monkeypatch):
    monkeypatch.setattr("glm3kit.evaluate.TOKENS_AT_ONCE", 64)  # a row of this window
    stop_id = tokenizer.stop_ids[0] if stop == "eos" else tokenizer.role_id("user")
    net = ScriptedNet(tokenizer, {row["content"]: row["summary"] for row in ROWS}, stop_id)
    assert predict_rows(net, tokenizer, ROWS, config, progress=False) == [row["summary"] for row in ROWS]
    assert net.batches == [(2, 31, tokenizer.stop_ids)] * 2  # train.batch_size rows, the last batch filled up


def test_ids_that_only_pad_the_vocabulary_have_no_text(tokenizer):
    prompt, answer = [1, 2, 3], tokenizer.encode("红色", add_special_tokens=False)
    output = np.array([*prompt, tokenizer.vocab_size, *answer, 2047, tokenizer.eos_id], np.int32)
    assert answer_text(output, prompt, tokenizer) == "红色"


def test_max_new_tokens_of_the_configuration_limits_the_answers(tokenizer, config):
    config = config.model_copy(update={"generate": GenerateConfig(max_new_tokens=5)})
    net = ScriptedNet(tokenizer, {row["content"]: "好" for row in ROWS})
    predict_rows(net, tokenizer, ROWS, config, progress=False)
    assert {limit for _, limit, _ in net.batches} == {5}


def test_a_model_that_answers_with_the_references_scores_100_and_covers_every_attribute(tokenizer, config):
    net = ScriptedNet(tokenizer, {row["content"]: row["summary"] for row in ROWS})
    result = evaluate(config, net, progress=False)
    assert result["rows"] == 3
    assert (result["attributes_found"], result["attributes_total"]) == (7, 7)
    assert result["bleu-4"] == pytest.approx(100)
    assert [row["answer"] for row in result["answers"]] == [row["summary"] for row in ROWS]
    # the scripted loss is the mean of the labels: every answer token and its end, of every row, counts once
    labels = [i for row in ROWS for i in [*tokenizer.encode(row["summary"], add_special_tokens=False), 2]]
    assert result["loss"] == pytest.approx(np.mean(labels), rel=1e-6)


def test_evaluating_without_held_out_rows_is_an_error(config):
    nothing = config.model_copy(update={"data": config.data.model_copy(update={"eval_path": ()})})
    with pytest.raises(DataError, match=r"data\.eval_path"):
        evaluate(nothing, progress=False)
