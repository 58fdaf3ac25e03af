"""The command line: `python -m glm3kit VERB`, or `glm3kit VERB`; every step of the notebooks without a notebook.

Exit status: 0, 1 for a run that failed, 2 for a wrong call (unknown verb or option, faulty configuration or override).
What a verb needs is imported when it runs: `--help` waits for nothing.

    glm3kit launch configs/tiny.yaml train.total_steps=20
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm3kit.errors import ConfigError, Glm3KitError, JobError, RankTableError

if TYPE_CHECKING:
    from glm3kit.chat import ChatSession
    from glm3kit.config import RunConfig
    from glm3kit.model import ChatGLM3
    from glm3kit.tokenizer import ChatGLM3Tokenizer

CHAT_HELP = "A line is said in the current role. /role user|system|observation, /clear, /save FILE, /quit"


def _config(args: argparse.Namespace) -> "RunConfig":
    from glm3kit.config import load_config

    return load_config(args.config, args.overrides)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def check(args: argparse.Namespace) -> int:
    """Check whether this machine is ready."""
    from dataclasses import asdict

    from glm3kit.doctor import format_checks, run_checks

    checks = run_checks(_config(args) if args.config else None)
    if args.json:
        _print_json([asdict(item) for item in checks])
    else:
        print(format_checks(checks))
    return int(any(item.state == "failed" for item in checks))


def rank_table_show(args: argparse.Namespace) -> int:
    """Show a rank table of any form that is read."""
    from glm3kit.rank_table import find_rank_table, read_rank_table

    path = args.path or find_rank_table()
    if path is None:
        raise RankTableError("no rank table: RANK_TABLE_FILE is not set and /user/config holds none; give a path")
    table = read_rank_table(path)
    if args.json:
        _print_json(table.to_dict())
        return 0
    print(f"{path}: {table.rank_size} device(s) on {len(table.servers)} server(s)")
    for server in table.servers:
        for device in server.devices:
            print(f"rank {device.rank_id:>3}  {server.server_id}  device {device.device_id}  {device.device_ip}")
    return 0


def rank_table_merge(args: argparse.Namespace) -> int:
    """Merge the rank tables of several servers into one; ranks follow the order of the files."""
    from glm3kit.rank_table import merge_rank_tables, read_rank_table

    table = merge_rank_tables([read_rank_table(path) for path in args.paths])
    table.save(args.output)
    print(f"{args.output}: {table.rank_size} devices on {len(table.servers)} servers")
    return 0


def convert(args: argparse.Namespace) -> int:
    """Convert weights to MindSpore's names."""
    from glm3kit.weights import convert_weights

    path = convert_weights(args.source, args.destination, to=args.to, dtype=args.dtype, force=args.force)
    print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
    return 0


def data(args: argparse.Namespace) -> int:
    """Encode the data files to token files and report on them."""
    from glm3kit.data import prepare_data

    _print_json({name: tokens.report for name, tokens in prepare_data(_config(args)).items()})
    return 0


def launch(args: argparse.Namespace) -> int:
    """Train with one process a device; wait for the end unless detached."""
    from glm3kit.launch import launch

    job = launch(_config(args), args.rank_table, wait=not args.detach, overwrite=args.overwrite, resume=args.resume)
    print(f"{job.state()['state']}: {job.folder}")
    return 0


def status(args: argparse.Namespace) -> int:
    """Show the state of a job."""
    from glm3kit.launch import Job

    _print_json(Job.attach(args.job).state())
    return 0


def stop(args: argparse.Namespace) -> int:
    """Stop a running job."""
    from glm3kit.launch import Job

    print(f"{Job.attach(args.job).stop()['state']}: {args.job}")
    return 0


def logs(args: argparse.Namespace) -> int:
    """Show the end of a rank's log."""
    from glm3kit.launch import Job

    print(Job.attach(args.job).log(args.rank, args.lines))
    return 0


def train(args: argparse.Namespace) -> int:
    """Train as one rank; `launch` starts this on every device."""
    from glm3kit.job import rank_process
    from glm3kit.train import run_rank

    config = _config(args)
    with rank_process(config.job_dir):  # leaves the record that the job's verdict is taken from
        run_rank(config, args.resume)
    return 0


def plot(args: argparse.Namespace) -> int:
    """Plot loss, learning rate and speed of a run."""
    from glm3kit.display import loss_figure
    from glm3kit.files import atomic_path
    from glm3kit.metrics import read_metrics

    records = [record for path in args.logs for record in read_metrics(path)]
    with atomic_path(args.output) as temporary:
        figure = loss_figure(records, title=", ".join(path.name for path in args.logs))
        figure.savefig(temporary, format=args.output.suffix[1:])
    print(f"{args.output}: {len(records)} records")
    return 0


