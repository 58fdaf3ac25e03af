"""How good a fine-tuned model is: held-out loss, attribute coverage, Rouge and BLEU.

Rouge and BLEU are those of MindFormers' ADGEN metric, so that numbers compare: Rouge-1/2/L F on words cut by jieba,
BLEU-4 on characters with smoothing method 3, both times 100 and averaged over the rows.

    glm3kit evaluate configs/tiny.yaml model.checkpoint_name_or_path=output/tiny/merged.safetensors
"""

import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from glm3kit.config.groups import RunConfig
from glm3kit.data.batches import Batches
from glm3kit.data.encode import prepare_data
from glm3kit.data.rows import read_rows
from glm3kit.errors import DataError
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

TOKENS_AT_ONCE = 8192  # of all rows that are answered together, each counted as a whole window

if TYPE_CHECKING:
    from glm3kit.model.chatglm3 import ChatGLM3


def attribute_values(content: str) -> list[str]:
    """The values of an ADGEN source: "类型#裙*颜色#红色" -> ["裙", "红色"]."""
    return [value for pair in content.split("*") if (value := pair.rpartition("#")[2].strip())]


def attribute_coverage(rows: Iterable[Mapping[str, Any]], answers: Iterable[str],
                       column: str = "content") -> tuple[int, int]:
    """Count the attribute values of the rows that occur in their answers: (found, total).

    Example: rows [{"content": "类型#裙*颜色#红色"}] and answers ["红色的上衣"] -> (1, 2)
    """
    found = [value in answer for row, answer in zip(rows, answers, strict=True)
             for value in attribute_values(row[column])]
    return sum(found), len(found)


@cache
def _word_cutter() -> Callable[[str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba's use of pkg_resources is not the reader's concern
        import jieba  # here: slow to load, and with warnings
    jieba.setLogLevel(logging.WARNING)  # it announces its dictionary on stderr
    cutter = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:  # not the shared /tmp/jieba.cache, which anybody could have written
        cutter.tmp_dir = folder
        cutter.initialize()
    return cutter.lcut


def _scores(prediction: str, reference: str) -> dict[str, float]:
    """Rouge-1/2/L F and BLEU-4 of one answer, from 0 to 1; an answer of white space alone scores 0."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # here: slow to load
    from rouge_chinese import Rouge  # here: slow to load

    names = ("rouge-1", "rouge-2", "rouge-l")
    if not prediction.strip() or not reference.strip():
        return dict.fromkeys((*names, "bleu-4"), 0.0)
    cut = _word_cutter()
    (rouge,) = Rouge().get_scores(" ".join(cut(prediction)), " ".join(cut(reference)))
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3)
    return {name: rouge[name]["f"] for name in names} | {"bleu-4": bleu}


def rouge_bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Rouge-1, Rouge-2, Rouge-L (F) and BLEU-4 of Chinese answers, each from 0 to 100, averaged over the answers.

    Raises DataError if there are no answers or not as many as references.
    Example: rouge_bleu(["我爱北京"], ["我爱北京天安门"])["rouge-1"] -> 85.7 (3 of 3 words right, 3 of 4 found)
    """
    if not predictions or len(predictions) != len(references):
        raise DataError(f"Rouge and BLEU: got {len(predictions)} predictions and {len(references)} references; "
                        "expected one reference a prediction, and at least one")
    scores = [_scores(*pair) for pair in zip(predictions, references, strict=True)]
    return {name: 100 * sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def answer_text(output: np.ndarray, prompt: Sequence[int], tokenizer: ChatGLM3Tokenizer) -> str:
    """The text that follows the prompt in one row of `net.generate`, without the stop id.

    Ids that only pad the vocabulary have no text and are left out: an untrained model makes them, too.
    """
    ids = [int(i) for i in output[len(prompt):]]
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size and i not in tokenizer.stop_ids])


def predict_rows(net: "ChatGLM3", tokenizer: ChatGLM3Tokenizer, rows: Sequence[Mapping[str, Any]], config: RunConfig,
                 progress: bool = True) -> list[str]:
    """Greedy answers to the sources of ADGEN rows; TOKENS_AT_ONCE, or at least a training batch, go together.

    The prompt is the one trained on: [gMASK] sop and the source, cut to `data.max_source_length`. An answer ends at a
    stop id, after `generate.max_new_tokens` (else `data.max_target_length`) tokens, or where the window ends.
    """
    data = config.data
    at_once = min(max(config.train.batch_size, TOKENS_AT_ONCE // config.model.seq_length), len(rows))
    limit = config.generate.max_new_tokens or data.max_target_length
    prompts = [tokenizer.encode(row[data.origin_columns[0]], max_length=data.max_source_length) for row in rows]
    answers = []
    with tqdm(total=len(prompts), desc="answers", unit="row", disable=not progress) as bar:
        for start in range(0, len(prompts), at_once):
            batch = prompts[start : start + at_once]
            filled = batch + batch[:1] * (at_once - len(batch))  # one number of rows: one compiled graph
            outputs = net.generate(filled, max_new_tokens=limit, eos_token_id=tokenizer.stop_ids)
            answers += [answer_text(*pair, tokenizer) for pair in zip(outputs, batch, strict=False)]
            bar.update(len(batch))
    return answers


def evaluate(config: RunConfig, net: "ChatGLM3 | None" = None, progress: bool = True) -> dict[str, Any]:
    """Measure a model on the rows of `data.eval_path`.

    net: the model; without one it is built from `config.model` with the weights of `model.checkpoint_name_or_path`.
    Returns {"rows", "loss", "perplexity"} and, where there are rows of ADGEN's form, "attributes_found",
    "attributes_total", "rouge-1", "rouge-2", "rouge-l", "bleu-4" and "answers", a list of the rows with their "answer".
    Raises DataError if there is nothing to measure on, CheckpointError for weights that do not fit.
    """
    from glm3kit.model.held_out import HeldOutLoss  # here: the measures of texts need no MindSpore
    from glm3kit.model.load import AutoModel  # here: as above

    if not config.data.eval_path:
        raise DataError("evaluate: data.eval_path names no file; give held-out rows, such as dev.json")
    held_out = config.data.model_copy(update={"train_path": ()})  # the training rows are not needed here
    tokens = prepare_data(config.model_copy(update={"data": held_out}), progress)["eval"]
    if net is None:
        net = AutoModel.from_config(config.model)
    batches = Batches(tokens, config.train.batch_size, config.model.seq_length, shuffle=False, drop_last=False)
    loss = HeldOutLoss(net).mean(tqdm(batches, "held-out loss", unit="batch", disable=not progress))
    perplexity = math.exp(min(loss, 700.0))  # a float holds no more, and a model so far off needs no more digits
    result: dict[str, Any] = {"rows": len(tokens), "loss": loss, "perplexity": perplexity}

    source, target = config.data.origin_columns
    rows = [row for row in read_rows(config.data.eval_path, config.data) if source in row and target in row]
    if rows:
        tokenizer = ChatGLM3Tokenizer(config.model.tokenizer_path)
        answers = predict_rows(net, tokenizer, rows, config, progress)
        found, total = attribute_coverage(rows, answers, source)
        result |= {"attributes_found": found, "attributes_total": total}
        result |= rouge_bleu(answers, [row[target] for row in rows])
        result["answers"] = [row | {"answer": answer} for row, answer in zip(rows, answers, strict=True)]
    return result
