"""One rank of four that are started once for the tests of layouts: groups of the four train, go on, generate.

Started by the fixture `four_ranks`: python four_ranks.py JOB_DIR; what comes out of a task is in JOB_DIR/TASK. MCCL
gathers over all started ranks only, so a pair of them sums instead; test_run.py has a pair that is all.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
from mindspore.communication import create_group
from support import GOLDEN, golden_net, next_token_labels, reference_batches, small_config

import glm3kit.train.run
from glm3kit.config.groups import LoraConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from glm3kit.errors import ConfigError
from glm3kit.jobs.launch import rank_process
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.model.load import fill_parameters
from glm3kit.parallel import ALONE, Topology, barrier, start_processes
from glm3kit.train.lora import add_adapters
from glm3kit.train.run import Trainer, run_rank, run_steps
from glm3kit.train.saving import save_checkpoint
from glm3kit.weights.read import random_weights

RANKS = 4
Task = Callable[[Topology, Path], None]

# ---- the reference's steps from the golden weights ----

def lora_start(net: ChatGLM3) -> tuple[list[tuple[np.ndarray, np.ndarray]], TrainConfig]:
    """The batches and settings of lora.npz; the model gets its adapters."""
    stored = np.load(GOLDEN / "lora.npz")
    lora = LoraConfig(rank=int(stored["rank"]), alpha=float(stored["alpha"]))
    add_adapters(net, lora)
    for layer in range(net.cfg.num_layers):
        name = f"transformer.encoder.layers.{layer}.self_attention.query_key_value.lora_a"
        net.parameters_dict()[name].asnumpy()[:] = stored[f"lora_a.{layer}"]  # whole on every rank
    rate = float(stored["lr"])
    config = TrainConfig(learning_rate=rate, end_learning_rate=rate, weight_decay=0.0, max_grad_norm=None, lora=lora)
    return [(ids, next_token_labels(ids)) for ids in stored["input_ids"]], config


def train_golden(topology: Topology, folder: Path, lora: bool = False) -> None:
    """Take the reference's steps on this rank's rows; records and a checkpoint go to `folder`."""
    net = golden_net(topology)
    if lora:
        batches, config = lora_start(net)
    else:
        batches, config = reference_batches(), TrainConfig(learning_rate=1e-3, end_learning_rate=1e-5)
    rows = len(batches[0][0]) // topology.data_parallel
    ours = slice(topology.data_rank * rows, (topology.data_rank + 1) * rows)
    trainer = Trainer(net, config, len(batches), topology)
    records = run_steps(trainer, [(ids[ours], labels[ours]) for ids, labels in batches])
    save_checkpoint(folder, net, trainer, topology, keep=1)
    if topology.rank == 0:
        (folder / "records.json").write_text(json.dumps(records))


def train_unsharded(topology: Topology, folder: Path) -> None:
    """The same, with the optimizer's state whole on every rank."""
    train_golden(replace(topology, shard_optimizer=False), folder)


def train_lora(topology: Topology, folder: Path) -> None:
    """The reference's steps of adapters."""
    train_golden(topology, folder, lora=True)


# ---- runs on the embedded data ----

STEPS = 6
ROWS = 4  # a step, over all ranks
ADAPTERS = ("train.lora={rank: 4, dropout: 0.2, targets: [query_key_value, dense, dense_4h_to_h]}",)


def run_config(folder: Path, data_parallel: int = 1, tensor_parallel: int = 1, *changes: str) -> RunConfig:
    """A small run in `folder`, with a checkpoint every second step; the same rows a step on every layout."""
    return small_config(f"output_dir={folder.parent}", f"name={folder.name}", f"parallel.data_parallel={data_parallel}",
                        f"parallel.tensor_parallel={tensor_parallel}", f"train.batch_size={ROWS // data_parallel}",
                        f"train.total_steps={STEPS}", "train.save_steps=2", "train.keep_checkpoints=3", *changes)


def train(topology: Topology, folder: Path, *changes: str, resume: bool = False) -> None:
    """One rank of a run in a group of the started ranks."""
    config = run_config(folder, topology.data_parallel, topology.tensor_parallel, *changes)
    with mock.patch.object(glm3kit.train.run, "start_processes", return_value=topology):
        run_rank(config, resume)


def train_adapters(topology: Topology, folder: Path) -> None:
    """A run of adapters with dropout."""
    train(topology, folder, *ADAPTERS)


def go_on_from(task: str, step: int, *changes: str) -> Task:
    """A copy of another task's run goes on from a step, as if that run had been killed before its next checkpoint."""
    def go_on(topology: Topology, folder: Path) -> None:
        if topology.rank == 0:
            shutil.copytree(folder.with_name(task), folder)
            for later in range(step + 2, STEPS + 1, 2):
                shutil.rmtree(folder / "checkpoint" / f"step_{later}")
        barrier(topology)
        train(topology, folder, *changes, resume=True)
    return go_on


