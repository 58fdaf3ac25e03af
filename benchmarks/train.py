"""A training step beside PyTorch's: Transformers' GlmForCausalLM with the same weights, rows, optimizer and threads.

Each side is a process of its own that starts, warms up, and then takes turns with the other, so that a busy machine
slows both. Prints tokens per second, their ratio and the peak memory; the losses show that both compute the same.

    python benchmarks/train.py --rounds 8 --steps 3
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
from sides import SIDES, SIZES, Turns, answer, kit_model, peer_model, ratio, speed

ROWS, TOKENS = 8, 192
LEARNING_RATE = 1e-4
OPTIMIZER = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WARM_UP = 2  # steps


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and shifted labels of a step, (ROWS, TOKENS) int32 each."""
    ids = np.random.default_rng(step).integers(0, SIZES["padded_vocab_size"], (ROWS, TOKENS + 1), dtype=np.int32)
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def kit(threads: int) -> Callable[[int], float]:
    """A function that runs one step with glm3kit and returns its loss."""
    net = kit_model(threads)

    from glm3kit.config.groups import TrainConfig
    from glm3kit.train.trainer import Trainer

    config = TrainConfig(learning_rate=LEARNING_RATE, end_learning_rate=LEARNING_RATE, max_grad_norm=1.0, **OPTIMIZER)
    trainer = Trainer(net, config, total_steps=1_000_000)
    return lambda step: trainer.advance([batch(step)])["loss"]


def peer(threads: int) -> Callable[[int], float]:
    """The same with PyTorch, eager."""
    import torch

    net = peer_model(threads)
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
        answer(seconds=seconds, loss=loss, peak=peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="steps a side and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args.side, args.threads)

    turns = Turns(__file__, args.threads)
    for side in SIDES:
        turns.turn(side, str(WARM_UP))
    results = turns.rounds(args.rounds, str(args.steps))
    for side, name in zip(SIDES, ("glm3kit", "PyTorch"), strict=True):
        last = results[side][-1]
        seconds = [result["seconds"] for result in results[side]]
        print(f"{name}: {speed(seconds, ROWS * TOKENS * args.steps)}, loss {last['loss']:.5f}, "
              f"peak memory {last['peak']:.2f} GiB")
    print(ratio(results))
    turns.end()


if __name__ == "__main__":
    main()
