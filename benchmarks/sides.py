"""What the benchmarks beside Transformers share: the two models, equal in sizes and weights, and their taking turns.

Each side is a process of its own that warms up and then waits for its turn, so that a busy machine slows both.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm3kit.config.groups import ModelConfig
from glm3kit.weights.convert import convert_weights
from glm3kit.weights.random import write_random_hub_weights

if TYPE_CHECKING:
    from transformers import GlmForCausalLM

    from glm3kit.model.chatglm3 import ChatGLM3

SIZES = {"num_layers": 4, "padded_vocab_size": 8192, "hidden_size": 512, "ffn_hidden_size": 1408, "kv_channels": 64,
         "num_attention_heads": 8, "multi_query_group_num": 2, "seq_length": 192, "param_dtype": "float32",
         "compute_dtype": "float32"}
SIDES = ("kit", "peer")


def kit_model(threads: int) -> "ChatGLM3":
    """Our model with random weights."""
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms

    from glm3kit.model.chatglm3 import ChatGLM3

    ms.runtime.set_cpu_affinity(False)
    ms.device_context.cpu.op_tuning.threads_num(threads)
    return ChatGLM3(ModelConfig(**SIZES))


def peer_model(threads: int) -> "GlmForCausalLM":
    """Transformers' model with the same weights, as `convert --to hf-glm` writes them."""
    import torch
    from transformers import GlmForCausalLM

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        hub = write_random_hub_weights(ModelConfig(**SIZES), Path(folder) / "hub", seed=0)
        glm = convert_weights(hub, Path(folder) / "glm", to="hf-glm", progress=False)
        return GlmForCausalLM.from_pretrained(glm, dtype=torch.float32)


def answer(**result: Any) -> None:
    """Tell the other process what a turn gave."""
    print(json.dumps(result), file=sys.__stdout__, flush=True)


class Turns:
    """Both sides of a benchmark: `script --threads N --side SIDE`, which reads a line for a turn and answers one."""

    def __init__(self, script: str, threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, script, "--threads", str(threads), "--side"]
        self.processes = {side: subprocess.Popen([*command, side], text=True, env=environment, stdin=subprocess.PIPE,
                                                 stdout=subprocess.PIPE) for side in SIDES}

    def turn(self, side: str, line: str = "") -> dict[str, Any]:
        """Have a side do its work once."""
        process = self.processes[side]
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def rounds(self, count: int, line: str = "") -> dict[str, list[dict[str, Any]]]:
        """`count` turns of each side, one after the other."""
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(count):
            for side in SIDES:
                results[side].append(self.turn(side, line))
        return results

    def end(self) -> None:
        """End both processes."""
        for process in self.processes.values():
            process.stdin.close()
            process.wait()


def speed(seconds: list[float], tokens: int) -> str:
    """Tokens a second of one side, over its rounds of `tokens` each."""
    speeds = [tokens / s for s in seconds]
    return f"{statistics.median(speeds):.0f} tokens/s (median of {len(speeds)} rounds, best {max(speeds):.0f})"


def ratio(results: dict[str, list[dict[str, Any]]]) -> str:
    """Our speed over the peer's, round by round."""
    ratios = [theirs["seconds"] / ours["seconds"]
              for ours, theirs in zip(results["kit"], results["peer"], strict=True)]
    return f"ratio: {statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})"
