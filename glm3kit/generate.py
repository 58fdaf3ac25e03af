"""Generation: greedy or sampled, with a kv cache of fixed size and compiled graphs that all prompts share.

A prompt is padded on the right to one of a few lengths and runs through the graph for that length; then another graph
makes a token a call. Sampling follows Transformers' logits processors: repetition penalty, temperature, top-k, top-p.

    answer = net.generate([64790, 64792, 30910], max_new_tokens=20)[0]
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from glm3kit.errors import ConfigError, Glm3KitError, PromptError
from glm3kit.model import MASKED, ChatGLM3

SHORTEST_PREFILL = 64  # tokens; padding a shorter prompt costs less than compiling one more graph


@dataclass(frozen=True)
class Settings:
    """How to generate. Lengths are in tokens; every limit that is given holds.

    max_length: prompt and answer together, at most and by default the model's window.
    max_new_tokens: of the answer. An answer also ends where the window ends.
    do_sample: draw tokens with temperature, top_k (0: all) and top_p; else always the most likely one.
    repetition_penalty: above 1.0 makes tokens of prompt and answer less likely (https://arxiv.org/abs/1909.05858).
    eos_token_id: an id or several that end an answer, and are part of it; [] never ends one.
    seed: makes draws repeatable; a row's draws depend on the seed and its place in the batch.
    num_beams: 1, as there is no beam search.
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
            "num_beams": (self.num_beams == 1, "1: there is no beam search"),
        }
        faults = [f"{name} is {getattr(self, name)}, expected {expected}"
                  for name, (holds, expected) in rules.items() if not holds]
        if faults:
            raise ConfigError("generate: " + "; ".join(faults))

    @property
    def stop_ids(self) -> frozenset[int]:
        """`eos_token_id` as a set."""
        return frozenset(np.atleast_1d(np.asarray(self.eos_token_id, dtype=int)).tolist())


def _penalised(logits: np.ndarray, previous_ids: Sequence[Sequence[int]], penalty: float) -> np.ndarray:
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
    scores = _penalised(logits, previous_ids, repetition_penalty) / temperature
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


def prompt_rows(input_ids: Any, vocab_size: int) -> list[np.ndarray]:
    """One int32 array a prompt, from a list of ids, a list of such lists (of any lengths), an array or a Tensor.

    Raises PromptError for no prompt, an empty prompt, and what is no id of the vocabulary.
    """
    if isinstance(input_ids, Tensor):
        input_ids = input_ids.asnumpy()
    if isinstance(input_ids, np.ndarray) and input_ids.ndim > 0:
        input_ids = list(input_ids)
    if not isinstance(input_ids, (list, tuple)):
        raise PromptError(f"input_ids is {input_ids!r}, expected a list of ids, or a list of such lists")
    if not input_ids:
        raise PromptError("input_ids is empty; give at least one id, such as what ChatGLM3Tokenizer.encode returns")
    several = isinstance(input_ids[0], (list, tuple, np.ndarray, Tensor))
    rows = []
    for i, row in enumerate(input_ids if several else [input_ids]):
        try:
            ids = row.asnumpy() if isinstance(row, Tensor) else np.asarray(row)
        except ValueError as err:  # a list of numbers and lists
            raise PromptError(f"prompt {i} is no row of integer ids: {err}") from err
        if ids.size == 0:
            raise PromptError(f"prompt {i} is empty; give at least one id")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise PromptError(f"prompt {i} has shape {ids.shape} and type {ids.dtype}, expected a row of integer ids")
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if wrong.size:
            raise PromptError(f"prompt {i} holds the id {wrong[0]}, the model's vocabulary ends at {vocab_size - 1}; "
                              "use tokenizer and model of one kind")
        rows.append(ids.astype(np.int32))
    return rows


def _limits(rows: list[np.ndarray], settings: Settings, window: int) -> list[int]:
    """The length at which each row must end. Raises PromptError if a prompt leaves no room for an answer."""
    if (settings.max_length or 0) > window:
        raise PromptError(f"max_length is {settings.max_length} tokens, the model's window (seq_length) is {window}; "
                          "lower max_length, or raise seq_length")
    longest = settings.max_length or window
    limit = "max_length" if settings.max_length else "the model's window (seq_length)"
    for i, row in enumerate(rows):
        if len(row) >= longest:
            raise PromptError(f"prompt {i} has {len(row)} tokens and {limit} is {longest}: no room for an answer; "
                              f"shorten the prompt, or raise {limit}")
    return [min(longest, len(row) + (settings.max_new_tokens or longest)) for row in rows]


