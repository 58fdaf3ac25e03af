"""ChatGLM3 from top to bottom: rotary embedding, norm, attention, MLP, layer, embedding, output layer, loss.

Computes what the published `modeling_chatglm.py` computes; parameter names are MindFormers 1.1's. Under tensor
parallelism a rank holds the slices that weights/slices.py says; gradients that are written out are in gradients.py.
In the shapes: B batch, T tokens, N = B * T rows, S slots of the kv cache, C hidden size, H heads, G key/value groups,
d head size, F ffn size, V vocabulary; H, G, F and V are this rank's.

    net = ChatGLM3(ModelConfig.from_hf("chatglm3-6b/config.json")); logits = net(ms.Tensor([[64790, 64792]], ms.int32))
"""

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from glm3kit.config.groups import ModelConfig
from glm3kit.data.token_file import IGNORE_INDEX
from glm3kit.errors import ConfigError
from glm3kit.generate import loop
from glm3kit.generate.decoder import Decoder
from glm3kit.model.adapter import Adapter
from glm3kit.model.gradients import CrossEntropySum, MaskedAttention, RootMeanSquare, Split
from glm3kit.parallel import ALONE, CopyToSlices, GatherSlices, SumOfSlices, Topology, on_ascend
from glm3kit.weights.names import parameter_shapes
from glm3kit.weights.random import random_weights
from glm3kit.weights.slices import slicing
from glm3kit.weights.tensors import cast, release

MASKED = -65504.0  # added to a score that must not count: the lowest float16


def empty_parameter(cfg: ModelConfig, *shape: int) -> Parameter:
    """Room for weights in the type they are kept in; `ChatGLM3.fill` gives them their values."""
    return Parameter(initializer("zeros", shape, getattr(ms, cfg.param_dtype)))


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

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.weight = empty_parameter(cfg, cfg.hidden_size)
        self.norm = RootMeanSquare(cfg.hidden_size, cfg.layernorm_epsilon)

    def construct(self, x: Tensor) -> Tensor:
        rows = x.astype(ms.float32).reshape(-1, x.shape[-1])
        return self.norm(rows, self.weight.astype(ms.float32))[0].astype(x.dtype).reshape(x.shape)


class ColumnParallelLinear(nn.Cell):
    """y = x W^T (+ b) in the computing type, (N, in) -> (N, out): a rank has some rows of W and their columns of y.

    W as published, (out, in); out_size is the rank's, x is the same on all.
    """

    def __init__(self, in_size: int, out_size: int, cfg: ModelConfig, topology: Topology, bias: bool = False):
        super().__init__()
        self.weight = empty_parameter(cfg, out_size, in_size)
        self.bias = empty_parameter(cfg, out_size) if bias else None
        self.dtype = getattr(ms, cfg.compute_dtype)
        self.matmul = ops.MatMul(transpose_b=True)
        self.exchange = CopyToSlices(topology)
        self.adapter: Adapter | None = None  # see glm3kit.train.lora

    def construct(self, x: Tensor) -> Tensor:
        x = x.astype(self.dtype)
        y = self.matmul(self.exchange(x), self.weight.astype(self.dtype))
        if self.bias is not None:
            y = y + self.bias.astype(self.dtype)
        return y if self.adapter is None else y + self.adapter(x)


