"""One rank of runs on the reference model: trains on its rows of the reference batches and saves what came out.

Started by the tests: python fit_golden.py GOLDEN OUTPUT [sharded] [unsharded] [lora]; the layout is that of
OUTPUT/config.yaml, what comes out of each run goes to OUTPUT/sharded and so on.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from glm3kit.config.groups import LoraConfig, ModelConfig, TrainConfig, load_config
from glm3kit.jobs.launch import rank_process
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.model.load import load_weights
from glm3kit.parallel import Topology, start_processes
from glm3kit.train.lora import add_adapters
from glm3kit.train.saving import save_checkpoint
from glm3kit.train.trainer import Trainer, run_steps


def next_token_labels(input_ids: np.ndarray) -> np.ndarray:
    """Labels of plain language modelling: the token after each, none after the last."""
    labels = np.full_like(input_ids, -100)
    labels[..., :-1] = input_ids[..., 1:]
    return labels


def reference_batches(golden: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    input_ids = np.load(golden / "reference.npz")["train.input_ids"]  # (20, 4, 48)
    return list(zip(input_ids, next_token_labels(input_ids), strict=True))


def lora_start(golden: Path, net: ChatGLM3) -> tuple[list[tuple[np.ndarray, np.ndarray]], TrainConfig]:
    """The batches and settings of lora.npz; the model gets its adapters."""
    stored = np.load(golden / "lora.npz")
    lora = LoraConfig(rank=int(stored["rank"]), alpha=float(stored["alpha"]))
    add_adapters(net, lora)
    for layer in range(net.cfg.num_layers):
        name = f"transformer.encoder.layers.{layer}.self_attention.query_key_value.lora_a"
        net.parameters_dict()[name].asnumpy()[:] = stored[f"lora_a.{layer}"]  # whole on every rank
    rate = float(stored["lr"])
    config = TrainConfig(learning_rate=rate, end_learning_rate=rate, weight_decay=0.0, max_grad_norm=None, lora=lora)
    return [(ids, next_token_labels(ids)) for ids in stored["input_ids"]], config


def train(golden: Path, folder: Path, cfg: ModelConfig, topology: Topology, what: str) -> None:
    """One of the runs, from the reference's weights to a checkpoint."""
    net = ChatGLM3(cfg, topology)
    load_weights(net, golden / "hf")
    if what == "lora":
        batches, config = lora_start(golden, net)
    else:
        batches, config = reference_batches(golden), TrainConfig(learning_rate=1e-3, end_learning_rate=1e-5)
    rows = len(batches[0][0]) // topology.data_parallel
    ours = slice(topology.data_rank * rows, (topology.data_rank + 1) * rows)
    trainer = Trainer(net, config, len(batches), topology)
    records = run_steps(trainer, [(ids[ours], labels[ours]) for ids, labels in batches])
    save_checkpoint(folder, net, trainer, topology, keep=1)
    if topology.rank == 0:
        (folder / "records.json").write_text(json.dumps(records))


def main(golden: str, job_dir: str, *runs: str) -> None:
    config = load_config(Path(job_dir, "config.yaml"))
    unsharded = start_processes(config.parallel)
    for what in runs:
        topology = unsharded if what == "unsharded" else replace(unsharded, shard_optimizer=True)
        train(Path(golden), Path(job_dir, what), config.model, topology, what)


if __name__ == "__main__":
    with rank_process(sys.argv[2]):
        main(*sys.argv[1:])
