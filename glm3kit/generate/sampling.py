"""How to choose tokens: probabilities as Transformers' logits processors make them, and draws from them.

    probs = sampling_probabilities(logits, previous_ids, temperature=0.8, top_k=0, top_p=0.8, repetition_penalty=1.0)
"""

from collections.abc import Sequence

import numpy as np

from glm3kit.config.groups import GenerateConfig


def penalised(logits: np.ndarray, previous_ids: Sequence[Sequence[int]], penalty: float) -> np.ndarray:
    """Logits (B, V) with those of each row's previous ids lowered: divided by the penalty, if negative multiplied."""
    logits = logits.astype(np.float64)
    if penalty != 1.0:
        for row, ids in enumerate(previous_ids):
            ids = np.unique(ids)
            old = logits[row, ids]
            logits[row, ids] = np.where(old < 0, old * penalty, old / penalty)
    return logits


def sampling_probabilities(logits: np.ndarray, previous_ids: Sequence[Sequence[int]], *, temperature: float,
                           top_k: int, top_p: float, repetition_penalty: float) -> np.ndarray:
    """Probability of every token to come next, float64 (B, V); computed as Transformers' logits processors do.

    logits: (B, V); previous_ids: the ids of each row so far, prompt included, (B, any length).
    top_k: keep the k most likely tokens, 0 keeps all; equals of the k-th are kept too.
    top_p: keep the fewest most likely tokens that together reach top_p, at least one.
    Example: sampling_probabilities(np.log([[1, 2, 1]]), [[]], temperature=1, top_k=1, top_p=1, repetition_penalty=1)
        -> [[0, 1, 0]]
    """
    scores = penalised(logits, previous_ids, repetition_penalty) / temperature
    if 0 < top_k < scores.shape[1]:
        kth = np.partition(scores, -top_k, axis=1)[:, -top_k, None]
        scores[scores < kth] = -np.inf
    probs = np.exp(scores - scores.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    if top_p < 1:
        order = np.argsort(probs, axis=1)  # the least likely first
        dropped = np.cumsum(np.take_along_axis(probs, order, 1), axis=1) <= 1 - top_p
        dropped[:, -1] = False
        np.put_along_axis(probs, order, np.where(dropped, 0, np.take_along_axis(probs, order, 1)), 1)
        probs /= probs.sum(axis=1, keepdims=True)
    return probs


def choose(logits: np.ndarray, previous_ids: list[int], settings: GenerateConfig, rng: np.random.Generator) -> int:
    """The next id of one row: logits (V,) and all its ids so far -> id."""
    if not settings.do_sample:
        return int(penalised(logits[None], [previous_ids], settings.repetition_penalty).argmax())
    probs = sampling_probabilities(
        logits[None], [previous_ids], temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty)[0]
    return int(rng.choice(len(probs), p=probs))