class RowParallelLinear(nn.Cell):
    """y = x W^T in the computing type, (N, in) -> (N, out): a rank has some columns of W and of x; products add up.

    in_size is the rank's.
    """

    def __init__(self, in_size: int, out_size: int, cfg: ModelConfig, topology: Topology):
        super().__init__()
        self.weight = empty_parameter(cfg, out_size, in_size)
        self.dtype = getattr(ms, cfg.compute_dtype)
        self.matmul = ops.MatMul(transpose_b=True)
        self.exchange = SumOfSlices(topology)
        self.adapter: Adapter | None = None

    def construct(self, x: Tensor) -> Tensor:
        x = x.astype(self.dtype)
        y = self.exchange(self.matmul(x, self.weight.astype(self.dtype)))
        return y if self.adapter is None else y + self.adapter(x)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention by Ascend's fused operator, which keeps no (T, S) matrix.

    q: (B, T, H, d), k and v: (B, G, T, d), float16 or bfloat16; mask: (B or 1, 1, 1, T, T), added -> (N, H * d).
    """
    B, T, H, d = q.shape
    # True: does not count. A token of padding sees itself, as the operator leaves open what it makes of nothing.
    hidden = ops.logical_and(mask < 0, ops.logical_not(ops.eye(T, T, ms.bool_)))
    hidden = hidden.reshape((T, T) if mask.shape[0] == 1 else (B, 1, T, T))
    y = ops.flash_attention_score(q.transpose(0, 2, 1, 3), k, v, H, attn_mask=hidden, scalar_value=scale,
                                  input_layout="BNSD")
    return y.transpose(0, 2, 1, 3).reshape(B * T, H * d)


class SelfAttention(nn.Cell):
    """Causal attention: H query heads share G key/value groups; query head h uses group h // (H/G).

    With a cache, keys and values are written to its slots, and attention looks at all S slots that the mask allows.
    """

    def __init__(self, cfg: ModelConfig, topology: Topology):
        super().__init__()
        self.heads = cfg.num_attention_heads // topology.tensor_parallel
        self.groups = max(cfg.multi_query_group_num // topology.tensor_parallel, 1)
        self.size = cfg.kv_channels
        self.query_key_value = ColumnParallelLinear(cfg.hidden_size, (self.heads + 2 * self.groups) * self.size, cfg,
                                                    topology, bias=True)
        self.dense = RowParallelLinear(self.heads * self.size, cfg.hidden_size, cfg, topology)
        self.rotation = Tensor(rotation_matrix(self.size), getattr(ms, cfg.compute_dtype))
        self.scale = 1 / sqrt(self.size)
        self.flash = cfg.use_flash_attention and on_ascend()
        self.attend = MaskedAttention()
        self.split_qk_v = Split([self.heads + self.groups, self.groups], 2)
        self.split_q_k = Split([self.heads, self.groups], 2)
        self.write = ops.ScatterUpdate()

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: tuple | None = None,
                  slots: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        H, G, d = self.heads, self.groups, self.size
        qkv = self.query_key_value(x.reshape(B * T, C)).reshape(B, T, H + 2 * G, d)
        qk, v = self.split_qk_v(qkv)
        turned = ops.matmul(qk.reshape(-1, d), self.rotation).reshape(B, T, H + G, d)
        qk = qk * cos + turned * sin  # cos and sin: (B or 1, T, 1, d)
        q, k = self.split_q_k(qk)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # (B, G, T, d)
        if self.flash and cache is None:
            return self.dense(flash_attention(q, k, v, mask, self.scale)).reshape(B, T, C)
        if cache is not None:
            k = self.write(cache[0], slots, k.reshape(-1, d)).reshape(B, G, -1, d)  # (B, G, S, d)
            v = self.write(cache[1], slots, v.reshape(-1, d)).reshape(B, G, -1, d)
        q = q.reshape(B, T, G, H // G, d).transpose(0, 2, 3, 1, 4).reshape(B, G, H // G * T, d)
        y, _ = self.attend(q * self.scale, k, v, mask)  # (B, G, H/G * T, d)
        y = y.reshape(B, G, H // G, T, d).transpose(0, 3, 1, 2, 4).reshape(B * T, H * d)
        return self.dense(y).reshape(B, T, C)


class MLP(nn.Cell):
    """SwiGLU: silu(gate) * up, with gate and up in one matrix (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, cfg: ModelConfig, topology: Topology):
        super().__init__()
        self.ffn_size = cfg.ffn_hidden_size // topology.tensor_parallel
        self.dense_h_to_4h = ColumnParallelLinear(cfg.hidden_size, 2 * self.ffn_size, cfg, topology)
        self.dense_4h_to_h = RowParallelLinear(self.ffn_size, cfg.hidden_size, cfg, topology)

    def construct(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        gate, up = ops.split(self.dense_h_to_4h(x.reshape(B * T, C)), self.ffn_size, 1)  # (N, F) each
        return self.dense_4h_to_h(ops.silu(gate) * up).reshape(B, T, C)


class Layer(nn.Cell):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, topology: Topology):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg)
        self.self_attention = SelfAttention(cfg, topology)
        self.post_attention_layernorm = RMSNorm(cfg)
        self.mlp = MLP(cfg, topology)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: tuple | None = None,
                  slots: Tensor | None = None) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), cos, sin, mask, cache, slots)
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Cell):
    """All layers and the final norm."""

    def __init__(self, cfg: ModelConfig, topology: Topology):
        super().__init__()
        self.layers = nn.CellList([Layer(cfg, topology) for _ in range(cfg.num_layers)])
        self.final_layernorm = RMSNorm(cfg)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, caches: tuple | None = None,
                  slots: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, None if caches is None else caches[i], slots)
        return self.final_layernorm(x)


