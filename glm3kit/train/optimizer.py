"""Schedule, loss scale and AdamW on shards of parameters.

AdamW is torch's, bias corrected (https://arxiv.org/abs/1711.05101).

    learning_rate(step=0, total_steps=20, config=TrainConfig(warmup_steps=4))
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from glm3kit.config.groups import TrainConfig
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import AllGather, Topology, shard_of


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Rate of a step, counted from 0: linear warm-up, then a polynomial of power 1 down to end_learning_rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.end_learning_rate + (config.learning_rate - config.end_learning_rate) * (1 - min(progress, 1.0))


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices, not to biases and norms."""
    return not (name.endswith(".bias") or "layernorm" in name)


class LossScale:
    """Loss scaling for float16. Dynamic: halved after an overflow, doubled after 1000 good steps; a number stays."""

    def __init__(self, setting: float | str | None):
        self.dynamic = setting == "dynamic"
        self.value = 65536.0 if self.dynamic else float(setting or 1.0)
        self.good_steps = 0

    def update(self, overflow: bool) -> None:
        if not self.dynamic:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps % 1000 == 0:
            self.value *= 2


class AdamW(nn.Cell):
    """One update of this rank's shards, and of the whole parameters from the shards of all ranks.

    State, in float32: `master` (a parameter's shard; the parameter itself where a rank holds it whole in float32) and
    the moments `exp_avg` and `exp_avg_sq`.
    """

    def __init__(self, net: ChatGLM3, config: TrainConfig, topology: Topology):
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(net.trainable_params())
        self.whole = topology.shards == 1 and all(p.dtype == ms.float32 for p in self.parameters)
        masters, averages, squares = [], [], []
        for parameter in self.parameters:
            values = shard_of(parameter.float().asnumpy(), topology.shard_rank, topology.shards)
            masters.append(parameter if self.whole else Parameter(Tensor(values), f"master.{parameter.name}"))
            averages.append(Parameter(Tensor(np.zeros_like(values)), f"exp_avg.{parameter.name}"))
            squares.append(Parameter(Tensor(np.zeros_like(values)), f"exp_avg_sq.{parameter.name}"))
        self.masters, self.averages, self.squares = map(ParameterTuple, (masters, averages, squares))
        self.decays = tuple(config.weight_decay > 0 and decays(p.name) for p in self.parameters)
        (self.beta1, self.beta2), self.max_norm = config.betas, config.max_grad_norm
        # On a CPU these two take half the time of ops.AdamWeightDecay.
        self.descend, self.adam = ops.ApplyGradientDescent(), ops.Adam()
        self.gather, self.assign = AllGather(topology), ops.Assign()

    def state(self) -> list[Parameter]:
        """What a checkpoint holds besides the weights."""
        return [*(() if self.whole else self.masters), *self.averages, *self.squares]

    def construct(self, shards: tuple, totals: Tensor, scale: Tensor, rate: Tensor, eps: Tensor,
                  decay: Tensor) -> Tensor:
        """Update from summed, scaled gradients: their mean, clipped as torch clips -> the totals, told last.

        totals: [mean loss, gradient norm, count]; rate, eps and decay come from `bias_corrected`.
        """
        factor = 1 / (totals[2] * scale)
        if self.max_norm is not None:
            factor = factor * ops.minimum(self.max_norm / (totals[1] + 1e-6), 1.0)
        done = factor
        for i in range(len(self.parameters)):
            master, parameter = self.masters[i], self.parameters[i]
            if self.decays[i]:
                master = ops.depend(master, self.descend(master, decay, master))
            updated = self.adam(master, self.averages[i], self.squares[i], 0.0, 0.0, rate, self.beta1, self.beta2, eps,
                                shards[i] * factor)
            if not self.whole:
                full = self.gather(ops.depend(master, updated), parameter.shape)
                updated = self.assign(parameter, full.astype(parameter.dtype))
            done = ops.depend(done, updated)
        # A result that is ready before its graph is done keeps `asnumpy` spinning: on two cores that costs the
        # update's operators half their speed.
        return ops.concat((ops.depend(totals[:1], done), totals[1:]))


def bias_corrected(step: int, rate: float, config: TrainConfig) -> tuple[float, float, float]:
    """Rate and eps with AdamW's bias corrections in them, and what a weight loses to decay; step from 1.

    m/c1 / (sqrt(v/c2) + eps) = sqrt(c2)/c1 * m / (sqrt(v) + eps sqrt(c2)), with c = 1 - beta^step in float64.
    """
    root = math.sqrt(1 - config.betas[1] ** step)
    return rate * root / (1 - config.betas[0] ** step), config.eps * root, rate * config.weight_decay
