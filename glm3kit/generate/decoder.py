"""Decoder: a model with a kv cache of fixed size, and compiled graphs that all prompts share.

A prompt is padded on the right to one of a few lengths and runs through the graph for that length; then another graph
makes a token a call. What the cache still holds of an earlier prompt need not be computed again.

    with borrow_decoder(net, 1) as decoder: logits = decoder.prefill([prompt]).logits
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import NamedTuple, Protocol

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from glm3kit.config.groups import ModelConfig
from glm3kit.parallel import Topology, on_ascend

_BORROWING = RLock()  # held while a decoder leaves or joins the idle ones: streams may run in threads
SHORTEST_PREFILL = 64  # tokens; padding a shorter prompt costs less than compiling one more graph


class LanguageModel(Protocol):
    """What generation needs of a model, which is an nn.Cell; `ChatGLM3` is one and says what the methods compute."""

    cfg: ModelConfig  # its window, vocabulary, layers, head size and computing type
    topology: Topology
    kv_groups: int  # key/value groups that this rank holds
    decoders: "dict[int, list[Decoder]]"  # idle ones by batch size, at first none: `borrow_decoder` fills it
    training: bool

    def set_train(self, mode: bool = True) -> nn.Cell: ...

    def get_parameters(self) -> Iterator[Parameter]: ...

    def hidden_with_cache(self, input_ids: Tensor, positions: Tensor, unseen: Tensor, caches: tuple,
                          slots: Tensor) -> Tensor: ...

    def logits(self, x: Tensor) -> Tensor: ...


class Step(NamedTuple):
    """What a decoder has computed for B rows."""

    logits: Tensor  # (B, V) after each row's last token
    highest: Tensor  # (B,) of these
    ids: Tensor  # (B, 1) that they belong to
    positions: Tensor  # (B,) of the tokens to come


def _weight_addresses(net: LanguageModel) -> list[int]:
    """Where the weights lie in memory. Training changes them in place; `Parameter.set_data` puts others elsewhere."""
    return [parameter.data_ptr() for parameter in net.get_parameters()]


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two rows share from their beginning on."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(ids), len(others)))


class Decoder(nn.Cell):
    """A model with a kv cache for B rows of up to S tokens, S the model's window: a graph for each T it is called with.

    (input_ids (B, T), positions (B,) of each row's first token, lengths (B,) without padding on the right)
    -> the fields of a `Step`

    held: ids whose keys and values each row of the cache holds; whoever used the decoder last sets it, or empties it.
    owner: whose ids they are.
    """

    def __init__(self, net: LanguageModel, batch_size: int):
        super().__init__(auto_prefix=False)  # the parameters of the model keep their names
        self.net = net
        cfg, S = net.cfg, net.cfg.seq_length
        rows = batch_size * net.kv_groups * S  # of keys or values, by B, G, S

        def caches(name: str) -> ParameterTuple:
            empty = np.zeros((rows, cfg.kv_channels))
            return ParameterTuple([Parameter(Tensor(empty, getattr(ms, cfg.compute_dtype)), f"{name}.{layer}",
                                             requires_grad=False) for layer in range(cfg.num_layers)])

        self.keys, self.values = caches("cached_keys"), caches("cached_values")
        self.batch_size, self.window = batch_size, S
        # A CPU multiplies float16 as float32: a graph keeps all weights in both types, single operators one at a time.
        self.in_graph = on_ascend() or cfg.compute_dtype != "float16"
        self.slots = Tensor(np.arange(S), ms.int32)
        self.first_slots = Tensor(np.arange(0, rows, S).reshape(batch_size, net.kv_groups, 1), ms.int32)
        self.rows = Tensor(np.arange(batch_size), ms.int32)
        self.ones = Tensor(np.ones(batch_size), ms.int32)
        self.highest = ops.ArgMaxWithValue(1)
        self.addresses = _weight_addresses(net)
        self.held: list[list[int]] = []
        self.owner: object = None

    def hidden(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Output of the final norm (B, T, C); keys and values of the tokens go into the cache."""
        B, T = input_ids.shape
        # Padding, and rows that have ended, may run past the window: they go to its last slot, which is written
        # again before a token may look at it.
        positions = ops.minimum(positions.reshape(B, 1) + self.slots[:T], self.window - 1)  # (B, T)
        unseen = self.slots > positions.reshape(B, 1, 1, T, 1)  # (B, 1, 1, T, S)
        slots = (self.first_slots + positions.reshape(B, 1, T)).reshape(-1)  # (B*G*T,)
        caches = ()
        for i in range(len(self.keys)):
            caches += ((self.keys[i], self.values[i]),)
        return self.net.hidden_with_cache(input_ids, positions, unseen, caches, slots)

    def forward(self, input_ids: Tensor, positions: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """What the graphs compute, an operator at a time."""
        B, T = input_ids.shape
        x = self.hidden(input_ids, positions).reshape(B * T, -1)
        if T > 1:
            x = ops.gather(x, self.rows * T + lengths - 1, 0)  # (B, C)
        logits = self.net.logits(x)
        ids, highest = self.highest(logits)
        return logits, highest, ids.reshape(B, 1), positions + lengths

    @ms.jit  # a graph in PyNative mode too
    def construct(self, input_ids: Tensor, positions: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        return self.forward(input_ids, positions, lengths)

    def run(self, input_ids: Tensor, positions: Tensor, lengths: Tensor) -> Step:
        """Compute by a graph, or by `forward` where a graph would take too much memory, in whatever mode we are."""
        training, mode = self.net.training, ms.get_context("mode")
        if training:
            self.net.set_train(False)  # without an adapter's dropout
        if not self.in_graph:
            ms.set_context(mode=ms.PYNATIVE_MODE)
        try:
            compute = self if self.in_graph else self.forward
            return Step(*compute(input_ids, positions, lengths))
        finally:
            if training:
                self.net.set_train()
            if not self.in_graph:
                ms.set_context(mode=mode)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Step:
        """Run a prompt a row, from where it departs from what the cache holds; its last token is always computed.

        The rows are padded to a power of two, so that there are few graphs for all lengths.
        """
        held = self.held or [[]] * self.batch_size
        starts = [min(_shared(*pair), len(pair[0]) - 1) for pair in zip(prompts, held, strict=True)]
        news = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        lengths = [len(new) for new in news]
        padded = max(lengths)
        if self.in_graph:
            padded = min(max(SHORTEST_PREFILL, 1 << (padded - 1).bit_length()), self.window)
        input_ids = np.zeros((self.batch_size, padded), np.int32)
        for row, new in enumerate(news):
            input_ids[row, :len(new)] = new
        return self.run(Tensor(input_ids), Tensor(starts, ms.int32), Tensor(lengths, ms.int32))

    def step(self, ids: Tensor, positions: Tensor) -> Step:
        """Run one more token a row: ids (B, 1) at their positions (B,)."""
        return self.run(ids, positions, self.ones)

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i of the cache go on from what row rows[i] holds."""
        picked = Tensor(rows, ms.int32)
        for cache in (*self.keys, *self.values):
            by_row = cache.reshape(self.batch_size, -1)
            ops.assign(cache, ops.gather(by_row, picked, 0).reshape(cache.shape))  # in place, as graphs know it

    def clear(self) -> None:
        """Fill the cache with zeros: what a token must not look at counts nothing, unless it is nan."""
        for cache in (*self.keys, *self.values):
            ops.assign(cache, ops.zeros_like(cache))


@contextmanager
def borrow_decoder(net: LanguageModel, batch_size: int, owner: object = None) -> Iterator[Decoder]:
    """Take an idle decoder of the model, else a new one, for a while: generations at a time never share a cache.

    owner: of a conversation; gets the decoder that it had before where that is idle, with what it holds. Without an
        owner a decoder holds nothing.
    An idle one whose weights have been replaced is dropped: its graphs would go on with those of before.
    """
    idle, addresses = net.decoders.setdefault(batch_size, []), _weight_addresses(net)
    with _BORROWING:
        idle[:] = [decoder for decoder in idle if decoder.addresses == addresses]
        idle.sort(key=lambda decoder: decoder.owner is owner)  # the last one is taken
        decoder = idle.pop() if idle else None
    if decoder is None:
        decoder = Decoder(net, batch_size)
    if owner is None or decoder.owner is not owner:
        decoder.held = []
    decoder.owner = owner
    try:
        yield decoder
    finally:
        with _BORROWING:
            idle.append(decoder)
