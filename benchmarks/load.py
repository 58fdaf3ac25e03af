"""Loading a model of ChatGLM3-6B's shapes in float16 on a CPU: time of each part, memory, and three tokens.

Makes the weights (12.5 GB) in a temporary folder, then in a process of its own builds the model with them and runs it
once a token, operator by operator: a graph would hold every float16 weight as float32 too, which needs 40 GB.
Memory: `anonymous` is what is not page cache, `resident` all of it with mapped files.

    python benchmarks/load.py                              # 6B: needs 13 GB of disk and 16 GB of memory, some minutes
    python benchmarks/load.py --layers 2 --hidden 1024     # 0.3 GB
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from disk import Usage, model_config, random_tensors, watch

from glm3kit.config.groups import ModelConfig
from glm3kit.weights.write import write_weights


def load(path: Path, cfg: ModelConfig) -> dict[str, float | list[int]]:
    """Build and load, run; seconds of each, and the tokens."""
    import mindspore as ms

    from glm3kit import AutoModel

    times = [time.perf_counter()]
    net = AutoModel.from_config(cfg.model_copy(update={"checkpoint_name_or_path": str(path)}))
    times.append(time.perf_counter())
    ids = [1, 2, 3, 4, 5]
    for _ in range(3):
        logits = net(ms.Tensor([ids], ms.int32))
        ids.append(int(logits[0, -1].argmax()))
    times.append(time.perf_counter())
    return {"load_s": times[1] - times[0], "three_tokens_s": times[2] - times[1], "tokens": ids[-3:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 256")
    parser.add_argument("--folder", type=Path, help="where to work; default: the folder for temporary files")
    parser.add_argument("--load", type=Path, help="load this file in this process; what the benchmark starts")
    args = parser.parse_args()
    cfg = model_config(args.layers, args.hidden)
    if args.load:
        print(json.dumps(load(args.load, cfg)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        tensors = random_tensors(cfg)
        path = write_weights(Path(temporary, "model.safetensors"), tensors, progress=False)
        process = subprocess.Popen([sys.executable, __file__, "--load", path, "--layers", str(args.layers), "--hidden",
                                    str(args.hidden)], stdout=subprocess.PIPE, text=True)
        usage: Usage = watch(process)
        found = json.loads(process.stdout.read().splitlines()[-1])
    print(f"{tensors.nbytes / 1e9:.1f} GB: built and loaded in {found['load_s']:.0f} s "
          f"({tensors.nbytes / 1e9 / found['load_s']:.2f} GB/s), tokens {found['tokens']} in "
          f"{found['three_tokens_s']:.0f} s; memory: {usage.anonymous / 1e9:.1f} GB anonymous, "
          f"{usage.resident / 1e9:.1f} GB resident")


if __name__ == "__main__":
    main()
