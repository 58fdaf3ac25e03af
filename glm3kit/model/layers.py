"""The parts of a ChatGLM3 that hold parameters, each whole or as one rank's slice: norm, linear, MLP, embedding.

In the shapes: B batch, T tokens, N = B * T rows, C hidden size, F ffn size, V vocabulary.
"""

from contextvars import ContextVar

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from glm3kit.config.groups import ModelConfig
from glm3kit.model.dropout import Dropout
from glm3kit.parallel import CopyToSlices, SumOfSlices, Topology

_draws = ContextVar("draws", default=True)


def drawn(deviation: float, shape: tuple[int, ...], dtype: ms.Type) -> Tensor:
    """Normal values to start a matrix from; zeros within `undrawn_weights`."""
    return initializer(Normal(deviation) if _draws.get() else "zeros", shape, dtype)


class RootMeanSquare(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight: (N, C) and (C,) float32 -> (the result (N, C), 1 / the root (N, 1)).

    The gradient is written out: half the passes over memory that automatic differentiation makes. Operators are
    attributes, since functions of mindspore.ops do not compile inside a bprop.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps
        self.square, self.mean, self.rsqrt = ops.Square(), ops.ReduceMean(keep_dims=True), ops.Rsqrt()
        self.sum, self.matmul = ops.ReduceSum(), ops.MatMul()

    def construct(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        inverse = self.rsqrt(self.mean(self.square(x), 1) + self.eps)
        return x * inverse * weight, inverse

    def bprop(self, x: Tensor, weight: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, Tensor]:
        inverse, dy = out[1], dout[0]
        normed = x * inverse
        product = dy * normed
        mean = self.matmul(product, weight.reshape(-1, 1) / self.size)  # (N, 1): mean of dy * weight * normed
        return (dy * weight - normed * mean) * inverse, self.sum(product, 0)


class RMSNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: ms.Type):
        super().__init__()
        self.weight = Parameter(initializer("ones", (size,), dtype), "weight")
        self.norm = RootMeanSquare(size, eps)

    def construct(self, x: Tensor) -> Tensor:
        rows = x.astype(ms.float32).reshape(-1, x.shape[-1])
        return self.norm(rows, self.weight.astype(ms.float32))[0].astype(x.dtype).reshape(x.shape)


class Adapter(nn.Cell):
    """LoRA beside a matrix W (out, in): adds alpha / rank * (x A^T) B^T (https://arxiv.org/abs/2106.09685).

    lora_a: A (rank, in), lora_b: B (out, rank), lora_alpha: (). Under tensor parallelism B or A is cut where W is.
    dropout: of x (N, in). between: what x A^T (N, rank) passes through, the ranks' exchange of a `Linear`.
    """

    def __init__(self, lora_a: Parameter, lora_b: Parameter, lora_alpha: Parameter, dropout: Dropout | None,
                 dtype: ms.Type, between: nn.Cell):
        super().__init__()
        self.lora_a, self.lora_b, self.lora_alpha = lora_a, lora_b, lora_alpha
        self.rank, self.dtype, self.between = lora_a.shape[0], dtype, between
        self.dropout = dropout
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        if self.dropout is not None:
            x = self.dropout(x)
        x = self.between(self.matmul(x, self.lora_a.astype(self.dtype)))
        scaled_b = self.lora_b * (self.lora_alpha / self.rank)
        return self.matmul(x, scaled_b.astype(self.dtype))


class Linear(nn.Cell):
    """y = x W^T (+ b) in the computing type, over rows (N, in) -> (N, out); W as published: (out, in).

    Under tensor parallelism a rank holds some of W's outputs (`cut` 0: the same x for all, the slices of y stay apart)
    or some of its inputs (`cut` 1: x comes in slices, their products add up). in_size, out_size: of the slice.
    """

    def __init__(self, in_size: int, out_size: int, cfg: ModelConfig, topology: Topology, cut: int, *,
                 bias: bool = False, scale: float = 1.0):
        super().__init__()
        dtype = getattr(ms, cfg.param_dtype)
        self.weight = Parameter(drawn(0.02 * scale, (out_size, in_size), dtype), "weight")
        self.bias = Parameter(initializer("zeros", (out_size,), dtype), "bias") if bias else None
        self.dtype = getattr(ms, cfg.compute_dtype)
        self.matmul = ops.MatMul(transpose_b=True)
        self.copy = CopyToSlices(topology) if cut == 0 else None
        self.sum = SumOfSlices(topology) if cut == 1 else None
        self.adapter: Adapter | None = None  # see glm3kit.train.lora

    def construct(self, x: Tensor) -> Tensor:
        x = x.astype(self.dtype)
        y = self.matmul(x if self.copy is None else self.copy(x), self.weight.astype(self.dtype))
        if self.sum is not None:
            y = self.sum(y)
        if self.bias is not None:
            y = y + self.bias.astype(self.dtype)
        return y if self.adapter is None else y + self.adapter(x)


class MLP(nn.Cell):
    """SwiGLU: silu(gate) * up, with gate and up in one matrix (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, cfg: ModelConfig, topology: Topology, depth_scale: float):
        super().__init__()
        self.ffn_size = cfg.ffn_hidden_size // topology.tensor_parallel
        self.dense_h_to_4h = Linear(cfg.hidden_size, 2 * self.ffn_size, cfg, topology, 0)
        self.dense_4h_to_h = Linear(self.ffn_size, cfg.hidden_size, cfg, topology, 1, scale=depth_scale)

    def construct(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        gate, up = ops.split(self.dense_h_to_4h(x.reshape(B * T, C)), self.ffn_size, 1)  # (N, F) each
        return self.dense_4h_to_h(ops.silu(gate) * up).reshape(B, T, C)


class Embedding(nn.Cell):
    """Rows of the embedding table in the computing type: (B, T) -> (B, T, C); each rank holds a slice of the words."""

    def __init__(self, cfg: ModelConfig, topology: Topology):
        super().__init__()
        self.words = cfg.padded_vocab_size // topology.tensor_parallel
        self.first = topology.tensor_rank * self.words
        self.embedding_table = Parameter(drawn(0.02, (self.words, cfg.hidden_size), getattr(ms, cfg.param_dtype)),
                                         "embedding_table")
        self.dtype = getattr(ms, cfg.compute_dtype)
        self.whole, self.sum = topology.tensor_parallel == 1, SumOfSlices(topology)

    def construct(self, input_ids: Tensor) -> Tensor:
        if self.whole:
            return ops.gather(self.embedding_table, input_ids, 0).astype(self.dtype)
        local = input_ids - self.first
        ours = ops.logical_and(local >= 0, local < self.words)
        rows = ops.gather(self.embedding_table, ops.select(ours, local, ops.zeros_like(local)), 0).astype(self.dtype)
        return self.sum(rows * ours.astype(self.dtype).expand_dims(-1))
