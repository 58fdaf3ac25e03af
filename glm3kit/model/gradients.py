"""Cells of the model whose gradients are written out: shorter, or in fewer passes, than what differentiation makes.

Operators are attributes, since calls of mindspore.ops functions do not compile inside a bprop. A bprop gets the inputs,
the outputs and the gradients of the outputs; in the shapes N rows, the rest as in chatglm3.py.

    normed, _ = RootMeanSquare(size=64, eps=1e-5)(x, weight)
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from glm3kit.data.token_file import IGNORE_INDEX
from glm3kit.parallel import GatherSlices, SumOfSlices, Topology


class RootMeanSquare(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight: (N, C) and (C,) float32 -> (the result (N, C), r = 1 / the root (N, 1)).

    With n = x r: dx = r (dy weight - n mean(dy weight n)) and dweight = sum(dy n) over the rows.
    Half the passes over memory that automatic differentiation makes.
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


class Split(nn.Cell):
    """x cut into parts of these sizes along an axis; the gradient puts theirs together in one pass."""

    def __init__(self, sizes: list[int], axis: int):
        super().__init__()
        self.sizes, self.axis, self.concat = sizes, axis, ops.Concat(axis)

    def construct(self, x: Tensor) -> tuple[Tensor, ...]:
        return ops.split(x, self.sizes, self.axis)

    def bprop(self, x: Tensor, out: tuple, dout: tuple) -> tuple[Tensor]:
        return (self.concat(dout),)


class MaskedAttention(nn.Cell):
    """P = softmax(q k^T + mask), in float32 as the reference -> (P v, P).

    q: (B, G, H/G * T, d), scaled, the heads of a group one after the other; k, v: (B, G, S, d);
    mask: (B or 1, 1, 1, T, S), added.
    dscores = P (dP - sum(dP P)) with dP = dout v^T, where sum(dP P) over S is sum(dout out) over d, which is shorter
    (https://arxiv.org/abs/2205.14135, appendix B.2); then dq = dscores k, dk = dscores^T q, dv = P^T dout.
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


class CrossEntropySum(nn.Cell):
    """Sum of -log softmax(logits)[label] over the rows whose label counts; dlogits = softmax - one-hot of the label.

    logits (N, V) float32, this rank's slice of the vocabulary; labels (N,) int32 of the whole
    -> (scalar, softmax over the slice (N, V), the slice's share of the whole vocabulary's (N, 1)). The softmax takes
    the place of the logits in memory.
    """

    def __init__(self, topology: Topology):
        super().__init__()
        self.rank, self.whole = topology.tensor_rank, topology.tensor_parallel == 1
        self.gather, self.sum = GatherSlices(topology), SumOfSlices(topology)
        self.softmax, self.highest = ops.Softmax(), ops.ArgMaxWithValue(1, keep_dims=True)
        self.clip, self.one_hot, self.pick = ops.ReLU(), ops.OneHot(), ops.GatherD()
        self.on, self.off = Tensor(1, ms.float32), Tensor(0, ms.float32)

    def local(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels as columns of this rank's slice, and 1.0 where they lie in it."""
        labels = labels - self.rank * logits.shape[1]
        ours = (labels >= 0).astype(ms.float32) * (labels < logits.shape[1]).astype(ms.float32)
        return (self.clip(labels).astype(ms.float32) * ours).astype(ms.int32), ours

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = self.softmax(logits)
        place, highest = self.highest(logits)
        # log sum exp, from the softmax of the highest logit: that is at least 1 / V, so its logarithm is exact enough
        slice_total = highest - ops.log(self.pick(probs, 1, place))  # (N, 1)
        total = slice_total if self.whole else ops.logsumexp(self.gather(slice_total), 1, True)
        columns, ours = self.local(logits, labels)
        picked = self.sum(self.pick(logits, 1, columns.reshape(-1, 1)).reshape(-1) * ours)
        losses = (total.reshape(-1) - picked) * (labels != IGNORE_INDEX).astype(ms.float32)
        return losses.sum(), probs, ops.exp(slice_total - total)

    def bprop(self, logits: Tensor, labels: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, Tensor]:
        counted = (labels != IGNORE_INDEX).astype(ms.float32) * dout[0]
        columns, ours = self.local(logits, labels)
        expected = self.one_hot(columns, logits.shape[1], self.on, self.off)
        if self.whole:
            return (out[1] - expected) * counted.reshape(-1, 1), labels
        return (out[1] * out[2] - expected * ours.reshape(-1, 1)) * counted.reshape(-1, 1), labels
