"""A training step beside PyTorch's: Transformers' GlmForCausalLM with the same weights, rows, optimizer and threads.

Each side is a process of its own that starts, warms up, and then takes turns with the other, so that a busy machine
slows both. Prints tokens per second, their ratio and the peak memory; the losses show that both compute the same.

    python benchmarks/train.py --rounds 8 --steps 3
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

SIZES = {"num_layers": 4, "padded_vocab_size": 8192, "hidden_size": 512, "ffn_hidden_size": 1408, "kv_channels": 64,
         "num_attention_heads": 8, "multi_query_group_num": 2, "seq_length": 192, "param_dtype": "float32",
         "compute_dtype": "float32"}
ROWS, TOKENS = 8, 192
LEARNING_RATE = 1e-4
OPTIMIZER = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WARM_UP = 2  # steps


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and shifted labels of a step, (ROWS, TOKENS) int32 each."""
    ids = np.random.default_rng(step).integers(0, SIZES["padded_vocab_size"], (ROWS, TOKENS + 1), dtype=np.int32)
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def kit(threads: int):
    """A function that runs one step with glm3kit and returns its loss."""
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms

    from glm3kit.config import ModelConfig, TrainConfig
    from glm3kit.model import ChatGLM3
    from glm3kit.train import Trainer
    from glm3kit.weights import fill_parameters, random_weights

    ms.runtime.set_cpu_affinity(False)
    ms.device_context.cpu.op_tuning.threads_num(threads)
    cfg = ModelConfig(**SIZES)
    net = ChatGLM3(cfg)
    fill_parameters(net, random_weights(cfg, seed=0))
    config = TrainConfig(learning_rate=LEARNING_RATE, end_learning_rate=LEARNING_RATE, max_grad_norm=1.0, **OPTIMIZER)
    trainer = Trainer(net, config, total_steps=1_000_000)
    return lambda step: trainer.advance([batch(step)])["loss"]


def peer(threads: int):
    """The same with PyTorch, eager."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    from glm3kit.config import ModelConfig
    from glm3kit.weights import random_weights

    torch.set_num_threads(threads)
    cfg = ModelConfig(**SIZES)
    net = GlmForCausalLM(GlmConfig(
        vocab_size=cfg.padded_vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.ffn_hidden_size,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.multi_query_group_num, head_dim=cfg.kv_channels, partial_rotary_factor=0.5,
        max_position_embeddings=cfg.seq_length, rms_norm_eps=cfg.layernorm_epsilon, attention_bias=True,
        attention_dropout=0.0, tie_word_embeddings=False, pad_token_id=0))
    net.load_state_dict(peer_weights(random_weights(cfg, seed=0), cfg))
    net.train()
    spared = [p for n, p in net.named_parameters() if n.endswith("bias") or "norm" in n]
    decayed = [p for n, p in net.named_parameters() if not (n.endswith("bias") or "norm" in n)]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": spared, "weight_decay": 0.0}], lr=LEARNING_RATE,
                                  **OPTIMIZER)

    def advance(step: int) -> float:
        input_ids, labels = (torch.from_numpy(array.astype(np.int64)) for array in batch(step))
        logits = net(input_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return advance


def peer_weights(weights, cfg) -> dict:
    """The weights under GlmForCausalLM's names, query_key_value cut in three."""
    import torch

    queries, keys = (n * cfg.kv_channels for n in (cfg.num_attention_heads, cfg.multi_query_group_num))
    renamed = {}
    for name, array in weights.items():
        name = name.replace("transformer.encoder.", "model.").replace("mlp.dense_h_to_4h", "mlp.gate_up_proj")
        name = name.replace("mlp.dense_4h_to_h", "mlp.down_proj").replace("self_attention.", "self_attn.")
        name = name.replace("self_attn.dense", "self_attn.o_proj").replace("final_layernorm", "norm")
        name = name.replace("transformer.embedding.embedding_table", "model.embed_tokens.weight")
        name = name.replace("transformer.output_layer", "lm_head")
        if "query_key_value" in name:
            parts = np.split(array, (queries, queries + keys))
            renamed |= {name.replace("query_key_value", part): values
                        for part, values in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True)}
        else:
            renamed[name] = array
    return {name: torch.from_numpy(np.array(array)) for name, array in renamed.items()}


def serve(side: str, threads: int) -> None:
    """Run as many steps as each line of stdin says; answer with their time, last loss and the peak memory."""
    advance = {"kit": kit, "peer": peer}[side](threads)
    step = 0
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            loss = advance(step)
            step += 1
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # GiB
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak}), file=sys.__stdout__, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="steps a side and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=["kit", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args.side, args.threads)

    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, __file__, "--threads", str(args.threads), "--side"]
    sides = {side: subprocess.Popen([*command, side], text=True, env=environment, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE) for side in ("kit", "peer")}

    def turn(side: str, steps: int) -> dict:
        process = sides[side]
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    for side in sides:
        turn(side, WARM_UP)
    results = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            results[side].append(turn(side, args.steps))
    speeds = {side: [ROWS * TOKENS * args.steps / result["seconds"] for result in results[side]] for side in sides}
    for side, name in (("kit", "glm3kit"), ("peer", "PyTorch")):
        last = results[side][-1]
        print(f"{name}: {statistics.median(speeds[side]):.0f} tokens/s (median of {args.rounds} rounds, best "
              f"{max(speeds[side]):.0f}), loss {last['loss']:.5f}, peak memory {last['peak']:.2f} GiB")
    ratios = [ours / theirs for ours, theirs in zip(speeds["kit"], speeds["peer"], strict=True)]
    print(f"ratio: {statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})")
    for process in sides.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
