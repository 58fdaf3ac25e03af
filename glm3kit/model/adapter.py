"""LoRA's adapters, and their dropout, whose mask is a function of a key, the token and the feature.

So a step can be repeated exactly: its masks are the same after a resume, and whatever the number of ranks, as each
hashes the places of its own slice. MindSpore's operators keep a state of their own that no checkpoint holds.

    key = mask_key(); dropout = Dropout(0.1, key, place=0); set_key(key, seed=0, step=7, micro_step=0)
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm3kit.parallel import ALONE, Topology


def mask_key() -> Parameter:
    """A key, int32 (1,), that the dropouts of a model share."""
    return Parameter(Tensor(np.zeros(1, np.int32)), "dropout_key", requires_grad=False)


def set_key(key: Parameter, seed: int, step: int, micro_step: int) -> None:
    """Give all dropouts that share `key` the masks of a micro-batch."""
    words = np.random.SeedSequence([seed, step, micro_step]).generate_state(1)
    ops.assign(key, Tensor(words.astype(np.int32)))


def _int32(word: int) -> int:
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def folded(words: Tensor, bits: int) -> Tensor:
    """Words, each combined with itself moved to the right."""
    return ops.bitwise_xor(words, ops.bitwise_right_shift(words, bits))


class Dropout(nn.Cell):
    """Zero a share p of x (N, C) in training and divide the others by 1 - p (https://arxiv.org/abs/1207.0580).

    place: tells dropouts of one key apart. sliced: x holds this rank's slice of the features, not all.
    """

    def __init__(self, p: float, key: Parameter, place: int, topology: Topology = ALONE, sliced: bool = False):
        super().__init__()
        object.__setattr__(self, "key", key)  # no parameter of the model: a checkpoint does not hold it
        self.place, self.scale = _int32(place * 0x9E3779B9), 1 / (1 - p)
        self.threshold = _int32(round(p * 2**32) + 2**31)
        self.data_rank, self.slice = topology.data_rank, topology.tensor_rank if sliced else 0

    def mix(self, words: Tensor) -> Tensor:
        """Spread each bit of int32 words over all bits, one to one."""
        words = folded(words, 16) * _int32(0x7FEB352D)
        return folded(folded(words, 15) * _int32(0x846CA68B), 16)

    def construct(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        N, C = x.shape
        tokens = self.mix(ops.arange(N, dtype=ms.int32) + self.data_rank * N + self.key)
        tokens = self.mix(tokens + self.place).reshape(N, 1)
        features = self.mix(ops.arange(C, dtype=ms.int32) + self.slice * C).reshape(1, C)
        # Both are mixed: two more multiplications make their sums independent in the high bits, which decide.
        words = folded((tokens + features) * _int32(0x7FEB352D), 15) * _int32(0x846CA68B)
        return ops.select(words >= self.threshold, x * self.scale, ops.zeros_like(x))


class Adapter(nn.Cell):
    """LoRA beside a matrix W (out, in): adds alpha / rank * (x A^T) B^T (https://arxiv.org/abs/2106.09685).

    lora_a: A (rank, in), lora_b: B (out, rank), lora_alpha: (). Under tensor parallelism B or A is cut where W is.
    dropout: of x (N, in). exchange: the ranks' exchange of the layer beside it, which x A^T (N, rank) passes through.
    """

    def __init__(self, lora_a: Parameter, lora_b: Parameter, lora_alpha: Parameter, dropout: Dropout | None,
                 dtype: ms.Type, exchange: nn.Cell):
        super().__init__()
        self.lora_a, self.lora_b, self.lora_alpha = lora_a, lora_b, lora_alpha
        self.rank, self.dtype, self.exchange = lora_a.shape[0], dtype, exchange
        self.dropout = dropout
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        if self.dropout is not None:
            x = self.dropout(x)
        x = self.exchange(self.matmul(x, self.lora_a.astype(self.dtype)))
        scaled_b = self.lora_b * (self.lora_alpha / self.rank)
        return self.matmul(x, scaled_b.astype(self.dtype))
