"""One rank of a run: its rows, its model, and after each step what goes into the folder of the run.

    run_rank(load_config("configs/tiny.yaml"))
"""

import math
import os

from glm3kit.checkpoint.folder import STRATEGY
from glm3kit.checkpoint.strategy import write_strategy
from glm3kit.config.groups import RunConfig
from glm3kit.data.batches import Batches
from glm3kit.data.encode import prepare_data
from glm3kit.jobs.metrics import MetricsWriter, flops_per_token, format_step_line
from glm3kit.jobs.process import JOB_VARIABLE, Heartbeat
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.model.held_out import HeldOutLoss
from glm3kit.model.load import AutoModel
from glm3kit.parallel import Topology, barrier, memory_in_use, start_processes
from glm3kit.train.saving import load_checkpoint, save_checkpoint, usable_checkpoint, weight_layouts
from glm3kit.train.trainer import Trainer, run_steps


class Rows:
    """The rows of a run as one of its ranks draws them, and the steps that they make."""

    def __init__(self, config: RunConfig, topology: Topology):
        if topology.rank == 0:
            prepare_data(config)  # the others then find the token file ready
        barrier(topology)
        self.files = prepare_data(config, progress=False)
        train, digest, packing = config.train, self.files["train"].digest, config.data.packing
        self.settings = dict(batch_size=train.batch_size, seq_length=config.model.seq_length, seed=train.seed,
                             bucket_lengths=config.data.bucket_lengths,
                             rank=topology.data_rank, ranks=topology.data_parallel)
        epoch = Batches(self.files["train"], **self.settings, packing=packing)
        self.packing, self.micro_steps, per_epoch = packing, train.gradient_accumulation_steps, epoch.steps_per_epoch
        self.total_steps = train.total_steps or train.epochs * per_epoch // self.micro_steps
        self.micro_steps_per_epoch, self.epochs = per_epoch, math.ceil(self.total_steps * self.micro_steps / per_epoch)
        # What the position in the data depends on besides the step.
        self.identity = {"digest": f"{digest}-packed" if packing else digest, "seed": train.seed,
                         "rows_per_step": epoch.global_batch * self.micro_steps,
                         "rows_per_epoch": epoch.global_batch * per_epoch}

    def after(self, step: int) -> Batches:
        """What is left to train on after a step."""
        return Batches(self.files["train"], **self.settings, packing=self.packing, epochs=self.epochs,
                       start_step=step * self.micro_steps)

    def held_out(self) -> Batches:
        """What the loss is measured on meanwhile."""
        return Batches(self.files["eval"], **self.settings, shuffle=False, drop_last=False)


class AfterStep:
    """What a rank does after each step: measure, print, evaluate, save, and mark that it lives."""

    def __init__(self, config: RunConfig, net: ChatGLM3, rows: Rows, heartbeat: Heartbeat):
        self.config, self.net, self.rows, self.heartbeat = config, net, rows, heartbeat
        self.metrics = MetricsWriter(config.job_dir / "metrics.jsonl") if net.topology.rank == 0 else None
        self.flops = flops_per_token(config.model, config.model.seq_length, bool(config.train.lora))
        if config.train.eval_steps:
            self.held_out, self.held_out_loss = rows.held_out(), HeldOutLoss(net, net.topology)

    def __call__(self, record: dict, trainer: Trainer) -> None:
        train, rows, step = self.config.train, self.rows, record["step"]

        def due(every: int | None) -> bool:
            return bool(every) and step % every == 0 or step == rows.total_steps

        record |= self.measured(record)
        if self.metrics:
            self.metrics.write(record)
        if due(train.log_steps):
            print(format_step_line(record, rows.epochs, rows.micro_steps_per_epoch // rows.micro_steps), flush=True)
        if train.eval_steps and due(train.eval_steps):
            loss = self.held_out_loss.mean(self.heartbeat.drawing(self.held_out))
            if self.metrics:
                self.metrics.write({"step": step, "eval_loss": loss})
            print(f"held-out loss after step {step}: {loss:.4f}", flush=True)
        if due(train.save_steps):
            save_checkpoint(self.config.job_dir, self.net, trainer, self.net.topology, train.keep_checkpoints,
                            rows.identity)
        self.heartbeat.mark()

    def measured(self, record: dict) -> dict:
        """What a record says beside what the trainer knows."""
        topology, rows, peak = self.net.topology, self.rows, self.config.parallel.peak_tflops
        tokens_per_second = record["tokens"] / record["step_time_ms"] * 1000 * topology.data_parallel
        on_device = tokens_per_second / topology.ranks
        measured = {"total_steps": rows.total_steps,
                    "epoch": 1 + (record["step"] * rows.micro_steps - 1) // rows.micro_steps_per_epoch,
                    "tokens_per_second": tokens_per_second, "tokens_per_second_per_device": on_device,
                    "memory_gb": memory_in_use() / 1e9}
        return measured | ({"model_flop_utilisation": on_device * self.flops / (peak * 1e12)} if peak else {})


def run_rank(config: RunConfig, resume: bool = False) -> list[dict]:
    """Train as one rank of the run that `config` describes, with metrics and checkpoints in its folder.

    Started once a device by `glm3kit launch`. resume: go on from the newest complete checkpoint.
    """
    topology, job_dir = start_processes(config.parallel), config.job_dir
    rows = Rows(config, topology)
    if not config.model.checkpoint_name_or_path:
        print(f"model.checkpoint_name_or_path is not set: starting from random weights, seed {config.train.seed}")
    net = AutoModel.from_config(config.model, topology, config.train.seed)
    trainer = Trainer(net, config.train, rows.total_steps, topology)
    if resume:
        load_checkpoint(usable_checkpoint(job_dir, topology), net, trainer, topology, rows.identity)
    if topology.rank == 0:
        write_strategy(job_dir / "strategy" / STRATEGY, weight_layouts(net, topology))
    heartbeat = Heartbeat(os.environ.get(JOB_VARIABLE, job_dir), topology.rank)
    batches = heartbeat.drawing(rows.after(trainer.step))
    return run_steps(trainer, batches, AfterStep(config, net, rows, heartbeat))