def merge(args: argparse.Namespace) -> int:
    """Merge the shards of a checkpoint into one file of weights."""
    from glm3kit.checkpoint import merge

    path = merge(args.source, args.destination, args.strategy, force=args.force)
    print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Measure held-out loss, attribute coverage, Rouge and BLEU."""
    from glm3kit.evaluate import evaluate
    from glm3kit.files import atomic_write

    net, _, _ = _model(config := _config(args))
    result = evaluate(config, net)
    answers = result.pop("answers", [])
    if args.answers:
        atomic_write(args.answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
    _print_json(result)
    return 0


def _model(config: "RunConfig") -> "tuple[ChatGLM3, ChatGLM3Tokenizer, dict[str, Any]]":
    """The model with its weights, the tokenizer, and the options of `generate` and `stream`."""
    missing = [key for key in ("tokenizer_path", "checkpoint_name_or_path") if getattr(config.model, key) is None]
    if missing:
        raise ConfigError("\n".join(f"model.{key} is not set; set it in the configuration, or add model.{key}=PATH"
                                    for key in missing))
    from glm3kit.model import AutoModel
    from glm3kit.parallel import choose_device
    from glm3kit.tokenizer import ChatGLM3Tokenizer

    choose_device(config.parallel.device_target)
    tokenizer = ChatGLM3Tokenizer(config.model.tokenizer_path)
    options = config.generate.model_dump() | {"eos_token_id": tokenizer.stop_ids}
    return AutoModel.from_config(config.model), tokenizer, options


def printable(text: str) -> str:
    """Text of a model without control characters, which could write anywhere on a terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def predict(args: argparse.Namespace) -> int:
    """Continue a prompt, in the form that ADGEN rows are trained in."""
    from glm3kit.evaluate import answer_text

    net, tokenizer, options = _model(_config(args))
    prompt = tokenizer.encode(args.prompt)
    (output,) = net.generate([prompt], **options)
    print(printable(answer_text(output, prompt, tokenizer)))
    return 0


def chat(args: argparse.Namespace) -> int:
    """Talk to the model in the terminal, in several roles."""
    from glm3kit.chat import ChatSession

    net, tokenizer, options = _model(config := _config(args))
    window = config.model.seq_length
    talk(ChatSession(tokenizer, lambda ids: net.stream(ids, **options), args.system, seq_length=window))
    return 0


def talk(session: "ChatSession", read: Callable[[str], str] = input) -> None:
    """Converse until /quit or the end of the input; Ctrl-C ends a reply and keeps what was said.

    read: shows a prompt and returns a line, as `input`.
    """
    from glm3kit.chat import ROLES
    from glm3kit.files import atomic_write

    role = "user"
    print(CHAT_HELP)
    while True:
        try:
            line = read(f"\n{role}> ").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/clear":
                session.clear()
            elif command == "/role" and argument in ROLES:
                role = argument
            elif command == "/save" and argument:
                atomic_write(argument, session.transcript())
            elif command.startswith("/"):
                print(CHAT_HELP)
            elif line:
                for text in session.stream(line, role=role):
                    print(printable(text), end="", flush=True)
                print()
        except KeyboardInterrupt:
            print(" [stopped]")
        except (Glm3KitError, OSError) as err:  # the conversation goes on
            print(err)


def demo(args: argparse.Namespace) -> int:
    """Run the seven notebooks on the tiny model."""
    try:
        from glm3kit.demo import run_demo
    except ModuleNotFoundError as err:
        raise JobError(f"the demo needs {err.name}, not installed; use make demo, or pip install '.[demo]'") from err

    index = run_demo()
    print(f"\nDone: open {os.path.relpath(index)}")
    for path in sorted(index.parent.iterdir()):
        if path.is_file() and path.suffix not in (".html", ".ipynb"):
            print(f"  {os.path.relpath(path)}")
    return 0


def _picture(path: str) -> Path:
    if not path.endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"{path}: the name says the form of a picture; end it with .png, .svg or .pdf")
    return Path(path)


def _add(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], example: str,
         config: bool = False) -> argparse.ArgumentParser:
    """Add a verb; its help is the docstring of `run`. config: it takes CONFIG and overrides."""
    assert run.__doc__ is not None
    added = verbs.add_parser(name, help=run.__doc__[0].lower() + run.__doc__[1:-1], description=run.__doc__,
                             epilog=f"example: glm3kit {example}")
    added.set_defaults(run=run)
    if config:
        added.add_argument("config", metavar="CONFIG", nargs="?" if run is check else None,
                           help="a configuration file, such as configs/tiny.yaml")
        added.add_argument("overrides", metavar="key=value", nargs="*", help="replace one value of the configuration")
    return added


