"""Greedy decoding beside Transformers' GlmForCausalLM with its KV cache: the same sizes, weights, prompt and threads.

float32, batch 1. Each side is a process of its own that warms up and then takes turns with the other, so that a busy
machine slows both; the tokens of both must be equal. Needs the extra `peers` (`make peers` installs it).

    python benchmarks/generate.py --rounds 8
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np
from train import SIZES, peer_weights

PROMPT, NEW = 32, 128  # tokens


def kit(threads: int, ids: np.ndarray):
    """A function that continues the prompt with glm3kit and returns the new ids."""
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms

    from glm3kit.config import ModelConfig
    from glm3kit.model import ChatGLM3
    from glm3kit.weights import fill_parameters, random_weights

    ms.device_context.cpu.op_tuning.threads_num(threads)
    net = ChatGLM3(ModelConfig(**SIZES))
    fill_parameters(net, random_weights(net.cfg, seed=0))
    return lambda: net.generate(ids, max_new_tokens=NEW, eos_token_id=[])[0][PROMPT:].tolist()


def peer(threads: int, ids: np.ndarray):
    """The same with Transformers."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    from glm3kit.config import ModelConfig
    from glm3kit.weights import random_weights

    torch.set_num_threads(threads)
    cfg = ModelConfig(**SIZES)
    net = GlmForCausalLM(GlmConfig(
        vocab_size=cfg.padded_vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.ffn_hidden_size,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_attention_heads, head_dim=cfg.kv_channels,
        num_key_value_heads=cfg.multi_query_group_num, partial_rotary_factor=0.5, attention_bias=True,
        rms_norm_eps=cfg.layernorm_epsilon, max_position_embeddings=cfg.seq_length, tie_word_embeddings=False,
        pad_token_id=0, eos_token_id=None, bos_token_id=None)).eval()
    net.load_state_dict(peer_weights(random_weights(cfg, seed=0), cfg))
    input_ids = torch.from_numpy(ids.astype(np.int64))[None]

    @torch.no_grad()
    def answer() -> list[int]:
        whole = net.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=NEW, do_sample=False)
        return whole[0, PROMPT:].tolist()

    return answer


def serve(side: str, threads: int) -> None:
    """Continue the prompt for each line of stdin; answer with the time and the ids."""
    ids = np.random.default_rng(0).integers(0, SIZES["padded_vocab_size"], PROMPT, dtype=np.int32)
    answer = {"kit": kit, "peer": peer}[side](threads, ids)
    for _ in sys.stdin:
        started = time.perf_counter()
        new = answer()
        print(json.dumps({"seconds": time.perf_counter() - started, "ids": new}), file=sys.__stdout__, flush=True)


def main() -> None:
    """Print tokens a second of both sides, and their ratio over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=["kit", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args.side, args.threads)

    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, __file__, "--threads", str(args.threads), "--side"]
    sides = {side: subprocess.Popen([*command, side], text=True, env=environment, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE) for side in ("kit", "peer")}

    def turn(side: str) -> dict:
        sides[side].stdin.write("\n")
        sides[side].stdin.flush()
        return json.loads(sides[side].stdout.readline())

    assert turn("kit")["ids"] == turn("peer")["ids"], "the two models made different tokens"  # and both are warm
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            speeds[side].append(NEW / turn(side)["seconds"])
    for side, name in (("kit", "glm3kit"), ("peer", "Transformers")):
        print(f"{name}: {statistics.median(speeds[side]):.0f} tokens/s (median of {args.rounds} rounds, best "
              f"{max(speeds[side]):.0f})")
    ratios = [ours / theirs for ours, theirs in zip(speeds["kit"], speeds["peer"], strict=True)]
    print(f"ratio: {statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})")
    for process in sides.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
