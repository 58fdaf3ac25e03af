"""ChatGLM3, all of it: embedding, rotary attention with grouped keys and values, SwiGLU, RMSNorm, loss.

Computes what the published `modeling_chatglm.py` computes; parameter names are MindFormers 1.1's. In the shapes: B batch,
T tokens, S slots of the kv cache, C hidden size, H heads, G key/value groups, d head size, F ffn size, V vocabulary.

    net = ChatGLM3(ModelConfig.from_hf("chatglm3-6b/config.json")); logits = net(ms.Tensor([[64790, 64792]], ms.int32))
"""

from collections.abc import Iterator
from math import sqrt
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from glm3kit.config import ModelConfig

IGNORE_INDEX = -100  # a label that carries no loss
MASKED = -65504.0  # added to a score that must not count: the lowest float16


def rotary_tables(length: int, kv_channels: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of positions 0 to length - 1: two float32 arrays (length, d).

    Only the first half of a head is rotated, in interleaved pairs, base 10000; the second half has cos 1 and sin 0.
    """
    half = kv_channels // 2
    frequencies = 1.0 / 10000 ** (np.arange(0, half, 2, dtype=np.float32) / half)  # (d/4,)
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies).astype(np.float32)
    angles = np.repeat(angles, 2, axis=1)  # (length, d/2): a pair shares its angle
    angles = np.concatenate([angles, np.zeros((length, kv_channels - half), np.float32)], axis=1)
    return np.cos(angles), np.sin(angles)


def rotation_matrix(kv_channels: int) -> np.ndarray:
    """R (d, d) with x @ R = (-x1, x0, -x3, x2, ..., 0, 0), so that a rotation is x * cos + (x @ R) * sin."""
    matrix = np.zeros((kv_channels, kv_channels), np.float32)
    even = np.arange(0, kv_channels // 2, 2)
    matrix[even + 1, even] = -1
    matrix[even, even + 1] = 1
    return matrix


class RMSNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: ms.Type):
        super().__init__()
        self.weight = Parameter(initializer("ones", (size,), dtype), "weight")
        self.eps = eps
        self.mean = ops.ReduceMean(keep_dims=True)

    def construct(self, x: Tensor) -> Tensor:
        wide = x.astype(ms.float32)
        wide = wide * ops.rsqrt(self.mean(ops.square(wide), -1) + self.eps)
        return (wide * self.weight.astype(ms.float32)).astype(x.dtype)


class Linear(nn.Cell):
    """y = x W^T (+ b) in the computing type, over rows (N, in) -> (N, out); W as published: (out, in)."""

    def __init__(self, in_size: int, out_size: int, cfg: ModelConfig, bias: bool = False, scale: float = 1.0):
        super().__init__()
        dtype = getattr(ms, cfg.param_dtype)
        self.weight = Parameter(initializer(Normal(0.02 * scale), (out_size, in_size), dtype), "weight")
        self.bias = Parameter(initializer("zeros", (out_size,), dtype), "bias") if bias else None
        self.dtype = getattr(ms, cfg.compute_dtype)
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        y = self.matmul(x.astype(self.dtype), self.weight.astype(self.dtype))
        return y if self.bias is None else y + self.bias.astype(self.dtype)


class SelfAttention(nn.Cell):
    """Causal attention: H query heads share G key/value groups; query head h uses group h // (H/G).

    With a cache, keys and values are written to its slots and attention looks at all S slots that the mask allows.
    """

    def __init__(self, cfg: ModelConfig, depth_scale: float):
        super().__init__()
        self.heads, self.groups, self.size = cfg.num_attention_heads, cfg.multi_query_group_num, cfg.kv_channels
        self.query_key_value = Linear(cfg.hidden_size, (self.heads + 2 * self.groups) * self.size, cfg, bias=True)
        self.dense = Linear(self.heads * self.size, cfg.hidden_size, cfg, scale=depth_scale)
        self.rotation = Tensor(rotation_matrix(self.size), getattr(ms, cfg.compute_dtype))
        self.scale = 1 / sqrt(self.size)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.values = ops.BatchMatMul()
        self.softmax = ops.Softmax()
        self.write = ops.ScatterUpdate()

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: tuple | None = None,
                  slots: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        H, G, d = self.heads, self.groups, self.size
        qkv = self.query_key_value(x.reshape(B * T, C)).reshape(B, T, H + 2 * G, d)
        qk, v = ops.split(qkv, [H + G, G], 2)
        turned = ops.matmul(qk.reshape(-1, d), self.rotation).reshape(B, T, H + G, d)
        qk = qk * cos + turned * sin  # cos and sin: (B or 1, T, 1, d)
        q, k = ops.split(qk, [H, G], 2)
        q = q.reshape(B, T, G, H // G, d).transpose(0, 2, 3, 1, 4).reshape(B, G, H // G * T, d)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # (B, G, T, d)
        if cache is not None:
            k = self.write(cache[0], slots, k.reshape(-1, d)).reshape(B, G, -1, d)  # (B, G, S, d)
            v = self.write(cache[1], slots, v.reshape(-1, d)).reshape(B, G, -1, d)
        scores = self.scores(q * self.scale, k).astype(ms.float32)  # softmax in float32, as the reference
        scores = scores.reshape(B, G, H // G, T, -1) + mask  # mask: (B or 1, 1, 1, T, S)
        probs = self.softmax(scores).astype(x.dtype).reshape(B, G, H // G * T, -1)
        y = self.values(probs, v)  # (B, G, H/G * T, d)
        y = y.reshape(B, G, H // G, T, d).transpose(0, 3, 1, 2, 4).reshape(B * T, H * d)
        return self.dense(y).reshape(B, T, C)


class MLP(nn.Cell):
    """SwiGLU: silu(gate) * up, with gate and up in one matrix (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, cfg: ModelConfig, depth_scale: float):
        super().__init__()
        self.ffn_size = cfg.ffn_hidden_size
        self.dense_h_to_4h = Linear(cfg.hidden_size, 2 * cfg.ffn_hidden_size, cfg)
        self.dense_4h_to_h = Linear(cfg.ffn_hidden_size, cfg.hidden_size, cfg, scale=depth_scale)

    def construct(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        gate, up = ops.split(self.dense_h_to_4h(x.reshape(B * T, C)), self.ffn_size, 1)  # (B*T, F) each
        return self.dense_4h_to_h(ops.silu(gate) * up).reshape(B, T, C)


class Layer(nn.Cell):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        dtype = getattr(ms, cfg.param_dtype)
        depth_scale = 1 / sqrt(2 * cfg.num_layers)  # keeps the sum of all layers' outputs at unit size (GPT-2)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.layernorm_epsilon, dtype)
        self.self_attention = SelfAttention(cfg, depth_scale)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.layernorm_epsilon, dtype)
        self.mlp = MLP(cfg, depth_scale)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: tuple | None = None,
                  slots: Tensor | None = None) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), cos, sin, mask, cache, slots)
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Cell):
    """Rows of the embedding table in the computing type: (B, T) -> (B, T, C)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        shape = (cfg.padded_vocab_size, cfg.hidden_size)
        self.embedding_table = Parameter(initializer(Normal(0.02), shape, getattr(ms, cfg.param_dtype)),
                                         "embedding_table")
        self.dtype = getattr(ms, cfg.compute_dtype)

    def construct(self, input_ids: Tensor) -> Tensor:
        return ops.gather(self.embedding_table, input_ids, 0).astype(self.dtype)


class Encoder(nn.Cell):
    """All layers and the final norm."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.layers = nn.CellList([Layer(cfg) for _ in range(cfg.num_layers)])
        self.final_layernorm = RMSNorm(cfg.hidden_size, cfg.layernorm_epsilon, getattr(ms, cfg.param_dtype))

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, caches: tuple | None = None,
                  slots: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, None if caches is None else caches[i], slots)
        return self.final_layernorm(x)


