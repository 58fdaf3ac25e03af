"""Training: schedule, AdamW on shards, the step as one compiled graph, and the loop.

The loss of a step is the sum over all labels that count, of all ranks and micro-steps, divided by their number, so that
the curve does not depend on how the rows are laid out. AdamW is torch's, bias corrected (https://arxiv.org/abs/1711.05101).

    history = fit(net, batches, TrainConfig(learning_rate=1e-3, total_steps=20))
"""

import math
import time
from collections.abc import Callable, Iterable
from itertools import islice

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from glm3kit.checkpoint import STRATEGY, load_checkpoint, save_checkpoint, usable_checkpoint, weight_layouts
from glm3kit.config import RunConfig, TrainConfig
from glm3kit.data import Batches, prepare_data
from glm3kit.errors import CheckpointError, DataError, JobError
from glm3kit.layout import copies_of
from glm3kit.lora import add_adapters
from glm3kit.metrics import MetricsWriter, format_step_line
from glm3kit.model import IGNORE_INDEX, ChatGLM3, slicing
from glm3kit.parallel import (
    ALONE,
    AllGather,
    ReduceScatter,
    SumOfCopies,
    Topology,
    WorldSum,
    barrier,
    shard_of,
    start_processes,
)
from glm3kit.strategy import write_strategy
from glm3kit.weights import fill_parameters, load_weights, random_weights

Batch = tuple[np.ndarray, np.ndarray]  # input_ids and labels, (B, T) int32 each


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


class SummedLoss(nn.Cell):
    """input_ids, labels (B, T) -> summed loss; a cell of its own, since gradients are taken of cells."""

    def __init__(self, net: ChatGLM3):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.net.loss_sum(input_ids, labels)


class Gradients(nn.Cell):
    """Forward and backward of one micro-batch, gradients in float32, cut into shards as soon as they are summed.

    (input_ids, labels (B, T), scale) -> (this rank's gradient shards, [loss sum, labels that count])
    """

    def __init__(self, net: ChatGLM3, topology: Topology):
        super().__init__(auto_prefix=False)
        self.loss = SummedLoss(net)
        self.parameters = ParameterTuple(net.trainable_params())
        self.backward = ops.GradOperation(get_by_list=True, sens_param=True)
        self.reduce = ReduceScatter(topology)
        self.copies = nn.CellList([SumOfCopies(topology, cut) if cut and copies_of(cut, topology.tensor_parallel)[1] > 1
                                   else nn.Identity() for cut in (slicing(p.name, net.cfg) for p in self.parameters)])

    def construct(self, input_ids: Tensor, labels: Tensor, scale: Tensor) -> tuple:
        loss = self.loss(input_ids, labels)
        gradients = self.backward(self.loss, self.parameters)(input_ids, labels, scale)
        shards = ()
        for i in range(len(gradients)):
            shards += (self.reduce(self.copies[i](gradients[i].astype(ms.float32))),)
        counted = (labels != IGNORE_INDEX).astype(ms.float32).sum()
        return shards, ops.stack((loss, counted))


