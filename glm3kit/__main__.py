"""The command line: `python -m glm3kit VERB`, or `glm3kit VERB`; every step of the notebooks without a notebook.

Exit status: 0, 1 for a run that failed, 2 for a wrong call (unknown verb or option, faulty configuration or override).

    glm3kit launch configs/tiny.yaml train.total_steps=20
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm3kit.cli import verbs
from glm3kit.errors import CheckpointError, ConfigError, Glm3KitError


def _picture(path: str) -> Path:
    if not path.endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"{path}: the name says the form of a picture; end it with .png, .svg or .pdf")
    return Path(path)


def _size(text: str) -> int:
    from glm3kit.weights.hub_files import parse_size

    try:
        return parse_size(text)
    except CheckpointError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], int], example: str,
         config: bool = False) -> argparse.ArgumentParser:
    """Add a verb; its help is the docstring of `run`. config: it takes CONFIG and overrides."""
    assert run.__doc__ is not None
    added = commands.add_parser(name, help=run.__doc__[0].lower() + run.__doc__[1:-1], description=run.__doc__,
                             epilog=f"example: glm3kit {example}")
    added.set_defaults(run=run)
    if config:
        added.add_argument("config", metavar="CONFIG", nargs="?" if run is verbs.check else None,
                           help="a configuration file, such as configs/tiny.yaml")
        added.add_argument("overrides", metavar="key=value", nargs="*", help="replace one value of the configuration")
    return added


def _add_rank_table(commands: Any) -> None:
    """Add the verbs about rank tables."""
    merging = "rank-table merge hccl_a.json hccl_b.json -o hccl.json"
    tables = commands.add_parser("rank-table", help="show, check, wait for, make or merge rank tables",
                                 epilog=f"example: glm3kit {merging}")
    tables = tables.add_subparsers(metavar="show|check|wait|make|merge", required=True)
    show = _add(tables, "show", verbs.rank_table_show, "rank-table show /user/config/jobstart_hccl.json")
    show.add_argument("--json", action="store_true", help='print it as version "1.0"')
    check = _add(tables, "check", verbs.rank_table_check, "rank-table check hccl.json")
    wait = _add(tables, "wait", verbs.rank_table_wait, "rank-table wait --timeout 1800")
    wait.add_argument("--timeout", metavar="SECONDS", type=float, default=600, help="default: 600")
    for verb in (show, check, wait):
        verb.add_argument("path", metavar="PATH", nargs="?", help="default: what RANK_TABLE_FILE or ModelArts provides")
    make = _add(tables, "make", verbs.rank_table_make, "rank-table make --devices '[0,8)' --server-ip 10.0.0.1")
    make.add_argument("--devices", metavar="RANGE", help="a half-open range such as '[0,8)'; default: all cards")
    make.add_argument("--server-ip", metavar="ADDRESS", help="this machine's, which others reach it by; default: "
                                                             "that of its name, which does for one machine")
    make.add_argument("-o", dest="output", metavar="FILE", help="default: hccl_8p_01234567_ADDRESS.json")
    merge = _add(tables, "merge", verbs.rank_table_merge, merging)
    merge.add_argument("paths", metavar="PATH", nargs="+", help="one table a server")
    merge.add_argument("-o", dest="output", metavar="FILE", required=True, help="the merged table")


def parser() -> argparse.ArgumentParser:
    """All verbs with their arguments."""
    root = argparse.ArgumentParser(prog="glm3kit", description="Fine-tune and talk to ChatGLM3-6B with MindSpore.",
                                   epilog="Each verb has its own help, with an example: glm3kit launch --help")
    commands = root.add_subparsers(title="verbs", metavar="VERB", required=True)
    weights = "model.checkpoint_name_or_path=merged.safetensors"

    verb = _add(commands, "check", verbs.check, "check configs/tiny.yaml", config=True)
    verb.add_argument("--json", action="store_true", help="print JSON")

    _add_rank_table(commands)

    verb = _add(commands, "memory", verbs.memory, "memory configs/run_glm3_6b.yaml train.batch_size=4", config=True)
    verb.add_argument("--json", action="store_true", help="print bytes as JSON")

    verb = _add(commands, "convert", verbs.convert, "convert chatglm3-6b models/glm3_6b.safetensors")
    verb.add_argument("source", metavar="SRC", help="a hub folder, or a .safetensors, .bin, .pth or .ckpt file")
    verb.add_argument("destination", metavar="DST", nargs="?",
                      help="the result: a file named .safetensors or .ckpt, or a folder")
    verb.add_argument("--to", choices=["mindspore", "hf", "hf-glm"], default="mindspore",
                      help="whose form: MindFormers', the published one, or that of Transformers' GLM, for vLLM too")
    verb.add_argument("--dtype", choices=["keep", "float16", "bfloat16", "float32"], default="keep", help="cast to it")
    verb.add_argument("--max-shard-size", metavar="SIZE", type=_size, help="a folder of files up to it, such as 2GB")
    verb.add_argument("--config", metavar="FILE", help="config.json or configuration, where none is beside SRC")
    verb.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model to add for hf, where none is beside SRC")
    verb.add_argument("--verify", action="store_true", help="read DST again (without DST: SRC) and check it")
    verb.add_argument("--force", action="store_true", help="replace an existing DST")

    verb = _add(commands, "data", verbs.data, "data configs/tiny.yaml", config=True)
    verb.add_argument("--skip-bad", action="store_true", help="leave bad rows out, counted and listed in the report")
    verb.add_argument("--report", action="store_true",
                      help="what to know before training: lengths, windows, overlap, samples; as a page too")
    verb.add_argument("--format", choices=["tokens", "mindrecord"], default="tokens",
                      help="mindrecord: write the rows, padded, for MindSpore's own loaders too")
    verb = _add(commands, "data tool-alpaca", verbs.data_tool_alpaca,
                "data tool-alpaca train_data.json tool_alpaca.jsonl")
    verb.add_argument("source", metavar="SRC", help="a file of ToolAlpaca's records, such as data/train_data.json")
    verb.add_argument("destination", metavar="DST", help="the JSON lines, such as tool_alpaca.jsonl")

    verb = _add(commands, "launch", verbs.launch, "launch configs/tiny.yaml train.total_steps=20", config=True)
    verb.add_argument("--detach", action="store_true", help="return at once; then use status, logs and stop")
    again = verb.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    again.add_argument("--overwrite", action="store_true", help="remove an earlier run of the same name first")
    verb.add_argument("--rank-table", metavar="PATH", help="default: what ModelArts provides, else this machine")
    verb.add_argument("--wait-table", metavar="SECONDS", type=float, default=600,
                      help="for a rank table that is still being filled; default: 600")
    verb.add_argument("--dry-run", action="store_true", help="print what was decided, the command and its environment")
    several = verb.add_argument_group("several machines", "found from the rank table and the machine's addresses, or "
                                      "from ModelArts' variables; the same command runs on each")
    several.add_argument("--node-rank", metavar="N", type=int, help="this machine's place in the table, from 0")
    several.add_argument("--master", metavar="ADDRESS", help="of the machine where the processes meet")
    several.add_argument("--port", type=int, help="of the master; default: 8118, on one machine any free one")
    for name, run in (("status", verbs.status), ("wait", verbs.wait), ("stop", verbs.stop), ("logs", verbs.logs)):
        verb = _add(commands, name, run, f"{name} output/tiny")
        verb.add_argument("job", metavar="JOB", help="the folder of a job")
    verb.add_argument("--rank", type=int, default=0, help="default: 0")
    verb.add_argument("--lines", type=int, default=20, help="default: 20")
    verb.add_argument("--follow", action="store_true", help="go on until the job ends; exit with 1 if it fails")
    verb = _add(commands, "train", verbs.train, "train configs/tiny.yaml parallel.data_parallel=1", config=True)
    verb.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")

    verb = _add(commands, "plot", verbs.plot, "plot output/tiny -o loss.png")
    verb.add_argument("logs", metavar="LOG", nargs="+", type=Path, help="a job, metrics.jsonl, or a MindFormers log")
    verb.add_argument("-o", dest="output", metavar="FILE", type=_picture, required=True, help="a .png, .svg or .pdf")

    verb = _add(commands, "merge", verbs.merge, "merge output/tiny merged.safetensors")
    verb.add_argument("source", metavar="JOB_OR_SHARDS",
                      help="the folder of a job, of a checkpoint, or with a file or a folder a rank (rank_0, ...)")
    verb.add_argument("destination", metavar="DST", help="the merged weights: a file named .safetensors or .ckpt")
    verb.add_argument("--strategy", metavar="PATH",
                      help="how the shards are cut: a strategy file or a folder of them, where it is not beside them")
    verb.add_argument("--max-shard-size", metavar="SIZE", type=_size, help="a folder of files up to it, such as 2GB")
    verb.add_argument("--base", metavar="WEIGHTS",
                      help="what LoRA adapters are folded into; default: what the job began with")
    verb.add_argument("--adapters", action="store_true", help="write the LoRA adapters alone")
    verb.add_argument("--force", action="store_true", help="replace an existing DST")

    verb = _add(commands, "evaluate", verbs.evaluate, f"evaluate configs/tiny.yaml {weights}", config=True)
    verb.add_argument("--answers", metavar="FILE", help="write the rows with their answers, a JSON object a line")
    verb = _add(commands, "predict", verbs.predict, f"predict configs/tiny.yaml {weights} --prompt TEXT", config=True)
    verb.add_argument("--prompt", metavar="TEXT", required=True, help="the text to continue, such as 类型#裙*颜色#红色")
    verb = _add(commands, "chat", verbs.chat, f"chat configs/tiny.yaml {weights}", config=True)
    verb.add_argument("--system", metavar="TEXT", help="a system turn to open with")
    verb.add_argument("--tools", action="store_true", help="offer three tools: arithmetic, dates, a shop's catalogue")

    _add(commands, "demo", verbs.demo, "demo")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status; an error of the kit is one message on stderr, without a traceback."""
    os.environ.setdefault("GLOG_v", "3")  # read when MindSpore is imported: print errors only
    root = parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["data", "tool-alpaca"]:  # a verb of two words beside `data CONFIG`
        words[:2] = ["data tool-alpaca"]
    args, rest = root.parse_known_args(words)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        root.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after an option, which argparse does not take for positional arguments
        args.overrides += rest
    if args.run is verbs.convert and not (args.destination or args.verify):
        root.error("convert: DST is missing; only with --verify SRC alone is enough, the result to check")
    try:
        return args.run(args)
    except ConfigError as err:
        print(err, file=sys.stderr)
        return 2
    except (Glm3KitError, OSError) as err:
        print(err, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
