"""Beam search: the best of all continuations where the beams hold them all, the cache in step with the beams."""

from itertools import product

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from glm3kit.config.groups import GenerateConfig
from glm3kit.errors import ConfigError
from glm3kit.generate.beam_search import beam_search
from glm3kit.generate.sampling import sampling_probabilities

WORDS, STOP = 4, 3  # a vocabulary of 0, 1, 2 and the stop id 3


@pytest.fixture(scope="module")
def prompt(reference) -> list[int]:
    return reference["greedy.prompt_1"].tolist()


def table_logits(ids: list[int], seed: int) -> np.ndarray:
    """Logits of a language model that is a table: random, but always the same after the same ids."""
    return np.random.default_rng([seed, *ids]).standard_normal(WORDS) * 2


def search(logits_after, prompt: list[int], limit: int, settings: GenerateConfig) -> list[int]:
    """beam_search with a model that computes the logits after a row of ids from the beginning, without a cache."""
    rows = [list(prompt) for _ in range(settings.num_beams)]

    def advance(parents: list[int], tokens: list[int]) -> np.ndarray:
        rows[:] = [[*rows[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        return np.array([logits_after(row) for row in rows])

    return beam_search(np.array([logits_after(row) for row in rows]), advance, prompt, limit, settings)


def best_of_all(seed: int, prompt: list[int], new: int, settings: GenerateConfig) -> list[int]:
    """The best of all continuations of up to `new` ids, each worth what the definition says, by trying every one."""
    worth = {}
    for ids in product(range(WORDS), repeat=new):
        ids = list(ids[:ids.index(STOP) + 1] if STOP in ids else ids)
        score = 0.0
        for i, token in enumerate(ids):
            before = prompt + ids[:i]
            probs = sampling_probabilities(table_logits(before, seed)[None], [before], temperature=1, top_k=0, top_p=1,
                                           repetition_penalty=1)
            score += np.log(probs[0, token])
        worth[tuple(ids)] = score / len(ids) ** settings.length_penalty
    return list(max(worth, key=worth.__getitem__))


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
def test_enough_beams_find_the_best_of_all_continuations(length_penalty):
    settings = GenerateConfig(num_beams=WORDS**3, length_penalty=length_penalty, early_stopping="never",
                              eos_token_id=STOP)
    for seed in range(12):
        found = search(lambda ids, seed=seed: table_logits(ids, seed), [1, 2], 6, settings)
        assert found == best_of_all(seed, [1, 2], 4, settings)


def test_two_beams_follow_by_hand():
    """After 0 the ids 0 and 1 are the best; 1 leads to the best pair, which greedy decoding cannot see."""
    probs = {(): [0.5, 0.4, 0.1, 0], (0,): [0.4, 0.3, 0.3, 0], (1,): [0, 0.1, 0.9, 0], (2,): [0, 0, 1, 0]}

    def logits_after(ids):
        with np.errstate(divide="ignore"):
            return np.log(probs[tuple(ids[1:])])

    forever = {"eos_token_id": []}
    assert search(logits_after, [0], 3, GenerateConfig(num_beams=1, **forever)) == [0, 0]  # 0.5 * 0.4 = 0.2
    assert search(logits_after, [0], 3, GenerateConfig(num_beams=2, **forever)) == [1, 2]  # 0.4 * 0.9 = 0.36


def test_length_penalty_and_early_stopping_choose_by_hand():
    """[3] ends at once with log-probability log 0.4; [0, 3] has 0.35 * 0.9, worth more only per token."""
    probs = {(): [0.35, 0.15, 0.1, 0.4], (0,): [0.05, 0.03, 0.02, 0.9], (1,): [0.25, 0.25, 0.1, 0.4]}

    def logits_after(ids):
        return np.log(probs.get(tuple(ids[1:]), [0.25] * 4))

    settings = {"num_beams": 2, "eos_token_id": STOP}
    for length_penalty, best in ((0.0, [3]), (1.0, [0, 3])):  # log 0.4 > log 0.315, log 0.4 < log 0.315 / 2
        assert search(logits_after, [0], 5, GenerateConfig(length_penalty=length_penalty, **settings)) == best


def test_the_cache_follows_the_beams(net, prompt):
    whole = ms.jit(net.construct)  # a graph: faster than the cell itself

    def logits_after(ids):
        padded = ids + [0] * (20 - len(ids))  # one shape; what follows the last id does not count
        return whole(Tensor([padded], ms.int32)).asnumpy()[0, len(ids) - 1]

    plain = net.generate(prompt, max_new_tokens=8, eos_token_id=[])[0].tolist()
    found = []
    for beams, penalty in ((3, 1.0), (3, 1.6)):
        options = {"num_beams": beams, "eos_token_id": [7, 150], "repetition_penalty": penalty}
        expected = search(logits_after, prompt, len(prompt) + 8, GenerateConfig(**options))
        found.append(net.generate(prompt, max_new_tokens=8, **options)[0].tolist())
        assert found[-1] == prompt + expected
    assert any(ids != plain for ids in found)  # else nothing has been shown


def test_rows_of_a_batch_are_searched_alone(net, prompt):
    options = {"num_beams": 3, "max_new_tokens": 6, "eos_token_id": []}
    rows = net.generate([prompt, prompt[:4]], **options)
    assert [row.tolist() for row in rows] == [net.generate(p, **options)[0].tolist() for p in (prompt, prompt[:4])]


def test_a_stream_of_beams_is_an_error(net):
    with pytest.raises(ConfigError, match="stream: num_beams is 2, expected 1"):
        net.stream([1], num_beams=2)