def _weight_addresses(net: ChatGLM3) -> list[int]:
    """Where the weights lie in memory. Training changes them in place; `Parameter.set_data` puts others elsewhere."""
    return [parameter.data_ptr() for parameter in net.get_parameters()]


class Decoder(nn.Cell):
    """A model with a kv cache for B rows of up to S tokens, S the model's window: a graph for each T it is called with.

    (input_ids (B, T), positions (B,) of each row's first token, lengths (B,) without padding on the right)
    -> logits (B, V) after each row's last token, the highest (B,) and the ids they belong to (B, 1), positions of the
    tokens to come (B,)
    """

    def __init__(self, net: ChatGLM3, batch_size: int):
        super().__init__(auto_prefix=False)  # the parameters of the model keep their names
        self.net = net
        cfg, S = net.cfg, net.cfg.seq_length
        groups = net.transformer.encoder.layers[0].self_attention.groups
        rows = batch_size * groups * S  # of keys or values, as SelfAttention writes them: by B, G, S

        def caches(name: str) -> ParameterTuple:
            empty = np.zeros((rows, cfg.kv_channels))
            return ParameterTuple([Parameter(Tensor(empty, getattr(ms, cfg.compute_dtype)), f"{name}.{layer}",
                                             requires_grad=False) for layer in range(cfg.num_layers)])

        self.keys, self.values = caches("cached_keys"), caches("cached_values")
        self.last_slot = S - 1
        self.slots = Tensor(np.arange(S), ms.int32)
        self.first_slots = Tensor(np.arange(0, rows, S).reshape(batch_size, groups, 1), ms.int32)
        self.rows = Tensor(np.arange(batch_size), ms.int32)
        self.highest = ops.ArgMaxWithValue(1)
        self.addresses = _weight_addresses(net)

    def hidden(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Output of the final norm (B, T, C); keys and values of the tokens go into the cache."""
        B, T = input_ids.shape
        # Padding, and rows that have ended, may run past the window: they go to its last slot, which is written
        # again before a token may look at it.
        positions = ops.minimum(positions.reshape(B, 1) + self.slots[:T], self.last_slot)  # (B, T)
        cos = ops.gather(self.net.cos, positions, 0).reshape(B, T, 1, -1)
        sin = ops.gather(self.net.sin, positions, 0).reshape(B, T, 1, -1)
        mask = (self.slots > positions.reshape(B, 1, 1, T, 1)).astype(ms.float32) * MASKED  # (B, 1, 1, T, S)
        slots = (self.first_slots + positions.reshape(B, 1, T)).reshape(-1)  # (B*G*T,)
        caches = ()
        for i in range(len(self.keys)):
            caches += ((self.keys[i], self.values[i]),)
        x = self.net.transformer.embedding(input_ids)
        return self.net.transformer.encoder(x, cos, sin, mask, caches, slots)

    @ms.jit  # a graph in PyNative mode too
    def construct(self, input_ids: Tensor, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        B, T = input_ids.shape
        x = self.hidden(input_ids, positions).reshape(B * T, -1)
        if T > 1:
            x = ops.gather(x, self.rows * T + lengths - 1, 0)  # (B, C)
        logits = self.net.gather(self.net.logits(x))
        ids, highest = self.highest(logits)
        return logits, highest, ids.reshape(B, 1), positions + lengths

    def clear(self) -> None:
        """Fill the cache with zeros: what the mask hides counts nothing, unless it is nan."""
        for cache in (*self.keys, *self.values):
            ops.assign(cache, ops.zeros_like(cache))  # in place, as graphs know it


@contextmanager
def _decoder(net: ChatGLM3, batch_size: int) -> Iterator[Decoder]:
    """Lend an idle decoder of the model, else a new one: two generations at a time never share a cache.

    An idle one whose weights have been replaced is dropped: its graphs would go on with those of before.
    """
    idle = net.decoders.setdefault(batch_size, [])
    addresses = _weight_addresses(net)
    try:
        while (decoder := idle.pop()).addresses != addresses:
            pass
    except IndexError:
        decoder = Decoder(net, batch_size)
    try:
        yield decoder
    finally:
        idle.append(decoder)


def _prefill(decoder: Decoder, prompts: list[np.ndarray], window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the prompts, padded on the right to a power of two, so that there are few graphs for all lengths."""
    lengths = [len(row) for row in prompts]
    padded = min(max(SHORTEST_PREFILL, 1 << (max(lengths) - 1).bit_length()), window)
    input_ids = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        input_ids[row, :len(prompt)] = prompt
    return decoder(Tensor(input_ids), Tensor(np.zeros(len(prompts)), ms.int32), Tensor(lengths, ms.int32))


def _draw(logits: np.ndarray, previous_ids: list[int], settings: Settings, rng: np.random.Generator) -> int:
    """The next id of one row: logits (V,) and all its ids so far -> id."""
    if not settings.do_sample:
        return int(_penalised(logits[None], [previous_ids], settings.repetition_penalty).argmax())
    probs = sampling_probabilities(
        logits[None], [previous_ids], temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty)[0]
    return int(rng.choice(len(probs), p=probs))


def _steps(net: ChatGLM3, prompts: list[np.ndarray], limits: list[int],
           settings: Settings) -> Iterator[dict[int, int]]:
    """Yield the new id of every row that still goes on, as {row: id}, until all have ended."""
    ids = [prompt.tolist() for prompt in prompts]
    rngs = [np.random.default_rng(settings.seed if settings.seed is None else [settings.seed, row])
            for row in range(len(ids))]
    on_host = settings.do_sample or settings.repetition_penalty != 1.0
    going = list(range(len(ids)))
    with _decoder(net, len(ids)) as decoder:
        ones = Tensor(np.ones(len(ids)), ms.int32)
        logits, highest, following, positions = _prefill(decoder, prompts, net.cfg.seq_length)
        while True:
            if not np.isfinite(highest.asnumpy()[going]).all():
                decoder.clear()
                raise Glm3KitError(f"generate: the logits after {len(ids[going[0]])} tokens are no finite numbers; "
                                   "check that the weights are whole, and with float16 try compute_dtype float32")
            chosen = following.asnumpy()
            if on_host:
                chosen, rows = chosen.copy(), logits.asnumpy()
                for row in going:
                    chosen[row] = _draw(rows[row], ids[row], settings, rngs[row])
                following = Tensor(chosen)
            new = {row: int(chosen[row, 0]) for row in going}
            for row, token in new.items():
                ids[row].append(token)
            yield new
            going = [row for row in going if new[row] not in settings.stop_ids and len(ids[row]) < limits[row]]
            if not going:
                return
            logits, highest, following, positions = decoder(following, positions, ones)


def generate(net: ChatGLM3, input_ids: Any, **settings: Any) -> list[np.ndarray]:
    """Continue one or several prompts: int32 arrays of prompt and new ids, the stop id that ended a row included.

    input_ids: a list of ids, a list of such lists of any lengths, an array (T,) or (B, T), a Tensor.
    settings: max_length, max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, eos_token_id, seed,
        num_beams, as `Settings` says.
    Each row is what it would be alone, and ends on its own.
    Raises PromptError for prompts that are empty, hold ids outside the vocabulary, or fill the window; ConfigError for
    settings out of range; Glm3KitError if the model gives no numbers.
    Example: generate(net, [[64790, 64792, 30910], [64790, 64792]], max_new_tokens=20)
    """
    chosen = Settings(**settings)
    prompts = prompt_rows(input_ids, net.cfg.padded_vocab_size)
    answers: list[list[int]] = [[] for _ in prompts]
    for new in _steps(net, prompts, _limits(prompts, chosen, net.cfg.seq_length), chosen):
        for row, token in new.items():
            answers[row].append(token)
    return [np.concatenate([prompt, np.array(answer, np.int32)])
            for prompt, answer in zip(prompts, answers, strict=True)]


def stream(net: ChatGLM3, input_ids: Any, **settings: Any) -> Iterator[int]:
    """The new ids of one prompt as they are made, the same as `generate` gives; the last may be a stop id.

    Settings and errors are those of `generate`; errors are raised by this call, not by the first id.
    The iterator may be closed early, and used in any thread.
    Example: for token in stream(net, [64790, 64792, 30910], max_new_tokens=20): print(token)
    """
    chosen = Settings(**settings)
    prompts = prompt_rows(input_ids, net.cfg.padded_vocab_size)
    if len(prompts) > 1:
        raise PromptError(f"stream: got {len(prompts)} prompts, expected one; use generate for several")
    steps = _steps(net, prompts, _limits(prompts, chosen, net.cfg.seq_length), chosen)
    return (new[0] for new in steps)
