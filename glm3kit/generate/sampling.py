"""How to choose tokens: the settings of generation, and probabilities as Transformers' logits processors make them.

    probs = sampling_probabilities(logits, previous_ids, temperature=0.8, top_k=0, top_p=0.8, repetition_penalty=1.0)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glm3kit.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """How to generate. Lengths are in tokens; every limit that is given holds.

    max_length: prompt and answer together, at most and by default the model's window.
    max_new_tokens: of the answer. An answer also ends where the window ends.
    do_sample: draw tokens with temperature, top_k (0: all) and top_p; else always the most likely one.
    repetition_penalty: above 1.0 makes tokens of prompt and answer less likely (https://arxiv.org/abs/1909.05858).
    eos_token_id: an id or several that end an answer, and are part of it; [] never ends one.
    seed: makes draws repeatable; a row's draws depend on the seed and its place in the batch.
    num_beams: above 1 searches for the most likely answer with so many beams; not together with do_sample.
    length_penalty: of beam search; above 0 longer answers gain, below 0 shorter ones.
    early_stopping: of beam search: end with the first num_beams answers (True), when no better one is likely (False),
        or when no better one is possible ("never").
    Raises ConfigError with every setting that is out of its range.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_id: int | Sequence[int] = (2, 64795, 64797)  # </s>, <|user|>, <|observation|>
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        stop_ids = np.atleast_1d(np.asarray(self.eos_token_id))
        rules = {
            "max_length": (self.max_length is None or self.max_length >= 1, "at least 1, or None"),
            "max_new_tokens": (self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1, or None"),
            "temperature": (0 < self.temperature < np.inf, "above 0 (do_sample=False takes the most likely token)"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all tokens)"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < np.inf, "above 0 (1.0: none)"),
            "eos_token_id": (stop_ids.size == 0 or stop_ids.dtype.kind in "iu", "an id, a list of ids, or [] for none"),
            "seed": (self.seed is None or self.seed >= 0, "at least 0, or None"),
            "num_beams": (self.num_beams >= 1 and not (self.num_beams > 1 and self.do_sample),
                          "at least 1 (1: no beam search), and 1 with do_sample"),
            "length_penalty": (bool(np.isfinite(self.length_penalty)), "a number"),
            "early_stopping": (self.early_stopping in (True, False, "never"), "True, False or 'never'"),
        }
        faults = [f"{name} is {getattr(self, name)}, expected {expected}"
                  for name, (holds, expected) in rules.items() if not holds]
        if faults:
            raise ConfigError("generate: " + "; ".join(faults))

    @property
    def stop_ids(self) -> frozenset[int]:
        """`eos_token_id` as a set."""
        return frozenset(np.atleast_1d(np.asarray(self.eos_token_id, dtype=int)).tolist())


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


def choose(logits: np.ndarray, previous_ids: list[int], settings: Settings, rng: np.random.Generator) -> int:
    """The next id of one row: logits (V,) and all its ids so far -> id."""
    if not settings.do_sample:
        return int(penalised(logits[None], [previous_ids], settings.repetition_penalty).argmax())
    probs = sampling_probabilities(
        logits[None], [previous_ids], temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty)[0]
    return int(rng.choice(len(probs), p=probs))
