"""One rank of a run on the reference model: trains on its rows of the 20 reference batches and saves what came out.

Started by the tests: python fit_golden.py GOLDEN OUTPUT DATA_PARALLEL TENSOR_PARALLEL
"""

import json
import sys
from pathlib import Path

import numpy as np

from glm3kit.checkpoint import save_checkpoint
from glm3kit.config import ModelConfig, ParallelConfig, TrainConfig
from glm3kit.launch import rank_process
from glm3kit.model import ChatGLM3
from glm3kit.parallel import start_processes
from glm3kit.train import Trainer, run_steps
from glm3kit.weights import load_weights


def next_token_labels(input_ids: np.ndarray) -> np.ndarray:
    """Labels of plain language modelling: the token after each, none after the last."""
    labels = np.full_like(input_ids, -100)
    labels[..., :-1] = input_ids[..., 1:]
    return labels


def reference_batches(golden: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    input_ids = np.load(golden / "tiny/reference.npz")["train.input_ids"]  # (20, 4, 48)
    return list(zip(input_ids, next_token_labels(input_ids), strict=True))


def main(golden: Path, output: Path, data_parallel: int, tensor_parallel: int) -> None:
    topology = start_processes(ParallelConfig(data_parallel=data_parallel, tensor_parallel=tensor_parallel,
                                              device_target="CPU"))
    cfg = ModelConfig.from_hf(golden / "tiny/hf/config.json", param_dtype="float32", compute_dtype="float32")
    net = ChatGLM3(cfg, topology)
    load_weights(net, golden / "tiny/hf")
    batches = reference_batches(golden)
    rows = len(batches[0][0]) // data_parallel
    ours = slice(topology.data_rank * rows, (topology.data_rank + 1) * rows)
    trainer = Trainer(net, TrainConfig(learning_rate=1e-3, end_learning_rate=1e-5), len(batches), topology)
    records = run_steps(trainer, [(ids[ours], labels[ours]) for ids, labels in batches])
    if topology.rank == 0:
        (output / "records.json").write_text(json.dumps(records))
    save_checkpoint(output, net, trainer, topology, keep=1)


if __name__ == "__main__":
    golden_folder, job_dir, *layout = sys.argv[1:]
    with rank_process(job_dir):
        main(Path(golden_folder), Path(job_dir), *map(int, layout))
