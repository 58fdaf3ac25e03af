"""A run, from its start to its curve: launch, status, wait, stop, logs, train, plot."""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from glm3kit.cli.arguments import RUN, argument, config_of, either, json_text, switch, titled, verb
from glm3kit.files import atomic_path

JOB = argument("job", metavar="JOB", help="the folder of a job")
RESUME = switch("--resume", "go on from the newest complete checkpoint")


@verb("launch", *RUN,
      switch("--detach", "return at once; then use status, logs and stop"),
      either(RESUME, switch("--overwrite", "remove an earlier run of the same name first")),
      argument("--rank-table", metavar="PATH", help="default: what ModelArts provides, else this machine"),
      argument("--wait-table", metavar="SECONDS", type=float, default=600,
               help="for a rank table that is still being filled; default: 600"),
      switch("--dry-run", "print what was decided, the command and its environment"),
      titled("several machines", "found from the rank table and the machine's addresses, or from ModelArts' variables; "
                                 "the same command runs on each",
             argument("--node-rank", metavar="N", type=int, help="this machine's place in the table, from 0"),
             argument("--master", metavar="ADDRESS", help="of the machine where the processes meet"),
             argument("--port", type=int, help="of the master; default: 8118, on one machine any free one")),
      example="launch configs/tiny.yaml train.total_steps=20")
def launch(args: argparse.Namespace) -> None:
    """Train with one process a device; wait for the end unless detached."""
    from glm3kit.jobs.launch import plan_launch, run_launch

    start = plan_launch(config_of(args), args.rank_table, args.resume, args.wait_table, node_rank=args.node_rank,
                        master=args.master, port=args.port)
    print(start.report(), flush=True)
    if args.dry_run:
        print(f"\n{start.shell()}")
        return
    if not args.detach:  # whoever ends this process ends its job, as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    job = run_launch(start, wait=not args.detach, overwrite=args.overwrite)
    print(f"{job.state()['state']}: {job.folder}")


def _job(args: argparse.Namespace) -> Any:
    from glm3kit.jobs.job import Job

    return Job.attach(args.job)


@verb("status", JOB, example="status output/tiny")
def status(args: argparse.Namespace) -> None:
    """Show the state of a job."""
    print(json_text(_job(args).state()))


@verb("wait", JOB, example="wait output/tiny")
def wait(args: argparse.Namespace) -> None:
    """Wait for the end of a job, with a progress bar; exit with 1 and the reason if it fails."""
    print(f"{_job(args).wait(progress=True).state()['state']}: {args.job}")


@verb("stop", JOB, example="stop output/tiny")
def stop(args: argparse.Namespace) -> None:
    """Stop a running job."""
    print(f"{_job(args).stop()['state']}: {args.job}")


@verb("logs", JOB,
      argument("--rank", type=int, default=0, help="default: 0"),
      argument("--lines", type=int, default=20, help="default: 20"),
      switch("--follow", "go on until the job ends; exit with 1 if it fails"),
      example="logs output/tiny")
def logs(args: argparse.Namespace) -> int:
    """Show the end of a rank's log, and what is added to it."""
    job = _job(args)
    if not args.follow:
        print(job.log(args.rank, args.lines))
        return 0
    try:
        for text in job.follow(args.rank, args.lines):
            print(text, end="", flush=True)
    except KeyboardInterrupt:  # ends the following, not the job
        return 0
    return int(job.state()["state"] == "failed")


@verb("train", *RUN, RESUME, example="train configs/tiny.yaml parallel.data_parallel=1")
def train(args: argparse.Namespace) -> None:
    """Train as one rank; `launch` starts this on every device, and so do ModelArts' preset engines."""
    from glm3kit.jobs.environment import joined
    from glm3kit.jobs.process import JOB_VARIABLE, rank_process

    config = config_of(args)
    folder = os.environ.get(JOB_VARIABLE, config.job_dir)  # where several machines share a run, each has its own
    with rank_process(folder), joined():  # leaves the record that the job's verdict is taken from
        from glm3kit.train.run import run_rank  # here: a MindSpore that cannot be imported is recorded, too

        run_rank(config, args.resume)


@verb("plot",
      argument("logs", metavar="LOG", nargs="+", type=Path, help="a job, metrics.jsonl, or a MindFormers log"),
      argument("-o", dest="output", metavar="FILE", type=Path, required=True, help="a .png, .svg or .pdf"),
      example="plot output/tiny -o loss.png")
def plot(args: argparse.Namespace) -> None:
    """Plot loss, learning rate and speed of a run."""
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        args.error(f"{args.output}: the name says the form of a picture; end it with .png, .svg or .pdf")
    from glm3kit.jobs.metrics import read_metrics
    from glm3kit.notebook.figures import loss_figure

    records = [record for path in args.logs for record in read_metrics(path)]
    with atomic_path(args.output) as temporary:
        figure = loss_figure(records, title=", ".join(path.name for path in args.logs))
        figure.savefig(temporary, format=args.output.suffix[1:])
    print(f"{args.output}: {len(records)} records")


VERBS = (launch, status, wait, stop, logs, train, plot)
