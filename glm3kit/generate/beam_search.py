"""Beam search: the most likely continuation among those that a few beams follow.

Scores, stopping rules and the number of candidates are those of Transformers 5 (`GenerationMixin._beam_search`).

    new_ids = beam_search(logits, advance, prompt, limit=64, GenerateConfig(num_beams=4))
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from glm3kit.config.groups import GenerateConfig
from glm3kit.generate.sampling import penalised


class Beam(NamedTuple):
    """A continuation: its ids, the sum of their log-probabilities, and the row of the cache that it came from."""

    ids: list[int]
    score: float
    parent: int = 0


def _candidates(logits: np.ndarray, beams: list[Beam], prompt: list[int], count: int, penalty: float) -> list[Beam]:
    """The `count` most likely continuations by one token, the best first. logits: (beams, V)."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    scores = penalised(scores, [prompt + beam.ids for beam in beams], penalty)
    totals = (scores + np.array([[beam.score] for beam in beams])).ravel()
    count = min(count, totals.size)
    best = np.argpartition(-totals, count - 1)[:count]
    best = best[np.argsort(-totals[best], kind="stable")]
    parents, tokens = np.divmod(best, logits.shape[1])
    return [Beam([*beams[parent].ids, int(token)], float(totals[place]), int(parent))
            for place, parent, token in zip(best, parents, tokens, strict=True)]


def beam_search(logits: np.ndarray, advance: Callable[[list[int], list[int]], np.ndarray], prompt: list[int],
                limit: int, settings: GenerateConfig) -> list[int]:
    """The new ids of the best continuation of a prompt, the stop id that ended it included.

    logits: (num_beams, V) after the prompt, of rows that are all alike.
    advance: callable (parents, tokens) -> logits (num_beams, V): row i goes on from row parents[i] with tokens[i].
    limit: of prompt and new ids together.

    A continuation ends with a stop id or at the limit; one that has ended is worth its sum of log-probabilities divided
    by (number of new ids) ** length_penalty. Only a continuation among the num_beams best of its step may end. The
    search is over when num_beams have ended and, unless early_stopping is True, no open beam is worth more now than
    the least of them, its length taken as it is (early_stopping False) or, with a positive length_penalty, as the
    greatest there can be ("never").
    """
    width, stop_ids, penalty = settings.num_beams, settings.eos_token_id, settings.length_penalty
    reach = limit - len(prompt) if settings.early_stopping == "never" and penalty > 0 else None  # new ids
    most = max(2, 1 + len(stop_ids)) * width  # enough to go on when the best all end
    beams, ended = [Beam([], 0.0)], []
    for length in range(1, limit - len(prompt) + 1):
        found = _candidates(logits[:len(beams)], beams, prompt, most, settings.repetition_penalty)
        last = len(prompt) + length == limit
        ending = [last or beam.ids[-1] in stop_ids for beam in found]
        ended += [Beam(beam.ids, beam.score / length**penalty)
                  for beam, ends in zip(found[:width], ending, strict=False) if ends]
        ended = sorted(ended, key=lambda beam: -beam.score)[:width]
        beams = [beam for beam, ends in zip(found, ending, strict=True) if not ends][:width]
        if not beams:
            break
        if len(ended) == width:
            if settings.early_stopping is True or beams[0].score / (reach or length)**penalty <= ended[-1].score:
                break
        padding = width - len(beams)  # rows that nobody looks at
        logits = advance([beam.parent for beam in beams] + [0] * padding,
                         [beam.ids[-1] for beam in beams] + [0] * padding)
    return ended[0].ids
