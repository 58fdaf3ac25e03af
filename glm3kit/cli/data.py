"""Rows to token files, and other people's records to rows: data, data tool-alpaca."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from glm3kit.cli.arguments import RUN, argument, config_of, json_text, switch, verb


@verb("data", *RUN,
      switch("--skip-bad", "leave bad rows out, counted and listed in the report"),
      switch("--report", "what to know before training: lengths, windows, overlap, samples; as a page too"),
      argument("--format", choices=["tokens", "mindrecord"], default="tokens",
               help="mindrecord: write the rows, padded, for MindSpore's own loaders too"),
      example="data configs/tiny.yaml")
def data(args: argparse.Namespace) -> None:
    """Encode the data files to token files and report on them."""
    from glm3kit.data.encode import prepare_data

    if args.skip_bad:
        args.overrides.append("data.skip_bad=true")
    config = config_of(args)
    files = prepare_data(config)
    if args.report:
        from glm3kit.notebook.data_report import data_report, report_text, write_report

        parts = data_report(files, config)
        print(report_text(parts))
        page = write_report(parts, config.job_dir / "data_report.html", f"The data of {config.name}")
        print(f"\n{page}: the same with the histograms of lengths")
    else:
        print(json_text({name: tokens.report for name, tokens in files.items()}))
    if args.format == "mindrecord":
        from glm3kit.data.mindrecord import write_mindrecord

        for name, tokens in files.items():
            folder = Path(config.output_dir) / "mindrecord" / tokens.folder.name
            path = write_mindrecord(tokens, folder / f"{name}.mindrecord", config.model.seq_length)
            print(f"{path}: {len(tokens):,} rows of {config.model.seq_length} tokens", file=sys.stderr)


@verb("data tool-alpaca",
      argument("source", metavar="SRC", help="a file of ToolAlpaca's records, such as data/train_data.json"),
      argument("destination", metavar="DST", help="the JSON lines, such as tool_alpaca.jsonl"),
      example="data tool-alpaca train_data.json tool_alpaca.jsonl")
def data_tool_alpaca(args: argparse.Namespace) -> None:
    """Turn ToolAlpaca's records into conversations, one a line."""
    from glm3kit.data.rows import reason_of
    from glm3kit.data.tool_alpaca import format_tool_alpaca

    report = format_tool_alpaca(args.source, args.destination)
    print(f"{args.destination}: {report['written']} conversations from {report['instances']} instances in "
          f"{report['records']} records; {report['without_tool_call']} call no tool")
    for skipped in report["skipped"]:
        print(f"skipped: {args.source}:{skipped['line']}: {skipped['where']}: {skipped['reason']}")
    for reason, count in Counter(reason_of(skipped["reason"]) for skipped in report["skipped"]).most_common():
        print(f"{count:>6} skipped: {reason}")


VERBS = (data, data_tool_alpaca)
