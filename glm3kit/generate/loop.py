"""Generation: greedy, sampled or by beam search; whole rows, a stream of ids, or the turns of a conversation.

Sampling follows Transformers' logits processors: repetition penalty, temperature, top-k, top-p.

    answer = net.generate([64790, 64792, 30910], max_new_tokens=20)[0]
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mindspore import Tensor

from glm3kit.config.groups import GenerateConfig
from glm3kit.errors import ConfigError, Glm3KitError, PromptError
from glm3kit.generate.beam_search import beam_search
from glm3kit.generate.decoder import Decoder, LanguageModel, Step, borrow_decoder
from glm3kit.generate.sampling import choose


def prompt_rows(input_ids: Any, vocab_size: int) -> list[np.ndarray]:
    """One int32 array a prompt, from a list of ids, a list of such lists (of any lengths), an array or a Tensor.

    Raises PromptError for no prompt, an empty prompt, and what is no id of the vocabulary.
    """
    if isinstance(input_ids, Tensor):
        input_ids = input_ids.asnumpy()
    if not isinstance(input_ids, (list, tuple)) and np.ndim(input_ids) == 0:
        raise PromptError(f"input_ids is {input_ids!r}, expected a list of ids, or a list of such lists")
    if len(input_ids) == 0:
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


def _limits(rows: list[np.ndarray], settings: GenerateConfig, window: int) -> list[int]:
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


def _settings(net: LanguageModel, values: dict[str, Any], one_by_one: bool = False) -> GenerateConfig:
    """The settings as given; ConfigError for those that do not go with the model, or with tokens one by one.

    Ranks that share a model must not draw each on its own.
    """
    settings = GenerateConfig.checked(**values)
    if settings.do_sample and settings.seed is None and net.topology.tensor_parallel > 1:
        raise ConfigError("generate: seed is None, expected a number: the processes that share this model must all "
                          "draw the same tokens")
    if one_by_one and settings.num_beams > 1:
        raise ConfigError(f"stream: num_beams is {settings.num_beams}, expected 1: beam search knows its first token "
                          "only at the end; use generate")
    return settings


def _check_finite(decoder: Decoder, highest: np.ndarray, tokens: int) -> None:
    """Raise Glm3KitError, with the cache emptied, unless the highest logits after so many tokens are numbers."""
    if not np.isfinite(highest).all():
        decoder.clear()
        raise Glm3KitError(f"generate: the logits after {tokens} tokens are no finite numbers; check that the weights "
                           "are whole, and with float16 try compute_dtype float32")


def _steps(net: LanguageModel, prompts: list[np.ndarray], limits: list[int], settings: GenerateConfig,
           owner: object = None) -> Iterator[dict[int, int]]:
    """Yield the new id of every row that still goes on, as {row: id}, until all have ended.

    owner: of a conversation; what its last turn left in the cache is not computed again.
    """
    ids = [prompt.tolist() for prompt in prompts]
    rngs = [np.random.default_rng(settings.seed if settings.seed is None else [settings.seed, row])
            for row in range(len(ids))]
    on_host = settings.do_sample or settings.repetition_penalty != 1.0
    going = list(range(len(ids)))
    with borrow_decoder(net, len(ids), owner) as decoder:
        try:
            step = decoder.prefill(ids)
            while True:
                _check_finite(decoder, step.highest.asnumpy()[going], len(ids[going[0]]))
                following, chosen = step.ids, step.ids.asnumpy()
                if on_host:
                    chosen, rows = chosen.copy(), step.logits.asnumpy()
                    for row in going:
                        chosen[row] = choose(rows[row], ids[row], settings, rngs[row])
                    following = Tensor(chosen)
                new = {row: int(chosen[row, 0]) for row in going}
                for row, token in new.items():
                    ids[row].append(token)
                yield new
                going = [row for row in going if new[row] not in settings.eos_token_id and len(ids[row]) < limits[row]]
                if not going:
                    break
                step = decoder.step(following, step.positions)
        except Glm3KitError:
            ids = []
            raise
        finally:
            decoder.held = [row[:-1] for row in ids]  # the last one has been chosen, not yet run


def _search(net: LanguageModel, prompt: np.ndarray, limit: int, settings: GenerateConfig) -> list[int]:
    """The new ids of one prompt by beam search, a row of the cache a beam."""
    with borrow_decoder(net, settings.num_beams) as decoder:
        step = decoder.prefill([prompt] * settings.num_beams)

        def logits_of(step: Step) -> np.ndarray:
            _check_finite(decoder, step.highest.asnumpy(), int(step.positions.asnumpy()[0]))
            return step.logits.asnumpy()

        def advance(parents: list[int], tokens: list[int]) -> np.ndarray:
            nonlocal step
            decoder.reorder(parents)
            step = decoder.step(Tensor(np.array(tokens, np.int32)[:, None]), step.positions)
            return logits_of(step)

        return beam_search(logits_of(step), advance, prompt.tolist(), limit, settings)


def generate(net: LanguageModel, input_ids: Any, **settings: Any) -> list[np.ndarray]:
    """Continue one or several prompts: int32 arrays of prompt and new ids, the stop id that ended a row included.

    input_ids: a list of ids, a list of such lists of any lengths, an array (T,) or (B, T), a Tensor.
    settings: as `GenerateConfig` says: max_length, max_new_tokens, do_sample, temperature, top_k, top_p,
        repetition_penalty, eos_token_id, seed, num_beams, length_penalty, early_stopping.
    Each row is what it would be alone, and ends on its own. With num_beams the prompts are searched one after another.
    Raises PromptError for prompts that are empty, hold ids outside the vocabulary, or fill the window; ConfigError for
    settings out of range; Glm3KitError if the model gives no numbers.
    """
    chosen = _settings(net, settings)
    prompts = prompt_rows(input_ids, net.cfg.padded_vocab_size)
    limits = _limits(prompts, chosen, net.cfg.seq_length)
    if chosen.num_beams > 1:
        answers = [_search(net, prompt, limit, chosen) for prompt, limit in zip(prompts, limits, strict=True)]
    else:
        answers = [[] for _ in prompts]
        for new in _steps(net, prompts, limits, chosen):
            for row, token in new.items():
                answers[row].append(token)
    return [np.concatenate([prompt, np.array(answer, np.int32)])
            for prompt, answer in zip(prompts, answers, strict=True)]


def stream(net: LanguageModel, input_ids: Any, owner: object = None, **settings: Any) -> Iterator[int]:
    """The new ids of one prompt as they are made, the same as `generate` gives; the last may be a stop id.

    owner: of a conversation, see `Conversation`.
    Settings and errors are those of `generate`; errors are raised by this call, not by the first id.
    The iterator may be closed early, and used in any thread.
    Example: for token in stream(net, [64790, 64792, 30910], max_new_tokens=20): print(token)
    """
    chosen = _settings(net, settings, one_by_one=True)
    prompts = prompt_rows(input_ids, net.cfg.padded_vocab_size)
    if len(prompts) > 1:
        raise PromptError(f"stream: got {len(prompts)} prompts, expected one; use generate for several")
    steps = _steps(net, prompts, _limits(prompts, chosen, net.cfg.seq_length), chosen, owner)
    return (new[0] for new in steps)


class Conversation:
    """The turns of one conversation: each call streams the answer to a prompt, as `stream` does.

    A prompt that begins with what the last turn read and said is computed from there on; any other one is computed
    whole. The kit's training forgets what was computed; whoever changes weights in place by hand calls
    `net.after_update()`.
    Settings and errors are those of `stream`; a call may replace some for its turn.
    Example: session = ChatSession(tokenizer, net.conversation(max_new_tokens=200), seq_length=net.cfg.seq_length)
    """

    def __init__(self, net: LanguageModel, **settings: Any):
        _settings(net, settings, one_by_one=True)  # errors now, not with the first turn
        self.net, self.settings = net, settings

    def __call__(self, input_ids: Any, **changes: Any) -> Iterator[int]:
        return stream(self.net, input_ids, owner=self, **self.settings | changes)
