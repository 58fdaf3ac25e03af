"""Rotary attention with grouped keys and values.

In the shapes: B batch, T tokens, S slots of the kv cache, C hidden size, H heads, G key/value groups, d head size.
"""

from math import sqrt

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from glm3kit.config.groups import ModelConfig
from glm3kit.model.layers import Linear
from glm3kit.parallel import Topology, on_ascend

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


class MaskedAttention(nn.Cell):
    """softmax(q k^T + mask) v, softmax in float32 as the reference -> (result, probabilities).

    q: (B, G, H/G * T, d), scaled, the heads of a group one after the other; k, v: (B, G, S, d);
    mask: (B or 1, 1, 1, T, S), added.
    The gradient is written out: sum(dP * P) over S is sum(dout * out) over d, which is shorter
    (https://arxiv.org/abs/2205.14135, appendix B.2).
    """

    def __init__(self):
        super().__init__()
        self.product, self.product_nt = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
        self.product_tn = ops.BatchMatMul(transpose_a=True)
        self.softmax, self.sum = ops.Softmax(), ops.ReduceSum(keep_dims=True)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        B, G, R, _ = q.shape
        T, S = mask.shape[-2:]
        scores = self.product_nt(q, k).astype(ms.float32).reshape(B, G, R // T, T, S) + mask
        probs = self.softmax(scores).astype(q.dtype).reshape(B, G, R, S)
        return self.product(probs, v), probs

    def bprop(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: tuple, dout: tuple) -> tuple:
        probs, dy = out[1], dout[0]
        rows = self.sum((dy * out[0]).astype(ms.float32), 3)  # (B, G, H/G * T, 1)
        dscores = (probs * (self.product_nt(dy, v).astype(ms.float32) - rows)).astype(q.dtype)
        return self.product(dscores, k), self.product_tn(dscores, q), self.product_tn(probs, dy), mask


class Split(nn.Cell):
    """x cut into parts of these sizes along an axis; the gradient puts theirs together in one pass."""

    def __init__(self, sizes: list[int], axis: int):
        super().__init__()
        self.sizes, self.axis, self.concat = sizes, axis, ops.Concat(axis)

    def construct(self, x: Tensor) -> tuple[Tensor, ...]:
        return ops.split(x, self.sizes, self.axis)

    def bprop(self, x: Tensor, out: tuple, dout: tuple) -> tuple[Tensor]:
        return (self.concat(dout),)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same by Ascend's fused operator, which keeps no (T, S) matrix.

    q: (B, H, T, d), k and v: (B, G, T, d), float16 or bfloat16; mask: as above -> (B, H, T, d).
    """
    B, _, _, T, _ = mask.shape
    # True: does not count. A token of padding sees itself, as the operator leaves open what it makes of nothing.
    hidden = ops.logical_and(mask < 0, ops.logical_not(ops.eye(T, T, ms.bool_)))
    hidden = hidden.reshape((T, T) if B == 1 else (B, 1, T, T))
    return ops.flash_attention_score(q, k, v, q.shape[1], attn_mask=hidden, scalar_value=scale, input_layout="BNSD")


class SelfAttention(nn.Cell):
    """Causal attention: H query heads share G key/value groups; query head h uses group h // (H/G).

    Under tensor parallelism H and G are this rank's. With a cache, keys and values are written to its slots, and
    attention looks at all S slots that the mask allows.
    """

    def __init__(self, cfg: ModelConfig, topology: Topology, depth_scale: float):
        super().__init__()
        self.heads = cfg.num_attention_heads // topology.tensor_parallel
        self.groups = max(cfg.multi_query_group_num // topology.tensor_parallel, 1)
        self.size = cfg.kv_channels
        self.query_key_value = Linear(cfg.hidden_size, (self.heads + 2 * self.groups) * self.size, cfg, topology, 0,
                                      bias=True)
        self.dense = Linear(self.heads * self.size, cfg.hidden_size, cfg, topology, 1, scale=depth_scale)
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
            y = flash_attention(q.transpose(0, 2, 1, 3), k, v, mask, self.scale).transpose(0, 2, 1, 3)  # (B, T, H, d)
            return self.dense(y.reshape(B * T, H * d)).reshape(B, T, C)
        if cache is not None:
            k = self.write(cache[0], slots, k.reshape(-1, d)).reshape(B, G, -1, d)  # (B, G, S, d)
            v = self.write(cache[1], slots, v.reshape(-1, d)).reshape(B, G, -1, d)
        q = q.reshape(B, T, G, H // G, d).transpose(0, 2, 3, 1, 4).reshape(B, G, H // G * T, d)
        y, _ = self.attend(q * self.scale, k, v, mask)  # (B, G, H/G * T, d)
        y = y.reshape(B, G, H // G, T, d).transpose(0, 3, 1, 2, 4).reshape(B * T, H * d)
        return self.dense(y).reshape(B, T, C)