# ---- answers ----

CFG = ModelConfig(num_layers=1, padded_vocab_size=512, hidden_size=64, ffn_hidden_size=96, kv_channels=16,
                  num_attention_heads=4, multi_query_group_num=2, seq_length=96, param_dtype="float32",
                  compute_dtype="float32")
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [9, 3]]


def answers(topology: Topology = ALONE) -> dict[str, list]:
    """What a model of random weights says: greedy, drawn, searched, in two turns."""
    net = ChatGLM3(CFG, topology)
    fill_parameters(net, random_weights(CFG, seed=0))
    talk = net.conversation(max_new_tokens=4, eos_token_id=[])
    said = list(talk(PROMPTS[0]))
    found = {
        "greedy": [row.tolist() for row in net.generate(PROMPTS, max_new_tokens=16, eos_token_id=[])],
        "drawn": net.generate(PROMPTS[0], do_sample=True, temperature=1.5, seed=3, max_new_tokens=8)[0].tolist(),
        "searched": net.generate(PROMPTS[0], num_beams=3, max_new_tokens=8)[0].tolist(),
        "turns": [said, list(talk([*PROMPTS[0], *said, 7]))],
    }
    if topology.tensor_parallel > 1:
        try:
            net.generate([1], do_sample=True)
        except ConfigError as err:
            found["without a seed"] = str(err)
    return found


def save_answers(topology: Topology, folder: Path) -> None:
    """Every rank's answers, to compare."""
    folder.mkdir(exist_ok=True)
    (folder / f"answers_{topology.rank}.json").write_text(json.dumps(answers(topology)))


# ---- the ranks and what they do ----

# Task, first of its ranks, data parallel, tensor parallel, what to do. Both halves of the ranks work at the same time;
# a task of all four begins when every one before is done.
TASKS: tuple[tuple[str, int, int, int, Task], ...] = (
    ("golden_2x1", 0, 2, 1, train_golden),
    ("golden_1x2", 2, 1, 2, train_golden),
    ("golden_2x1_unsharded", 0, 2, 1, train_unsharded),
    ("answers", 2, 1, 2, save_answers),
    ("adapters_2x1", 0, 2, 1, train_adapters),
    ("golden_1x4", 0, 1, 4, train_golden),  # two ranks a key/value group
    ("golden_2x2", 0, 2, 2, train_golden),
    ("golden_2x2_unsharded", 0, 2, 2, train_unsharded),
    ("golden_2x2_lora", 0, 2, 2, train_lora),
    ("run_2x2", 0, 2, 2, train),
    ("run_2x2_then_2x1", 0, 2, 1, go_on_from("run_2x2", 2)),
    ("adapters_2x1_then_1x2", 2, 1, 2, go_on_from("adapters_2x1", 2, *ADAPTERS)),
    ("meet", 0, 4, 1, lambda topology, _: barrier(topology)),
    ("again_on_2x1", 0, 2, 1, go_on_from("run_2x2_then_2x1", 4)),
    ("then_1x2", 2, 1, 2, go_on_from("run_2x2_then_2x1", 4)),
)


class Groups:
    """Groups of the started ranks, each made once, by its own ranks."""

    def __init__(self, world: Topology):
        self.rank, self.names = world.rank, {tuple(range(RANKS)): world.group}

    def of(self, *ranks: int) -> str:
        """The group of these ranks, which this one is of; none for one alone."""
        if len(ranks) == 1:
            return ""
        if ranks not in self.names:
            self.names[ranks] = "-".join(map(str, ranks))
            create_group(self.names[ranks], list(ranks))
        return self.names[ranks]

    def topology(self, first: int, data_parallel: int, tensor_parallel: int) -> Topology:
        """This rank's place among the ranks from `first` on, as a run of their own."""
        last, rank = first + data_parallel * tensor_parallel, self.rank - first
        row, column = self.rank - rank % tensor_parallel, first + rank % tensor_parallel
        return Topology(rank, data_parallel, tensor_parallel, self.of(*range(first, last)),
                        data_group=self.of(*range(column, last, tensor_parallel)),
                        tensor_group=self.of(*range(row, row + tensor_parallel)))


def main(job_dir: Path) -> None:
    world = start_processes(ParallelConfig(data_parallel=RANKS, device_target="CPU"))
    groups = Groups(world)
    for name, first, data_parallel, tensor_parallel, task in TASKS:
        if first <= world.rank < first + data_parallel * tensor_parallel:
            print(f"task {name}", flush=True)
            task(groups.topology(first, data_parallel, tensor_parallel), job_dir / name)


if __name__ == "__main__":
    with rank_process(sys.argv[1]):
        main(Path(sys.argv[1]))
