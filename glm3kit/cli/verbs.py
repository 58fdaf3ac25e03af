"""What each verb of the command line does: from parsed arguments to what is printed and the exit status.

What a verb needs is imported when it runs: `glm3kit --help` waits for nothing. The words of a call are in __main__.py.

    status(parser().parse_args(["status", "output/tiny"]))
"""

import argparse
import json
import os
import signal
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm3kit.errors import ConfigError, JobError, RankTableError

if TYPE_CHECKING:
    from glm3kit.config.groups import RunConfig
    from glm3kit.model.chatglm3 import ChatGLM3
    from glm3kit.text.tokenizer import ChatGLM3Tokenizer


def _config(args: argparse.Namespace) -> "RunConfig":
    from glm3kit.config.load import load_config

    return load_config(args.config, args.overrides)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def check(args: argparse.Namespace) -> int:
    """Check whether this machine is ready."""
    from dataclasses import asdict

    from glm3kit.setup.checks import format_checks, run_checks

    checks = run_checks(_config(args) if args.config else None)
    if args.json:
        _print_json([asdict(item) for item in checks])
    else:
        print(format_checks(checks))
    return int(any(item.state == "failed" for item in checks))


def _rank_table_path(path: str | None) -> str | Path:
    """The path that was given, else where the platform puts the table."""
    from glm3kit.setup.rank_table import find_rank_table

    found = path or find_rank_table()
    if found is None:
        raise RankTableError("no rank table: RANK_TABLE_FILE is not set and /user/config holds none; give a path")
    return found


def memory(args: argparse.Namespace) -> int:
    """Estimate the memory that training needs on a device."""
    from glm3kit.setup.memory import estimate_memory, memory_table

    parts = estimate_memory(_config(args))
    if args.json:
        _print_json(parts | {"sum": sum(parts.values())})
    else:
        print(memory_table(parts))
    return 0


def rank_table_show(args: argparse.Namespace) -> int:
    """Show a rank table of any form: servers, devices, addresses, ranks."""
    from glm3kit.jobs.plan import own_addresses
    from glm3kit.setup.rank_table import format_rank_table, read_rank_table

    table = read_rank_table(_rank_table_path(args.path))
    if args.json:
        _print_json(table.to_dict())
    else:
        print(format_rank_table(table, own_addresses()))
    return 0


def rank_table_check(args: argparse.Namespace) -> int:
    """List every fault of a rank table; exit with 1 if there is one."""
    from glm3kit.setup.rank_table import check_rank_table

    path = _rank_table_path(args.path)
    faults = check_rank_table(path)
    print("\n".join(faults) if faults else f"{path}: no fault found")
    return int(bool(faults))


