"""Weights from one form to another, and from shards to a whole: convert, merge."""

import argparse
from pathlib import Path

from glm3kit.cli.arguments import argument, size, switch, verb

MAX_SHARD_SIZE = argument("--max-shard-size", metavar="SIZE", type=size, help="a folder of files up to it, such as 2GB")
FORCE = switch("--force", "replace an existing DST")


def _print_size(path: Path) -> None:
    files = path.iterdir() if path.is_dir() else [path]
    print(f"{path}: {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")


@verb("convert",
      argument("source", metavar="SRC", help="a hub folder, or a .safetensors, .bin, .pth or .ckpt file"),
      argument("destination", metavar="DST", nargs="?",
               help="the result: a file named .safetensors or .ckpt, or a folder"),
      argument("--to", choices=["mindspore", "hf", "hf-glm"], default="mindspore",
               help="whose form: MindFormers', the published one, or that of Transformers' GLM, for vLLM too"),
      argument("--dtype", choices=["keep", "float16", "bfloat16", "float32"], default="keep", help="cast to it"),
      MAX_SHARD_SIZE,
      argument("--config", metavar="FILE", help="config.json or configuration, where none is beside SRC"),
      argument("--tokenizer", metavar="FILE", help="tokenizer.model to add for hf, where none is beside SRC"),
      switch("--verify", "read DST again (without DST: SRC) and check it"),
      FORCE,
      example="convert chatglm3-6b models/glm3_6b.safetensors")
def convert(args: argparse.Namespace) -> None:
    """Convert weights to another form, or check what an earlier conversion wrote."""
    if not (args.destination or args.verify):
        args.error("DST is missing; only with --verify SRC alone is enough, the result to check")
    from glm3kit.weights.convert import convert_weights, verify_weights

    path = args.destination or args.source
    if args.destination:
        path = convert_weights(args.source, args.destination, to=args.to, dtype=args.dtype, config=args.config,
                               max_shard_size=args.max_shard_size, tokenizer=args.tokenizer, force=args.force)
        _print_size(path)
    if args.verify:
        print(f"{path}: {verify_weights(path)} tensors are as they were written")


@verb("merge",
      argument("source", metavar="JOB_OR_SHARDS",
               help="the folder of a job, of a checkpoint, or with a file or a folder a rank (rank_0, ...)"),
      argument("destination", metavar="DST", help="the merged weights: a file named .safetensors or .ckpt"),
      argument("--strategy", metavar="PATH",
               help="how the shards are cut: a strategy file or a folder of them, where it is not beside them"),
      MAX_SHARD_SIZE,
      argument("--base", metavar="WEIGHTS",
               help="what LoRA adapters are folded into; default: what the job began with"),
      switch("--adapters", "write the LoRA adapters alone"),
      FORCE,
      example="merge output/tiny merged.safetensors")
def merge(args: argparse.Namespace) -> None:
    """Merge the shards of a checkpoint, this kit's or MindFormers', into whole weights."""
    from glm3kit.checkpoint.merge import merge

    _print_size(merge(args.source, args.destination, args.strategy, base=args.base, adapters=args.adapters,
                      max_shard_size=args.max_shard_size, force=args.force))


VERBS = (convert, merge)