class Embedding(nn.Cell):
    """Rows of the embedding table in the computing type: (B, T) -> (B, T, C); each rank holds a slice of the words."""

    def __init__(self, cfg: ModelConfig, topology: Topology):
        super().__init__()
        self.words = cfg.padded_vocab_size // topology.tensor_parallel
        self.first = topology.tensor_rank * self.words
        self.embedding_table = empty_parameter(cfg, self.words, cfg.hidden_size)
        self.dtype = getattr(ms, cfg.compute_dtype)
        self.whole, self.sum = topology.tensor_parallel == 1, SumOfSlices(topology)

    def construct(self, input_ids: Tensor) -> Tensor:
        if self.whole:
            return ops.gather(self.embedding_table, input_ids, 0).astype(self.dtype)
        local = input_ids - self.first
        ours = ops.logical_and(local >= 0, local < self.words)
        rows = ops.gather(self.embedding_table, ops.select(ours, local, ops.zeros_like(local)), 0).astype(self.dtype)
        return self.sum(rows * ours.astype(self.dtype).expand_dims(-1))


class Transformer(nn.Cell):
    """Embedding, encoder and output layer: the parts that hold parameters."""

    def __init__(self, cfg: ModelConfig, topology: Topology):
        super().__init__()
        self.embedding = Embedding(cfg, topology)
        self.encoder = Encoder(cfg, topology)
        self.output_layer = ColumnParallelLinear(cfg.hidden_size, cfg.padded_vocab_size // topology.tensor_parallel,
                                                 cfg, topology)