def rank_table_wait(args: argparse.Namespace) -> int:
    """Wait until the platform has filled the rank table."""
    from glm3kit.setup.rank_table import wait_for_rank_table

    table = wait_for_rank_table(args.path, args.timeout, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{table.source}: {table.rank_size} device(s) on {len(table.servers)} server(s)")
    return 0


def rank_table_make(args: argparse.Namespace) -> int:
    """Make the rank table of this machine, with the addresses of its cards."""
    from glm3kit.setup.hccn import make_rank_table, parse_devices, table_name
    from glm3kit.setup.rank_table import ascend_cards

    devices = parse_devices(args.devices) if args.devices else ascend_cards()
    if not devices:
        raise RankTableError("this machine shows no Ascend card (/dev/davinci*); give --devices '[0,8)'")
    table = make_rank_table(devices, args.server_ip)
    path = args.output or table_name(table)
    table.save(path)
    print(f"{path}: {table.rank_size} device(s)")
    if ip_address(table.servers[0].server_id).is_loopback:
        print("note: the server's address is a loopback one; with several machines give --server-ip", file=sys.stderr)
    return 0


def rank_table_merge(args: argparse.Namespace) -> int:
    """Merge the rank tables of several servers into one; ranks follow the order of the files."""
    from glm3kit.setup.rank_table import merge_rank_tables, read_rank_table

    table = merge_rank_tables([read_rank_table(path) for path in args.paths])
    table.save(args.output)
    print(f"{args.output}: {table.rank_size} devices on {len(table.servers)} servers")
    return 0


def _print_size(path: Path) -> None:
    files = path.iterdir() if path.is_dir() else [path]
    print(f"{path}: {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")


def convert(args: argparse.Namespace) -> int:
    """Convert weights to another form, or check what an earlier conversion wrote."""
    from glm3kit.weights.convert import convert_weights, verify_weights

    path = args.destination or args.source
    if args.destination:
        path = convert_weights(args.source, args.destination, to=args.to, dtype=args.dtype, config=args.config,
                               max_shard_size=args.max_shard_size, tokenizer=args.tokenizer, force=args.force)
        _print_size(path)
    if args.verify:
        print(f"{path}: {verify_weights(path)} tensors are as they were written")
    return 0


def data(args: argparse.Namespace) -> int:
    """Encode the data files to token files and report on them."""
    from glm3kit.data.encode import prepare_data

    args.overrides += ["data.skip_bad=true"] if args.skip_bad else []
    config = _config(args)
    files = prepare_data(config)
    if args.report:
        from glm3kit.data.report import data_report, report_text, write_report

        parts = data_report(files, config)
        print(report_text(parts))
        page = write_report(parts, config.job_dir / "data_report.html", f"The data of {config.name}")
        print(f"\n{page}: the same with the histograms of lengths")
    else:
        _print_json({name: tokens.report for name, tokens in files.items()})
    if args.format == "mindrecord":
        from glm3kit.data.mindrecord import write_mindrecord

        for name, tokens in files.items():
            folder = Path(config.output_dir) / "mindrecord" / tokens.folder.name
            path = write_mindrecord(tokens, folder / f"{name}.mindrecord", config.model.seq_length)
            print(f"{path}: {len(tokens):,} rows of {config.model.seq_length} tokens", file=sys.stderr)
    return 0


def data_tool_alpaca(args: argparse.Namespace) -> int:
    """Turn ToolAlpaca's records into conversations, one a line."""
    from collections import Counter

    from glm3kit.data.rows import reason_of
    from glm3kit.data.tool_alpaca import format_tool_alpaca

    report = format_tool_alpaca(args.source, args.destination)
    print(f"{args.destination}: {report['written']} conversations from {report['instances']} instances in "
          f"{report['records']} records; {report['without_tool_call']} call no tool")
    for skipped in report["skipped"]:
        print(f"skipped: {args.source}:{skipped['line']}: {skipped['where']}: {skipped['reason']}")
    for reason, count in Counter(reason_of(skipped["reason"]) for skipped in report["skipped"]).most_common():
        print(f"{count:>6} skipped: {reason}")
    return 0


def launch(args: argparse.Namespace) -> int:
    """Train with one process a device; wait for the end unless detached."""
    from glm3kit.jobs.launch import plan_launch, run_launch

    start = plan_launch(_config(args), args.rank_table, args.resume, args.wait_table, node_rank=args.node_rank,
                        master=args.master, port=args.port)
    print(start.report(), flush=True)
    if args.dry_run:
        print(f"\n{start.shell()}")
        return 0
    if not args.detach:  # whoever ends this process ends its job, as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    job = run_launch(start, wait=not args.detach, overwrite=args.overwrite)
    print(f"{job.state()['state']}: {job.folder}")
    return 0


def status(args: argparse.Namespace) -> int:
    """Show the state of a job."""
    from glm3kit.jobs.launch import Job

    _print_json(Job.attach(args.job).state())
    return 0


def wait(args: argparse.Namespace) -> int:
    """Wait for the end of a job, with a progress bar; exit with 1 and the reason if it fails."""
    from glm3kit.jobs.launch import Job

    print(f"{Job.attach(args.job).wait(progress=True).state()['state']}: {args.job}")
    return 0


def stop(args: argparse.Namespace) -> int:
    """Stop a running job."""
    from glm3kit.jobs.launch import Job

    print(f"{Job.attach(args.job).stop()['state']}: {args.job}")
    return 0


def logs(args: argparse.Namespace) -> int:
    """Show the end of a rank's log, and what is added to it."""
    from glm3kit.jobs.launch import Job

    job = Job.attach(args.job)
    if not args.follow:
        print(job.log(args.rank, args.lines))
        return 0
    try:
        for text in job.follow(args.rank, args.lines):
            print(text, end="", flush=True)
    except KeyboardInterrupt:  # ends the following, not the job
        return 0
    return int(job.state()["state"] == "failed")


def train(args: argparse.Namespace) -> int:
    """Train as one rank; `launch` starts this on every device, and so do ModelArts' preset engines."""
    from glm3kit.jobs.job import JOB_VARIABLE, rank_process
    from glm3kit.jobs.plan import joined

    config = _config(args)
    folder = os.environ.get(JOB_VARIABLE, config.job_dir)  # where several machines share a run, each has its own
    with rank_process(folder), joined():  # leaves the record that the job's verdict is taken from
        from glm3kit.train.run import run_rank  # here: a MindSpore that cannot be imported is recorded, too

        run_rank(config, args.resume)
    return 0


def plot(args: argparse.Namespace) -> int:
    """Plot loss, learning rate and speed of a run."""
    from glm3kit.files import atomic_path
    from glm3kit.jobs.metrics import read_metrics
    from glm3kit.notebook.html import loss_figure

    records = [record for path in args.logs for record in read_metrics(path)]
    with atomic_path(args.output) as temporary:
        figure = loss_figure(records, title=", ".join(path.name for path in args.logs))
        figure.savefig(temporary, format=args.output.suffix[1:])
    print(f"{args.output}: {len(records)} records")
    return 0


def merge(args: argparse.Namespace) -> int:
    """Merge the shards of a checkpoint, this kit's or MindFormers', into whole weights."""
    from glm3kit.checkpoint.merge import merge

    _print_size(merge(args.source, args.destination, args.strategy, base=args.base, adapters=args.adapters,
                      max_shard_size=args.max_shard_size, force=args.force))
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
    from glm3kit.model.load import AutoModel
    from glm3kit.parallel import choose_device
    from glm3kit.text.tokenizer import ChatGLM3Tokenizer

    choose_device(config.parallel.device_target)
    tokenizer = ChatGLM3Tokenizer(config.model.tokenizer_path)
    options = {"eos_token_id": tokenizer.stop_ids} | config.generate.model_dump()  # its own ids unless others are set
    return AutoModel.from_config(config.model), tokenizer, options


def predict(args: argparse.Namespace) -> int:
    """Continue a prompt, in the form that ADGEN rows are trained in."""
    from glm3kit.chat.terminal import printable
    from glm3kit.evaluate import answer_text

    net, tokenizer, options = _model(_config(args))
    prompt = tokenizer.encode(args.prompt)
    (output,) = net.generate([prompt], **options)
    print(printable(answer_text(output, prompt, tokenizer)))
    return 0


def chat(args: argparse.Namespace) -> int:
    """Talk to the model in the terminal, in several roles."""
    from glm3kit.chat.session import ChatSession
    from glm3kit.chat.terminal import talk
    from glm3kit.chat.tools import calculate, calendar, find_products

    net, tokenizer, options = _model(config := _config(args))
    tools = [calculate, calendar, find_products] if args.tools else None
    talk(ChatSession(tokenizer, net.conversation(**options), args.system, tools, seq_length=config.model.seq_length))
    return 0


def demo(args: argparse.Namespace) -> int:
    """Run the seven notebooks on the tiny model."""
    try:
        from glm3kit.notebook.demo import run_demo
    except ModuleNotFoundError as err:
        raise JobError(f"the demo needs {err.name}, not installed; use make demo, or pip install '.[demo]'") from err

    index = run_demo()
    print(f"\nDone: open {os.path.relpath(index)}")
    for path in sorted(index.parent.iterdir()):
        if path.is_file() and path.suffix not in (".html", ".ipynb"):
            print(f"  {os.path.relpath(path)}")
    return 0