class Transformer(nn.Cell):
    """Embedding, encoder and output layer: the parts that hold parameters."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embedding = Embedding(cfg)
        self.encoder = Encoder(cfg)
        self.output_layer = Linear(cfg.hidden_size, cfg.padded_vocab_size, cfg)


class CrossEntropySum(nn.Cell):
    """Sum of -log softmax(logits)[label] over the rows whose label counts: (N, V) float32, (N,) int32 -> scalar.

    The gradient is written out: softmax - one-hot on counted rows, with one softmax and no stored logarithms.
    """

    def __init__(self):
        super().__init__()
        # Operators as attributes: calls of mindspore.ops functions do not compile inside a bprop.
        self.log_softmax, self.softmax = ops.LogSoftmax(), ops.Softmax()
        self.clip, self.one_hot, self.pick = ops.ReLU(), ops.OneHot(), ops.GatherD()
        self.on, self.off = Tensor(1, ms.float32), Tensor(0, ms.float32)

    def construct(self, logits: Tensor, labels: Tensor) -> Tensor:
        counted = (labels != IGNORE_INDEX).astype(ms.float32)
        picked = self.pick(self.log_softmax(logits), 1, self.clip(labels).reshape(-1, 1)).reshape(-1)
        return -(picked * counted).sum()

    def bprop(self, logits: Tensor, labels: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        counted = (labels != IGNORE_INDEX).astype(ms.float32) * dout
        expected = self.one_hot(self.clip(labels), logits.shape[1], self.on, self.off)
        return (self.softmax(logits) - expected) * counted.reshape(-1, 1), labels


class ChatGLM3(nn.Cell):
    """The language model: input_ids (B, T) int32 -> logits (B, T, V) float32.

    cfg: sizes and types. Parameters start random (normal, 0.02); `load_weights` fills them.
    Raises ValueError if T exceeds cfg.seq_length.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.transformer = Transformer(cfg)
        cos, sin = rotary_tables(cfg.seq_length, cfg.kv_channels)
        dtype = getattr(ms, cfg.compute_dtype)  # the reference keeps its tables in the model's type
        self.cos, self.sin = Tensor(cos, dtype), Tensor(sin, dtype)
        self.cross_entropy = CrossEntropySum()

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Output of the final norm (B, T, C); attention_mask (B, T) int32 holds 0 where a row is padded on the left."""
        B, T = input_ids.shape
        if T > self.cfg.seq_length:
            raise ValueError(f"input_ids has {T} tokens a row, more than seq_length {self.cfg.seq_length}; "
                             "shorten the input or raise seq_length")
        steps = ops.arange(T)
        allowed = (steps.reshape(1, T) <= steps.reshape(T, 1)).reshape(1, 1, 1, T, T)
        if attention_mask is not None:
            allowed = ops.logical_and(allowed, (attention_mask != 0).reshape(B, 1, 1, 1, T))
        mask = (1 - allowed.astype(ms.float32)) * MASKED
        cos, sin = self.cos[:T].reshape(1, T, 1, -1), self.sin[:T].reshape(1, T, 1, -1)
        return self.transformer.encoder(self.transformer.embedding(input_ids), cos, sin, mask)

    def construct(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.hidden(input_ids, attention_mask)
        B, T, C = x.shape
        return self.transformer.output_layer(x.reshape(B * T, C)).astype(ms.float32).reshape(B, T, -1)

    def loss_sum(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Summed loss over the labels that count; labels are shifted: labels[i] is the token after input_ids[i]."""
        logits = self.construct(input_ids)
        return self.cross_entropy(logits.reshape(-1, self.cfg.padded_vocab_size), labels.reshape(-1))

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the labels that count, a scalar; labels (B, T) int32 are shifted, -100 is ignored."""
        return self.loss_sum(input_ids, labels) / ops.maximum((labels != IGNORE_INDEX).astype(ms.float32).sum(), 1.0)

    def generate(self, input_ids: Any, **settings: Any) -> list[np.ndarray]:
        """Prompts and their answers, a row each; see `glm3kit.generate.generate`."""
        from glm3kit.generate import generate  # it imports this module
        return generate(self, input_ids, **settings)

    def stream(self, input_ids: Any, **settings: Any) -> Iterator[int]:
        """The ids of one answer as they are made; see `glm3kit.generate.stream`."""
        from glm3kit.generate import stream
        return stream(self, input_ids, **settings)


class AutoModel:
    """The name that MindFormers' scripts use for building a model."""

    @staticmethod
    def from_config(config: ModelConfig) -> ChatGLM3:
        """A ChatGLM3 with the weights that `config.checkpoint_name_or_path` names; random ones where it names none."""
        from glm3kit.weights import load_weights
        net = ChatGLM3(config)
        if config.checkpoint_name_or_path:
            load_weights(net, config.checkpoint_name_or_path)
        return net
