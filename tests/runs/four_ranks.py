"""One rank of four that are started once for the tests of layouts: groups of the four train, go on, generate.

Started by the fixture `four_ranks`: python four_ranks.py JOB_DIR; what comes out is in folders of JOB_DIR. MCCL gathers
over all started ranks only, so that a pair of the four sums instead; test_run.py has a pair that gathers.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
from mindspore.communication import create_group
from support import GOLDEN, golden_net, next_token_labels, reference_batches, small_config, until

import glm3kit.train.run
from glm3kit.config.groups import LoraConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from glm3kit.errors import ConfigError
from glm3kit.jobs.process import rank_process
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import ALONE, Topology, barrier, start_processes
from glm3kit.train.lora import add_adapters
from glm3kit.train.run import Trainer, run_rank, run_steps
from glm3kit.train.saving import load_checkpoint, save_checkpoint

RANKS = 4

# ---- the reference's steps from the golden weights ----

SAVED = (5, 10, 20)  # steps with a checkpoint


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


class ReferenceRun:
    """One rank of the reference's run; compiled once, it goes on from any checkpoint."""

    def __init__(self, topology: Topology, lora: bool = False):
        self.topology, self.net = topology, golden_net(topology)
        if lora:
            batches, config = lora_start(self.net)
        else:
            batches, config = reference_batches(), TrainConfig(learning_rate=1e-3, end_learning_rate=1e-5)
        rows = len(batches[0][0]) // topology.data_parallel
        ours = slice(topology.data_rank * rows, (topology.data_rank + 1) * rows)
        self.batches = [(ids[ours], labels[ours]) for ids, labels in batches]
        self.trainer = Trainer(self.net, config, len(batches), topology)

    def train(self, folder: Path, checkpoint: Path | None = None) -> None:
        """Take all steps, or those after a checkpoint; records and checkpoints go to `folder`."""
        if checkpoint:
            load_checkpoint(checkpoint, self.net, self.trainer, self.topology)

        def save(record: dict, trainer: Trainer) -> None:
            if record["step"] in SAVED:
                save_checkpoint(folder, self.net, trainer, self.topology, keep=len(SAVED))

        records = run_steps(self.trainer, self.batches[self.trainer.step:], save)
        if self.topology.rank == 0:
            (folder / "records.json").write_text(json.dumps(records))


# ---- runs on the embedded data ----

STEPS = 6
ROWS = 4  # a step, over all ranks


def run_config(folder: Path, data_parallel: int = 1, tensor_parallel: int = 1, *changes: str) -> RunConfig:
    """A small run of adapters with dropout in `folder`, with a checkpoint every second step and as many rows a step."""
    return small_config(f"output_dir={folder.parent}", f"name={folder.name}", f"parallel.data_parallel={data_parallel}",
                        f"parallel.tensor_parallel={tensor_parallel}", f"train.batch_size={ROWS // data_parallel}",
                        f"train.total_steps={STEPS}", "train.save_steps=2", "train.keep_checkpoints=3",
                        "train.lora={rank: 4, dropout: 0.2, targets: [query_key_value, dense, dense_4h_to_h]}",
                        *changes)


def run(topology: Topology, folder: Path, resume: bool = False) -> None:
    """One rank of such a run, in a group of the started ranks."""
    config = run_config(folder, topology.data_parallel, topology.tensor_parallel)
    with mock.patch.object(glm3kit.train.run, "start_processes", return_value=topology):
        run_rank(config, resume)


def go_on(topology: Topology, folder: Path, interrupted: Path, step: int) -> None:
    """A copy of a run goes on from a step, as if the run had been killed before its next checkpoint."""
    if topology.rank == 0:
        shutil.copytree(interrupted, folder)
        for later in range(step + 2, STEPS + 1, 2):
            shutil.rmtree(folder / "checkpoint" / f"step_{later}")
    barrier(topology)
    run(topology, folder, resume=True)


# ---- answers ----

CFG = ModelConfig(num_layers=1, padded_vocab_size=512, hidden_size=64, ffn_hidden_size=96, kv_channels=16,
                  num_attention_heads=4, multi_query_group_num=2, seq_length=96, param_dtype="float32",
                  compute_dtype="float32")
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [9, 3]]


def answers(topology: Topology = ALONE) -> dict[str, list]:
    """What a model of random weights says: greedy, drawn, searched, in two turns."""
    net = ChatGLM3(CFG, topology)
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


# ---- the ranks ----

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

    def topology(self, data_parallel: int, tensor_parallel: int, first: int = 0) -> Topology:
        """This rank's place among the ranks from `first` on, as a run of their own."""
        last, rank = first + data_parallel * tensor_parallel, self.rank - first
        row, column = self.rank - rank % tensor_parallel, first + rank % tensor_parallel
        return Topology(rank, data_parallel, tensor_parallel, self.of(*range(first, last)),
                        data_group=self.of(*range(column, last, tensor_parallel)),
                        tensor_group=self.of(*range(row, row + tensor_parallel)))


def main(job_dir: Path) -> None:
    world = start_processes(ParallelConfig(data_parallel=RANKS, device_target="CPU"))
    groups = Groups(world)
    all_four = groups.topology(2, 2)
    ReferenceRun(all_four).train(job_dir / "golden_2x2")
    ReferenceRun(replace(all_four, shard_optimizer=False)).train(job_dir / "golden_2x2_unsharded")
    ReferenceRun(all_four, lora=True).train(job_dir / "golden_2x2_lora")
    ReferenceRun(groups.topology(1, 4)).train(job_dir / "golden_1x4")  # two ranks a key/value group

    if world.rank < 2:
        pair = groups.topology(2, 1)
        golden = ReferenceRun(pair)
        golden.train(job_dir / "golden_2x1")
        golden.train(job_dir / "golden_2x2_then_2x1", job_dir / "golden_2x2/checkpoint/step_5")
        golden.train(job_dir / "golden_2x1_again", job_dir / "golden_2x2_then_2x1/checkpoint/step_10")
        run(pair, job_dir / "adapters_2x1")
        (job_dir / "first_pair").touch()
        ReferenceRun(replace(pair, shard_optimizer=False)).train(job_dir / "golden_2x1_unsharded")
    else:
        pair = groups.topology(1, 2, first=2)
        golden = ReferenceRun(pair)
        golden.train(job_dir / "golden_1x2")
        (job_dir / f"answers_{pair.rank}.json").write_text(json.dumps(answers(pair)))
        # What follows begins with what the other pair has left. A collective would give up on a busy machine.
        until((job_dir / "first_pair").exists, timeout_s=900)
        golden.train(job_dir / "golden_2x1_then_1x2", job_dir / "golden_2x2_then_2x1/checkpoint/step_10")
        go_on(pair, job_dir / "adapters_2x1_then_1x2", job_dir / "adapters_2x1", step=2)


if __name__ == "__main__":
    with rank_process(sys.argv[1]):
        main(Path(sys.argv[1]))