class Totals(nn.Cell):
    """What all ranks agree on: (gradient shards, [loss sum, count], scale) -> [mean loss, gradient norm, count].

    What several ranks hold alike is counted once: loss and count, the gradients of norms and of shared key/value
    groups, all gradients where the optimizer is not sharded.
    """

    def __init__(self, net: ChatGLM3, topology: Topology):
        super().__init__(auto_prefix=False)
        self.world_sum, self.slices = WorldSum(topology), topology.tensor_parallel
        self.data_copies = topology.data_parallel // topology.shards
        self.half_square = ops.L2Loss()
        # Of each shard: how many of its values no other slice holds, and how many slices hold the others.
        self.alone, self.copies = [], []
        for parameter in net.trainable_params():
            rows, copies = copies_of(slicing(parameter.name, net.cfg), self.slices)
            size = -(-parameter.size // topology.shards)
            before = rows * (parameter.size // parameter.shape[0]) - topology.shard_rank * size
            self.alone.append(min(max(before, 0), size))
            self.copies.append(copies)

    def square(self, shard: Tensor, alone: int, copies: int) -> Tensor:
        """Half the sum of squares that this rank answers for."""
        if copies == 1 or alone == shard.size:
            return self.half_square(shard)
        if alone == 0:
            return self.half_square(shard) / copies
        flat = shard.reshape(-1)
        return self.half_square(flat[:alone]) + self.half_square(flat[alone:]) / copies

    def construct(self, shards: tuple, sums: Tensor, scale: Tensor) -> Tensor:
        square = ops.zeros((), ms.float32)
        for i in range(len(shards)):
            square += 2 / self.data_copies * self.square(shards[i], self.alone[i], self.copies[i])
        totals = self.world_sum(ops.concat((sums / self.slices, square.reshape(1))))
        count = ops.maximum(totals[1], 1.0)
        return ops.stack((totals[0] / count, ops.sqrt(totals[2]) / (count * scale), count))


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
        self.decays = tuple(config.weight_decay if decays(p.name) else 0.0 for p in self.parameters)
        self.beta1, self.beta2 = config.betas
        self.update, self.gather, self.assign = ops.AdamWeightDecay(), AllGather(topology), ops.Assign()

    def state(self) -> list[Parameter]:
        """What a checkpoint holds besides the weights."""
        return [*(() if self.whole else self.masters), *self.averages, *self.squares]

    def construct(self, shards: tuple, factor: Tensor, rate: Tensor, eps: Tensor, decay: Tensor) -> Tensor:
        """Multiply the summed gradients by `factor` and update; rate, eps and decay come from `bias_corrected`."""
        done = factor
        for i in range(len(self.parameters)):
            master, parameter = self.masters[i], self.parameters[i]
            updated = self.update(master, self.averages[i], self.squares[i], rate, self.beta1, self.beta2, eps,
                                  decay * self.decays[i], shards[i] * factor)
            if not self.whole:
                full = self.gather(ops.depend(master, updated), parameter.shape)
                updated = self.assign(parameter, full.astype(parameter.dtype))
            done = ops.depend(done, updated)
        return done


def bias_corrected(step: int, rate: float, config: TrainConfig) -> tuple[float, float, float]:
    """AdamW's bias corrections as rate, eps and a factor on weight decay, for an operator that knows none; step from 1.

    m/c1 / (sqrt(v/c2) + eps) = sqrt(c2)/c1 * m / (sqrt(v) + eps sqrt(c2)), with c = 1 - beta^step.
    """
    root = math.sqrt(1 - config.betas[1] ** step)
    ratio = root / (1 - config.betas[0] ** step)
    return rate * ratio, config.eps * root, 1 / ratio


def clip_factor(norm: Tensor, count: Tensor, scale: Tensor, max_norm: float | None) -> Tensor:
    """What summed, scaled gradients are multiplied with: the mean, unscaled, clipped to max_norm as torch clips."""
    factor = 1 / (count * scale)
    return factor if max_norm is None else factor * ops.minimum(max_norm / (norm + 1e-6), 1.0)


class Step(nn.Cell):
    """A whole step of one micro-batch as one graph: gradients, totals, update -> [mean loss, gradient norm, count]."""

    def __init__(self, gradients: Gradients, totals: Totals, optimizer: AdamW, max_norm: float | None):
        super().__init__(auto_prefix=False)
        self.gradients, self.totals, self.optimizer, self.max_norm = gradients, totals, optimizer, max_norm

    @ms.jit
    def construct(self, input_ids: Tensor, labels: Tensor, scale: Tensor, rate: Tensor, eps: Tensor,
                  decay: Tensor) -> Tensor:
        shards, sums = self.gradients(input_ids, labels, scale)
        totals = self.totals(shards, sums, scale)
        factor = clip_factor(totals[1], totals[2], scale, self.max_norm)
        return ops.depend(totals, self.optimizer(shards, factor, rate, eps, decay))


class Accumulate(nn.Cell):
    """Add a micro-batch to the accumulated shards and sums -> totals so far, as `Totals` gives them."""

    def __init__(self, gradients: Gradients, totals: Totals, optimizer: AdamW):
        super().__init__(auto_prefix=False)
        self.gradients, self.totals = gradients, totals
        self.accumulated = ParameterTuple([Parameter(Tensor(np.zeros(m.shape, np.float32)), f"accumulated.{m.name}")
                                           for m in optimizer.masters])
        self.sums = Parameter(Tensor(np.zeros(2, np.float32)), "accumulated.sums")
        self.assign = ops.Assign()

    @ms.jit
    def construct(self, input_ids: Tensor, labels: Tensor, scale: Tensor, keep: Tensor) -> Tensor:
        """keep: 0 for the first micro-batch of a step, which replaces what the last step left; else 1."""
        shards, sums = self.gradients(input_ids, labels, scale)
        added = ()
        for i in range(len(shards)):
            # A product with 0 would keep an overflow of the step before.
            before = ops.select(keep > 0, self.accumulated[i], ops.zeros_like(shards[i]))
            added += (self.assign(self.accumulated[i], before + shards[i]),)
        sums = self.assign(self.sums, ops.select(keep > 0, self.sums, ops.zeros_like(sums)) + sums)
        return self.totals(added, sums, scale)


class Update(nn.Cell):
    """Update from the accumulated shards."""

    def __init__(self, accumulate: Accumulate, optimizer: AdamW, max_norm: float | None):
        super().__init__(auto_prefix=False)
        self.accumulated, self.optimizer, self.max_norm = accumulate.accumulated, optimizer, max_norm

    @ms.jit
    def construct(self, totals: Tensor, scale: Tensor, rate: Tensor, eps: Tensor, decay: Tensor) -> Tensor:
        factor = clip_factor(totals[1], totals[2], scale, self.max_norm)
        return self.optimizer(self.accumulated, factor, rate, eps, decay)


class Trainer:
    """A model with its optimizer state, advanced a step at a time."""

    def __init__(self, net: ChatGLM3, config: TrainConfig, total_steps: int, topology: Topology = ALONE):
        if config.lora:
            add_adapters(net, config.lora, config.seed)
        self.net = net.set_train()
        self.config, self.total_steps, self.step = config, total_steps, 0
        self.scale = LossScale(config.loss_scale)
        gradients, totals = Gradients(net, topology), Totals(net, topology)
        self.optimizer = AdamW(net, config, topology)
        # One graph where nothing can keep the update from happening; else the host decides between two.
        self.fused = config.gradient_accumulation_steps == 1 and config.loss_scale is None
        if self.fused:
            self.whole_step = Step(gradients, totals, self.optimizer, config.max_grad_norm)
        else:
            self.accumulate = Accumulate(gradients, totals, self.optimizer)
            self.update = Update(self.accumulate, self.optimizer, config.max_grad_norm)

    def state(self) -> dict:
        """Where training stands, besides weights and optimizer state."""
        return {"step": self.step, "total_steps": self.total_steps, "loss_scale": self.scale.value,
                "good_steps": self.scale.good_steps}

    def load_state(self, state: dict) -> None:
        """Go on where `state` was taken; raises CheckpointError if the schedule was another."""
        if state["total_steps"] != self.total_steps:
            raise CheckpointError(f"the checkpoint is of a run of {state['total_steps']} steps, this one has "
                                  f"{self.total_steps}, so the schedule would jump; continue with the same "
                                  "train.total_steps, train.epochs and data")
        self.step = state["step"]
        self.scale.value, self.scale.good_steps = state["loss_scale"], state["good_steps"]

    def advance(self, batches: list[Batch]) -> dict:
        """One step over gradient_accumulation_steps micro-batches -> its record.

        An overflow leaves the weights as they are where the loss is scaled; without scaling it raises JobError.
        """
        started = time.perf_counter()
        rate = learning_rate(self.step, self.total_steps, self.config)
        scalars = [Tensor(x, ms.float32) for x in bias_corrected(self.step + 1, rate, self.config)]
        scale = Tensor(self.scale.value, ms.float32)
        if self.fused:
            (input_ids, labels), = batches
            totals = self.whole_step(Tensor(input_ids), Tensor(labels), scale, *scalars).asnumpy()
        else:
            for i, (input_ids, labels) in enumerate(batches):
                sums = self.accumulate(Tensor(input_ids), Tensor(labels), scale, Tensor(min(i, 1), ms.int32))
            totals = sums.asnumpy()
        loss, norm, count = (float(x) for x in totals)
        overflow = not math.isfinite(norm)
        if overflow and not self.scale.dynamic:
            raise JobError(f"step {self.step + 1}: loss {loss}, gradient norm {norm}; expected finite numbers. Try a "
                           "lower learning_rate, loss_scale: dynamic for float16, and on Ascend the environment "
                           "variable MS_ASCEND_CHECK_OVERFLOW_MODE=INFNAN_MODE")
        if not self.fused and not overflow:
            self.update(sums, scale, *scalars).asnumpy()
        record = {"step": self.step + 1, "loss": loss, "learning_rate": rate, "grad_norm": norm, "overflow": overflow,
                  "loss_scale": self.scale.value, "tokens": int(sum(ids.size for ids, _ in batches)),
                  "loss_tokens": int(count), "step_time_ms": (time.perf_counter() - started) * 1000}
        self.scale.update(overflow)
        self.step += 1
        self.net.forget_prompts()  # what conversations have cached is of the weights before
        return record


def run_steps(trainer: Trainer, batches: Iterable[Batch],
              on_step: Callable[[dict, Trainer], None] | None = None) -> list[dict]:
    """Advance a trainer to its last step; one record a step.

    Raises DataError if the batches end before, JobError if the loss is no finite number.
    """
    history, source, size = [], iter(batches), trainer.config.gradient_accumulation_steps
    while trainer.step < trainer.total_steps:
        micro_batches = list(islice(source, size))
        if len(micro_batches) < size:
            raise DataError(f"the batches ended after step {trainer.step} of {trainer.total_steps}; "
                            "lower total_steps or give more rows")
        record = trainer.advance(micro_batches)
        history.append(record)
        if on_step:
            on_step(record, trainer)
    return history


def fit(net: ChatGLM3, batches: Iterable[Batch], config: TrainConfig, *, topology: Topology = ALONE,
        on_step: Callable[[dict, Trainer], None] | None = None) -> list[dict]:
    """Train `net` in place; one record a step.

    batches: (input_ids, labels) int32 arrays (B, T) of this rank, labels shifted; gradient_accumulation_steps of them
        make a step. config.total_steps: where to stop, by default when they end (then they must have a length).
    on_step: called with each record and the trainer.
    Returns dicts with step, loss, learning_rate, grad_norm, overflow, loss_scale, step_time_ms and more.
    Raises DataError if the batches end before total_steps, JobError if the loss is no finite number.
    Example: fit(net, [(ids, labels)] * 20, TrainConfig(learning_rate=1e-3, total_steps=20))
    """
    total_steps = config.total_steps
    if total_steps is None:
        if not hasattr(batches, "__len__"):
            raise DataError("fit: batches have no length and total_steps is not set; give TrainConfig a total_steps")
        total_steps = len(batches) // config.gradient_accumulation_steps
    return run_steps(Trainer(net, config, total_steps, topology), batches, on_step)


def run_rank(config: RunConfig, resume: bool = False) -> list[dict]:
    """Train as one rank of the run that `config` describes, with metrics and checkpoints in its folder.

    Started once a device by `glm3kit launch`. resume: go on from the newest complete checkpoint.
    """
    train, job_dir = config.train, config.job_dir
    topology = start_processes(config.parallel)
    if topology.rank == 0:
        prepare_data(config)  # the others then find the token file ready
    barrier(topology)
    tokens = prepare_data(config, progress=False)["train"]
    rows = dict(batch_size=train.batch_size, seq_length=config.model.seq_length, seed=train.seed,
                bucket_lengths=config.data.bucket_lengths,
                rank=topology.data_rank, ranks=topology.data_parallel)
    epoch = Batches(tokens, **rows)
    micro_steps = train.gradient_accumulation_steps
    total_steps = train.total_steps or train.epochs * epoch.steps_per_epoch // micro_steps
    epochs = math.ceil(total_steps * micro_steps / epoch.steps_per_epoch)

    net = ChatGLM3(config.model, topology)
    if config.model.checkpoint_name_or_path:
        load_weights(net, config.model.checkpoint_name_or_path, config.model.adapters_path)
    else:
        print(f"model.checkpoint_name_or_path is not set: starting from random weights, seed {train.seed}")
        fill_parameters(net, random_weights(config.model, train.seed))
    trainer = Trainer(net, train, total_steps, topology)
    data = {"digest": tokens.digest, "seed": train.seed, "rows_per_step": epoch.global_batch * micro_steps,
            "rows_per_epoch": epoch.global_batch * epoch.steps_per_epoch}
    if resume:
        load_checkpoint(usable_checkpoint(job_dir, topology), net, trainer, topology, data)
    if topology.rank == 0:
        write_strategy(job_dir / "strategy" / STRATEGY, weight_layouts(net, topology))
    metrics = MetricsWriter(job_dir / "metrics.jsonl") if topology.rank == 0 else None

    def on_step(record: dict, trainer: Trainer) -> None:
        step = record["step"]
        record["total_steps"] = total_steps
        record["epoch"] = 1 + (step * micro_steps - 1) // epoch.steps_per_epoch
        record["tokens_per_second"] = record["tokens"] / record["step_time_ms"] * 1000 * topology.data_parallel
        if metrics:
            metrics.write(record)
        if step % train.log_steps == 0 or step == total_steps:
            print(format_step_line(record, epochs, epoch.steps_per_epoch // micro_steps), flush=True)
        if step == total_steps or (train.save_steps and step % train.save_steps == 0):
            save_checkpoint(job_dir, net, trainer, topology, train.keep_checkpoints, data)

    batches = Batches(tokens, **rows, epochs=epochs, start_step=trainer.step * micro_steps)
    return run_steps(trainer, batches, on_step)
