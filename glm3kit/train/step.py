"""A training step as compiled graphs: gradients of a micro-batch in shards, what all ranks agree on, the update.

    Step(net, AdamW(net, config, topology), topology, accumulates=False)
"""

from math import gcd

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from glm3kit.data.token_file import IGNORE_INDEX
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import ReduceScatter, SumOfCopies, Topology, world_sum
from glm3kit.train.lora import dropout_key
from glm3kit.train.optimizer import AdamW
from glm3kit.weights.slices import copies_of, slicing


class SummedLoss(nn.Cell):
    """input_ids, labels and, of packed rows, segment_ids (B, T) -> summed loss; gradients are taken of cells alone."""

    def __init__(self, net: ChatGLM3):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, *batch: Tensor) -> Tensor:  # no default argument: gradients are not taken of such cells
        return self.net.loss_sum(*batch)


class Gradients(nn.Cell):
    """Forward and backward of one micro-batch, gradients in float32, cut into shards as soon as they are summed.

    (scale, input_ids, labels (B, T), segment_ids (B, T) of packed rows) -> (this rank's gradient shards, [loss sum,
    labels that count])
    """

    def __init__(self, net: ChatGLM3, topology: Topology):
        super().__init__(auto_prefix=False)
        self.loss = SummedLoss(net)
        self.parameters = ParameterTuple(net.trainable_params())
        self.dropout_key = dropout_key(net)  # a graph finds only parameters that a cell holds
        self.backward = ops.GradOperation(get_by_list=True, sens_param=True)
        self.reduce = ReduceScatter(topology)
        self.copies = nn.CellList([SumOfCopies(topology, cut) if cut and copies_of(cut, topology.tensor_parallel)[1] > 1
                                   else nn.Identity() for cut in (slicing(p.name, net.cfg) for p in self.parameters)])

    def construct(self, scale: Tensor, *batch: Tensor) -> tuple:
        loss = self.loss(*batch)
        gradients = self.backward(self.loss, self.parameters)(*batch, scale)
        shards = ()
        for i in range(len(gradients)):
            shards += (self.reduce(self.copies[i](gradients[i].astype(ms.float32))),)
        counted = (batch[1] != IGNORE_INDEX).astype(ms.float32).sum()
        return shards, ops.stack((loss, counted))


class Totals(nn.Cell):
    """What all ranks agree on: (gradient shards, [loss sum, count], scale) -> [mean loss, gradient norm, count].

    What several ranks hold alike is counted once: loss and count, the gradients of norms and of shared key/value
    groups, all gradients where the optimizer is not sharded.
    """

    def __init__(self, net: ChatGLM3, topology: Topology):
        super().__init__(auto_prefix=False)
        self.world_sum, self.slices = world_sum(topology), topology.tensor_parallel
        self.data_copies = topology.data_parallel // topology.shards
        self.square, self.sum, self.add = ops.Square(), ops.ReduceSum(), ops.AddN()
        # Of each shard the ranges that no other slice holds and that several hold: (start, stop, columns, slices).
        self.ranges = []
        for parameter in net.trainable_params():
            rows, copies = copies_of(slicing(parameter.name, net.cfg), self.slices)
            size = -(-parameter.size // topology.shards)
            before = rows * (parameter.size // parameter.shape[0]) - topology.shard_rank * size
            alone = size if copies == 1 else min(max(before, 0), size)
            ranges = ((0, alone, 1), (alone, size, copies))
            self.ranges.append(tuple((a, z, gcd(z - a, 1024), n) for a, z, n in ranges if z > a))

    def construct(self, shards: tuple, sums: Tensor, scale: Tensor) -> Tensor:
        squares = ()
        for i in range(len(shards)):
            for start, stop, columns, copies in self.ranges[i]:
                values = shards[i] if stop - start == shards[i].size else shards[i].reshape(-1)[start:stop]
                # Row by row, as a single sum is slow; ops.L2Loss loses digits with the size, a third at 10^8 values.
                squares += (self.sum(self.sum(self.square(values.reshape(-1, columns)), 1)) / copies,)
        totals = self.world_sum(ops.concat((sums / self.slices, (self.add(squares) / self.data_copies).reshape(1))))
        count = ops.maximum(totals[1], 1.0)
        return ops.stack((totals[0] / count, ops.sqrt(totals[2]) / (count * scale), count))


class Step(nn.Cell):
    """The graphs of a step: all of it for one micro-batch; or `accumulate` for each of several, then `update`.

    Each gives [mean loss, gradient norm, count], `accumulate` those so far.
    """

    def __init__(self, net: ChatGLM3, optimizer: AdamW, topology: Topology, accumulates: bool):
        super().__init__(auto_prefix=False)
        self.gradients, self.totals, self.optimizer = Gradients(net, topology), Totals(net, topology), optimizer
        self.accumulated = ParameterTuple([Parameter(Tensor(np.zeros(m.shape, np.float32)), f"accumulated.{m.name}")
                                           for m in (optimizer.masters if accumulates else ())])
        self.sums = Parameter(Tensor(np.zeros(2, np.float32)), "accumulated.sums")
        self.assign = ops.Assign()

    @ms.jit
    def construct(self, scale: Tensor, rate: Tensor, eps: Tensor, decay: Tensor, *batch: Tensor) -> Tensor:
        shards, sums = self.gradients(scale, *batch)
        return self.optimizer(shards, self.totals(shards, sums, scale), scale, rate, eps, decay)

    @ms.jit
    def accumulate(self, scale: Tensor, keep: Tensor, *batch: Tensor) -> Tensor:
        """Add a micro-batch. keep: 0 for the first of a step, which replaces what the last step left; else 1."""
        shards, sums = self.gradients(scale, *batch)
        added = ()
        for i in range(len(shards)):
            # A product with 0 would keep an overflow of the step before.
            before = ops.select(keep > 0, self.accumulated[i], ops.zeros_like(shards[i]))
            added += (self.assign(self.accumulated[i], before + shards[i]),)
        sums = self.assign(self.sums, ops.select(keep > 0, self.sums, ops.zeros_like(sums)) + sums)
        return self.totals(added, sums, scale)

    @ms.jit
    def update(self, totals: Tensor, scale: Tensor, rate: Tensor, eps: Tensor, decay: Tensor) -> Tensor:
        """Update from what has been accumulated."""
        return self.optimizer(self.accumulated, totals, scale, rate, eps, decay)
