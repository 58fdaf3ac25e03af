"""Converting weights against copying the same bytes: time, as a ratio, and the memory that it takes.

Makes a checkpoint of ChatGLM3-6B's shapes (12.5 GB of random float16) in a temporary folder, in the published form, as
PyTorch's shards and as MindSpore's .ckpt, and converts each into another, after `cp` and `sync` of the same files. The
sources are put out of the page cache before every run. Memory: `anonymous` is what is not page cache, `resident` all of
it with mapped files.

    python benchmarks/convert.py                             # 6B: needs 40 GB of disk, takes a quarter of an hour
    python benchmarks/convert.py --layers 2 --hidden 1024    # 0.3 GB
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from disk import copy_seconds, forget, model_config, random_tensors, remove, watch

from glm3kit.weights.hub_files import cut_into_shards, index_text
from glm3kit.weights.tensors import Tensors, TensorSpec
from glm3kit.weights.write import published_tensors, write_weights

SHARD = 2 * 10**9  # bytes, as published
BUDGET = 1.5  # times the copy, and GB


def torch_pickle(specs: dict[str, TensorSpec]) -> bytes:
    """The data.pkl of a PyTorch archive with these float16 tensors, storage by storage."""
    def text(value: str) -> bytes:
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + value.to_bytes(4, "little") for value in values) + b"t"

    result = b"\x80\x02}("
    for key, (name, spec) in enumerate(specs.items()):
        strides = tuple(int(np.prod(spec.shape[axis + 1:])) for axis in range(len(spec.shape)))
        size = int(np.prod(spec.shape))
        result += (text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nHalfStorage\n" +
                   text(str(key)) + text("cpu") + b"J" + size.to_bytes(4, "little") + b"tQK\x00" +
                   numbers(spec.shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR")
    return result + b"u."


def write_torch_shards(folder: Path, tensors: Tensors) -> None:
    """Write tensors as pytorch_model-*.bin with their index, as torch.save does."""
    folder.mkdir()
    shards = {file.replace("model-", "pytorch_model-"): names
              for file, names in cut_into_shards(tensors.specs, SHARD, ".bin").items()}
    for file, names in shards.items():
        with zipfile.ZipFile(folder / file, "w") as archive:
            archive.writestr("archive/data.pkl", torch_pickle({name: tensors.specs[name] for name in names}))
            for key, name in enumerate(names):
                with archive.open(f"archive/data/{key}", "w", force_zip64=True) as member:
                    for block in tensors.blocks(name):
                        member.write(block)
    (folder / "pytorch_model.bin.index.json").write_text(index_text(tensors.specs, shards))


def measure(source: Path, destination: Path, *options: str) -> dict[str, float]:
    """Convert after copying the same bytes; remove the result."""
    destination.parent.mkdir(exist_ok=True)
    copied = copy_seconds(source, destination.with_name("copy"))
    forget(source)
    usage = watch(subprocess.Popen([sys.executable, "-m", "glm3kit", "convert", source, destination, *options],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    remove(destination)
    return {"copy_s": round(copied, 2), "convert_s": round(usage.seconds, 2),
            "ratio": round(usage.seconds / copied, 2), "anonymous_mb": round(usage.anonymous / 1e6),
            "resident_mb": round(usage.resident / 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 256")
    parser.add_argument("--folder", type=Path, help="where to work; default: the folder for temporary files")
    parser.add_argument("--only", help="the one line to run, such as 'hub > ckpt'")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    cfg = model_config(args.layers, args.hidden)
    tensors = random_tensors(cfg)
    results = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        makers = {
            "hub": lambda path: write_weights(path, published_tensors(tensors, cfg), max_shard_size=SHARD,
                                              progress=False),
            "bin": lambda path: write_torch_shards(path, published_tensors(tensors, cfg)),
            "ckpt": lambda path: write_weights(path.with_suffix(".ckpt"), tensors, progress=False)}
        lines = [("hub", "ckpt", "t.ckpt", []), ("hub", "safetensors", "t.safetensors", []),
                 ("bin", "ckpt", "t.ckpt", []), ("ckpt", "hf", "hf", ["--to", "hf"]),
                 ("ckpt", "hf-glm", "glm", ["--to", "hf-glm"])]
        lines = [line for line in lines if args.only in (None, f"{line[0]} > {line[1]}")]
        for form, make in makers.items():
            if form not in [line[0] for line in lines]:
                continue
            make(folder / form)
            source = folder / (f"{form}.ckpt" if form == "ckpt" else form)
            (folder / form / "config.json" if form != "ckpt" else folder / "config.json").write_text(
                json.dumps(cfg.to_hf()))
            for name, target, result, options in lines:
                if name == form:
                    results[f"{name} > {target}"] = measure(source, folder / "result" / result, *options)
            remove(source)
    if args.json:
        print(json.dumps({"gb": round(tensors.nbytes / 1e9, 2), "results": results}))
        return
    print(f"{tensors.nbytes / 1e9:.1f} GB; budget: {BUDGET} x the copy, {BUDGET} GB")
    print(f"{'conversion':<20} {'cp + sync':>10} {'convert':>10} {'ratio':>6} {'anonymous':>10} {'resident':>9}")
    for name, line in results.items():
        print(f"{name:<20} {line['copy_s']:>8.1f} s {line['convert_s']:>8.1f} s {line['ratio']:>6.2f} "
              f"{line['anonymous_mb']:>7.0f} MB {line['resident_mb']:>6.0f} MB")


if __name__ == "__main__":
    main()
