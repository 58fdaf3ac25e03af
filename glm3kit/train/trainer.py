"""A model with its optimizer state, advanced step by step: `fit`.

The loss of a step is the sum over all labels that count, of all ranks and micro-steps, divided by their number, so that
the curve does not depend on how the rows are laid out.

    history = fit(net, batches, TrainConfig(learning_rate=1e-3, total_steps=20))
"""

import math
import time
from collections.abc import Callable, Iterable
from itertools import islice

import mindspore as ms
import numpy as np
from mindspore import Tensor

from glm3kit.config.groups import TrainConfig
from glm3kit.errors import CheckpointError, DataError, JobError
from glm3kit.model.adapter import set_key
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import ALONE, Topology
from glm3kit.train.lora import add_adapters, dropout_key
from glm3kit.train.optimizer import AdamW, LossScale, bias_corrected, learning_rate
from glm3kit.train.step import Step

Batch = tuple[np.ndarray, ...]  # input_ids, labels and, of packed rows, segment_ids, (B, T) int32 each


class Trainer:
    """A model with its optimizer state, advanced a step at a time."""

    def __init__(self, net: ChatGLM3, config: TrainConfig, total_steps: int, topology: Topology = ALONE):
        if config.lora:
            add_adapters(net, config.lora, config.seed)
        if config.recompute:
            for layer in net.transformer.encoder.layers:
                layer.recompute()
        self.net = net.set_train()
        self.config, self.total_steps, self.step = config, total_steps, 0
        self.scale = LossScale(config.loss_scale)
        # Losses are summed; about this share of the sum is the mean that a loss scale is meant for.
        self.share = 1 / (config.batch_size * net.cfg.seq_length)
        self.dropout_key = dropout_key(net)
        self.optimizer = AdamW(net, config, topology)
        # One graph where nothing can keep the update from happening; else the host decides between two.
        self.fused = config.gradient_accumulation_steps == 1 and config.loss_scale is None
        self.graphs = Step(net, self.optimizer, topology, accumulates=not self.fused)

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

        An overflow leaves the weights as they are where the loss scale can be lowered; else it raises JobError.
        """
        started = time.perf_counter()
        rate = learning_rate(self.step, self.total_steps, self.config)
        scalars = [Tensor(x, ms.float32) for x in bias_corrected(self.step + 1, rate, self.config)]
        scale = Tensor(self.scale.value * self.share, ms.float32)
        for i, batch in enumerate(batches):
            if self.dropout_key is not None:  # adapters drop what belongs to this micro-step, also after a resume
                set_key(self.dropout_key, self.config.seed, self.step, i)
            if self.fused:
                totals = self.graphs(scale, *scalars, *map(Tensor, batch))
            else:
                totals = self.graphs.accumulate(scale, Tensor(min(i, 1), ms.int32), *map(Tensor, batch))
        loss, norm, count = (float(x) for x in totals.asnumpy())
        overflow = not math.isfinite(norm)
        if overflow and not (self.scale.dynamic and self.scale.value > 1):  # no lower scale would help
            raise JobError(f"step {self.step + 1}: loss {loss}, gradient norm {norm}, loss scale {self.scale.value:g}; "
                           "expected finite numbers. On Ascend set the environment variable "
                           "MS_ASCEND_CHECK_OVERFLOW_MODE=INFNAN_MODE and start again; else try a lower learning_rate, "
                           "loss_scale: dynamic for float16, or bfloat16")
        if not self.fused and not overflow:
            self.graphs.update(totals, scale, *scalars).asnumpy()
        record = {"step": self.step + 1, "loss": loss, "learning_rate": rate, "grad_norm": norm, "overflow": overflow,
                  "loss_scale": self.scale.value, "tokens": int(sum(batch[0].size for batch in batches)),
                  "loss_tokens": int(count), "compute_time_ms": (time.perf_counter() - started) * 1000}
        self.scale.update(overflow)
        self.step += 1
        self.net.after_update()  # what conversations have cached is of the weights before
        return record


def run_steps(trainer: Trainer, batches: Iterable[Batch],
              on_step: Callable[[dict, Trainer], None] | None = None) -> list[dict]:
    """Advance a trainer to its last step; records and errors are those of `fit`."""
    history, source, size = [], iter(batches), trainer.config.gradient_accumulation_steps
    while trainer.step < trainer.total_steps:
        started = time.perf_counter()
        micro_batches = list(islice(source, size))
        if len(micro_batches) < size:
            raise DataError(f"the batches ended after step {trainer.step} of {trainer.total_steps}; "
                            "lower total_steps or give more rows")
        data_time_ms = (time.perf_counter() - started) * 1000
        record = trainer.advance(micro_batches)
        record |= {"data_time_ms": data_time_ms, "step_time_ms": (time.perf_counter() - started) * 1000}
        history.append(record)
        if on_step:
            on_step(record, trainer)
    return history


def fit(net: ChatGLM3, batches: Iterable[Batch], config: TrainConfig, *, topology: Topology = ALONE,
        on_step: Callable[[dict, Trainer], None] | None = None) -> list[dict]:
    """Train `net` in place; one record a step.

    batches: (input_ids, labels) int32 arrays (B, T) of this rank, labels shifted, and segment_ids where several
        records stand in one row (see `ChatGLM3.hidden`); gradient_accumulation_steps of them make a step.
        config.total_steps: where to stop, by default when they end (then they must have a length).
    on_step: called with each record and the trainer.
    Returns dicts with step, loss, learning_rate, grad_norm, overflow, loss_scale, step_time_ms and more.
    Raises DataError if the batches end before total_steps, JobError if the loss is no finite number.
    """
    total_steps = config.total_steps
    if total_steps is None:
        if not hasattr(batches, "__len__"):
            raise DataError("fit: batches have no length and total_steps is not set; give TrainConfig a total_steps")
        total_steps = len(batches) // config.gradient_accumulation_steps
    return run_steps(Trainer(net, config, total_steps, topology), batches, on_step)