def parser() -> argparse.ArgumentParser:
    """All verbs with their arguments."""
    root = argparse.ArgumentParser(prog="glm3kit", description="Fine-tune and talk to ChatGLM3-6B with MindSpore.",
                                   epilog="Each verb has its own help, with an example: glm3kit launch --help")
    verbs = root.add_subparsers(title="verbs", metavar="VERB", required=True)
    weights = "model.checkpoint_name_or_path=merged.safetensors"

    verb = _add(verbs, "check", check, "check configs/tiny.yaml", config=True)
    verb.add_argument("--json", action="store_true", help="print JSON")

    merging = "rank-table merge hccl_a.json hccl_b.json -o hccl.json"
    tables = verbs.add_parser("rank-table", help="show or merge rank tables", epilog=f"example: glm3kit {merging}")
    tables = tables.add_subparsers(metavar="show|merge", required=True)
    verb = _add(tables, "show", rank_table_show, "rank-table show /user/config/jobstart_hccl.json")
    verb.add_argument("path", metavar="PATH", nargs="?", help="default: what RANK_TABLE_FILE or ModelArts provides")
    verb.add_argument("--json", action="store_true", help='print it as version "1.0"')
    verb = _add(tables, "merge", rank_table_merge, merging)
    verb.add_argument("paths", metavar="PATH", nargs="+", help="one table a server")
    verb.add_argument("-o", dest="output", metavar="FILE", required=True, help="the merged table")

    verb = _add(verbs, "convert", convert, "convert chatglm3-6b models/glm3_6b.safetensors")
    verb.add_argument("source", metavar="SRC", help="a hub folder, or a .safetensors or .ckpt file or folder")
    verb.add_argument("destination", metavar="DST", help="the result, named .safetensors or .ckpt")
    verb.add_argument("--to", choices=["mindspore"], default="mindspore", help="whose names to write")
    verb.add_argument("--dtype", choices=["keep", "float16", "bfloat16", "float32"], default="keep", help="cast to it")
    verb.add_argument("--force", action="store_true", help="replace an existing DST")

    _add(verbs, "data", data, "data configs/tiny.yaml", config=True)

    verb = _add(verbs, "launch", launch, "launch configs/tiny.yaml train.total_steps=20", config=True)
    verb.add_argument("--detach", action="store_true", help="return at once; then use status, logs and stop")
    again = verb.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    again.add_argument("--overwrite", action="store_true", help="remove an earlier run of the same name first")
    verb.add_argument("--rank-table", metavar="PATH", help="default: what ModelArts provides, else this machine")
    for name, run in (("status", status), ("stop", stop), ("logs", logs)):
        verb = _add(verbs, name, run, f"{name} output/tiny")
        verb.add_argument("job", metavar="JOB", help="the folder of a job")
    verb.add_argument("--rank", type=int, default=0, help="default: 0")
    verb.add_argument("--lines", type=int, default=20, help="default: 20")
    verb = _add(verbs, "train", train, "train configs/tiny.yaml parallel.data_parallel=1", config=True)
    verb.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")

    verb = _add(verbs, "plot", plot, "plot output/tiny -o loss.png")
    verb.add_argument("logs", metavar="LOG", nargs="+", type=Path, help="a job, metrics.jsonl, or a MindFormers log")
    verb.add_argument("-o", dest="output", metavar="FILE", type=_picture, required=True, help="a .png, .svg or .pdf")

    verb = _add(verbs, "merge", merge, "merge output/tiny merged.safetensors")
    verb.add_argument("source", metavar="JOB_OR_SHARDS", help="the folder of a job, or of one of its checkpoints")
    verb.add_argument("destination", metavar="DST", help="the merged weights, named .safetensors or .ckpt")
    verb.add_argument("--strategy", metavar="PATH", help="how the shards are sliced, where it is not beside them")
    verb.add_argument("--force", action="store_true", help="replace an existing DST")

    verb = _add(verbs, "evaluate", evaluate, f"evaluate configs/tiny.yaml {weights}", config=True)
    verb.add_argument("--answers", metavar="FILE", help="write the rows with their answers, a JSON object a line")
    verb = _add(verbs, "predict", predict, f"predict configs/tiny.yaml {weights} --prompt TEXT", config=True)
    verb.add_argument("--prompt", metavar="TEXT", required=True, help="the text to continue, such as 类型#裙*颜色#红色")
    verb = _add(verbs, "chat", chat, f"chat configs/tiny.yaml {weights}", config=True)
    verb.add_argument("--system", metavar="TEXT", help="a system turn to open with")

    _add(verbs, "demo", demo, "demo")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status; an error of the kit is one message on stderr, without a traceback."""
    os.environ.setdefault("GLOG_v", "3")  # read when MindSpore is imported: print errors only
    root = parser()
    args, rest = root.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        root.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after an option, which argparse does not take for positional arguments
        args.overrides += rest
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