class ChatGLM3(nn.Cell):
    """The language model: input_ids (B, T) int32 -> logits (B, T, V) float32.

    cfg: sizes and types. topology: this process's place where several share the model.
    weights: whole tensors by name, such as `read_weights` opens; by default `random_weights(cfg, seed=0)`.
    Raises ValueError if T exceeds cfg.seq_length, ConfigError for a computing type that the device has not.
    """

    def __init__(self, cfg: ModelConfig, topology: Topology = ALONE, weights: Mapping[str, np.ndarray] | None = None):
        super().__init__()
        if cfg.compute_dtype == "bfloat16" and not on_ascend():
            raise ConfigError("model.compute_dtype is bfloat16, in which MindSpore multiplies no matrices on a CPU; "
                              "set model.compute_dtype=float32 (weights may stay bfloat16)")
        self.cfg, self.topology = cfg, topology
        self.transformer = Transformer(cfg, topology)
        self.kv_groups = self.transformer.encoder.layers[0].self_attention.groups
        cos, sin = rotary_tables(cfg.seq_length, cfg.kv_channels)
        dtype = getattr(ms, cfg.compute_dtype)  # the reference keeps its tables in the model's type
        self.cos, self.sin = Tensor(cos, dtype), Tensor(sin, dtype)
        self.gather = GatherSlices(topology)
        self.cross_entropy = CrossEntropySum(topology)
        self.decoders: dict[int, list[Decoder]] = {}  # idle kv caches, by batch size: see `borrow_decoder`
        self.fill(random_weights(cfg, seed=0) if weights is None else weights)

    def fill(self, weights: Mapping[str, np.ndarray]) -> None:
        """Set every parameter but adapters to its (slice of a) whole tensor."""
        topology, parameters = self.topology, self.parameters_dict()
        for name in parameter_shapes(self.cfg):
            whole, parameter = weights[name], parameters[name]
            values = topology.slice_of(whole, slicing(name, self.cfg))
            # bfloat16 through float32, which holds every bfloat16
            through = "float32" if parameter.dtype == ms.bfloat16 else str(parameter.dtype).lower()
            # In place: compiled graphs hold on to the memory they were compiled with.
            parameter.copy_(Tensor(cast(values, through, name)).astype(parameter.dtype))
            release(whole)
        self.after_update()

    def after_update(self) -> None:
        """Forget what conversations have computed: call it when weights were changed in place."""
        for decoders in self.decoders.values():
            for decoder in decoders:
                decoder.held = []

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None,
               segment_ids: Tensor | None = None) -> Tensor:
        """Output of the final norm (B, T, C).

        attention_mask (B, T) int32 holds 0 where a row is padded on the left; segment_ids (B, T) int32 the number of
        the record that a token belongs to, where several stand in one row: each is computed as if it stood alone.
        """
        B, T = input_ids.shape
        if T > self.cfg.seq_length:
            raise ValueError(f"input_ids has {T} tokens a row, more than seq_length {self.cfg.seq_length}; "
                             "shorten the input or raise seq_length")
        steps = ops.arange(T)
        allowed = (steps.reshape(1, T) <= steps.reshape(T, 1)).reshape(1, 1, 1, T, T)
        if attention_mask is not None:
            allowed = ops.logical_and(allowed, (attention_mask != 0).reshape(B, 1, 1, 1, T))
        cos, sin = self.cos[:T].reshape(1, T, 1, -1), self.sin[:T].reshape(1, T, 1, -1)
        if segment_ids is not None:
            same = segment_ids.reshape(B, 1, 1, 1, T) == segment_ids.reshape(B, 1, 1, T, 1)
            allowed = ops.logical_and(allowed, same)
            places = allowed.astype(ms.float32).sum(-1).reshape(B * T).astype(ms.int32) - 1  # each record from 0
            cos, sin = self.cos[places].reshape(B, T, 1, -1), self.sin[places].reshape(B, T, 1, -1)
        mask = (1 - allowed.astype(ms.float32)) * MASKED
        return self.transformer.encoder(self.transformer.embedding(input_ids), cos, sin, mask)

    def hidden_with_cache(self, input_ids: Tensor, positions: Tensor, unseen: Tensor, caches: tuple,
                          slots: Tensor) -> Tensor:
        """Output of the final norm (B, T, C) of tokens whose keys and values go into a cache, as `Decoder` keeps it.

        positions: (B, T) of the tokens; unseen: (B, 1, 1, T, S), true for slots that a token must not look at.
        caches: keys and values of each layer, (B * G * S, d); slots: (B * G * T,), where those of the tokens go.
        """
        B, T = input_ids.shape
        cos = ops.gather(self.cos, positions, 0).reshape(B, T, 1, -1)
        sin = ops.gather(self.sin, positions, 0).reshape(B, T, 1, -1)
        mask = unseen.astype(ms.float32) * MASKED
        return self.transformer.encoder(self.transformer.embedding(input_ids), cos, sin, mask, caches, slots)

    def sliced_logits(self, x: Tensor) -> Tensor:
        """Hidden states (N, C) -> this rank's slice of the logits (N, V) in float32."""
        return self.transformer.output_layer(x).astype(ms.float32)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (N, C) -> logits of the whole vocabulary in float32."""
        return self.gather(self.sliced_logits(x))

    def construct(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.hidden(input_ids, attention_mask)
        B, T, C = x.shape
        return self.logits(x.reshape(B * T, C)).reshape(B, T, -1)

    def loss_sum(self, input_ids: Tensor, labels: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Summed loss over the labels that count; labels are shifted: labels[i] is the token after input_ids[i]."""
        x = self.hidden(input_ids, None, segment_ids)
        return self.cross_entropy(self.sliced_logits(x.reshape(-1, x.shape[-1])), labels.reshape(-1))[0]

    def loss(self, input_ids: Tensor, labels: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Mean loss over the labels that count, a scalar; labels (B, T) int32 are shifted, -100 is ignored.

        segment_ids: see `hidden`.
        """
        counted = (labels != IGNORE_INDEX).astype(ms.float32).sum()
        return self.loss_sum(input_ids, labels, segment_ids) / ops.maximum(counted, 1.0)

    def generate(self, input_ids: Any, **settings: Any) -> list[np.ndarray]:
        """Prompts and their answers, a row each; see `glm3kit.generate.loop.generate`."""
        return loop.generate(self, input_ids, **settings)

    def stream(self, input_ids: Any, **settings: Any) -> Iterator[int]:
        """The ids of one answer as they are made; see `glm3kit.generate.loop.stream`."""
        return loop.stream(self, input_ids, **settings)

    def conversation(self, **settings: Any) -> loop.Conversation:
        """Streams the answers of a conversation, computing what is new; see `glm3kit.generate.loop.Conversation`."""
        return loop.Conversation(self, **settings)
