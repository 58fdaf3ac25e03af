"""Greedy decoding beside Transformers' GlmForCausalLM with its KV cache: the same sizes, weights, prompt and threads.

float32, batch 1. Each side is a process of its own that warms up and then takes turns with the other, so that a busy
machine slows both; the tokens of both must be equal. Needs the extra `peers` (`make peers` installs it).

    python benchmarks/generate.py --rounds 8
"""

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
from sides import SIDES, SIZES, Turns, answer, kit_model, peer_model, ratio, speed

PROMPT, NEW = 32, 128  # tokens


def kit(threads: int, ids: np.ndarray) -> Callable[[], list[int]]:
    """A function that continues the prompt with glm3kit and returns the new ids."""
    net = kit_model(threads)
    return lambda: net.generate(ids, max_new_tokens=NEW, eos_token_id=[])[0][PROMPT:].tolist()


def peer(threads: int, ids: np.ndarray) -> Callable[[], list[int]]:
    """The same with Transformers."""
    import torch

    net = peer_model(threads)
    net.generation_config.eos_token_id = None  # never stop
    input_ids = torch.from_numpy(ids.astype(np.int64))[None]

    @torch.no_grad()
    def continued() -> list[int]:
        whole = net.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=NEW, do_sample=False)
        return whole[0, PROMPT:].tolist()

    return continued


def serve(side: str, threads: int) -> None:
    """Continue the prompt for each line of stdin; answer with the time and the ids."""
    ids = np.random.default_rng(0).integers(0, SIZES["padded_vocab_size"], PROMPT, dtype=np.int32)
    continued = {"kit": kit, "peer": peer}[side](threads, ids)
    for _ in sys.stdin:
        started = time.perf_counter()
        new = continued()
        answer(seconds=time.perf_counter() - started, ids=new)


def main() -> None:
    """Print tokens a second of both sides, and their ratio over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args.side, args.threads)

    turns = Turns(__file__, args.threads)
    warm = {side: turns.turn(side)["ids"] for side in SIDES}
    assert warm["kit"] == warm["peer"], "the two models made different tokens"
    results = turns.rounds(args.rounds)
    for side, name in zip(SIDES, ("glm3kit", "Transformers"), strict=True):
        print(f"{name}: {speed([result['seconds'] for result in results[side]], NEW)}")
    print(ratio(results))
    turns.end()


if __name__ == "__main__":
    main()
