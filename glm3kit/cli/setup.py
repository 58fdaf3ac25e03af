"""Is this machine ready, and what belongs to it: check, memory, rank-table."""

import argparse
import sys
from dataclasses import asdict
from ipaddress import ip_address

from glm3kit.cli.arguments import OVERRIDES, RUN, argument, config_of, json_text, switch, verb
from glm3kit.errors import RankTableError
from glm3kit.setup.checks import format_checks, run_checks
from glm3kit.setup.hccn import make_rank_table, parse_devices, table_name
from glm3kit.setup.rank_table import (
    ascend_cards,
    check_rank_table,
    format_rank_table,
    merge_rank_tables,
    rank_table_path,
    read_rank_table,
    wait_for_rank_table,
)

TABLE = argument("path", metavar="PATH", nargs="?", help="default: what RANK_TABLE_FILE or ModelArts provides")


@verb("check",
      argument("config", metavar="CONFIG", nargs="?", help="a configuration file, whose files are checked too"),
      OVERRIDES,
      switch("--json", "print JSON"),
      example="check configs/tiny.yaml")
def check(args: argparse.Namespace) -> int:
    """Check whether this machine is ready."""
    checks = run_checks(config_of(args) if args.config else None)
    print(json_text([asdict(item) for item in checks]) if args.json else format_checks(checks))
    return int(any(item.state == "failed" for item in checks))


@verb("memory", *RUN, switch("--json", "print bytes as JSON"),
      example="memory configs/run_glm3_6b.yaml train.batch_size=4")
def memory(args: argparse.Namespace) -> None:
    """Estimate the memory that training needs on a device."""
    from glm3kit.setup.memory import estimate_memory, memory_table

    parts = estimate_memory(config_of(args))
    print(json_text(parts | {"sum": sum(parts.values())}) if args.json else memory_table(parts))


@verb("rank-table show", TABLE, switch("--json", 'print it as version "1.0"'),
      example="rank-table show /user/config/jobstart_hccl.json")
def rank_table_show(args: argparse.Namespace) -> None:
    """Show a rank table of any form: servers, devices, addresses, ranks."""
    from glm3kit.jobs.plan import own_addresses

    table = read_rank_table(rank_table_path(args.path))
    print(json_text(table.to_dict()) if args.json else format_rank_table(table, own_addresses()))


@verb("rank-table check", TABLE, example="rank-table check hccl.json")
def rank_table_check(args: argparse.Namespace) -> int:
    """List every fault of a rank table; exit with 1 if there is one."""
    path = rank_table_path(args.path)
    faults = check_rank_table(path)
    print("\n".join(faults) if faults else f"{path}: no fault found")
    return int(bool(faults))


@verb("rank-table wait", TABLE,
      argument("--timeout", metavar="SECONDS", type=float, default=600, help="default: 600"),
      example="rank-table wait --timeout 1800")
def rank_table_wait(args: argparse.Namespace) -> None:
    """Wait until the platform has filled the rank table."""
    table = wait_for_rank_table(args.path, args.timeout, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{table.source}: {table.rank_size} device(s) on {len(table.servers)} server(s)")


@verb("rank-table make",
      argument("--devices", metavar="RANGE", help="a half-open range such as '[0,8)'; default: all cards"),
      argument("--server-ip", metavar="ADDRESS", help="this machine's, which others reach it by; default: that of its "
                                                      "name, which does for one machine"),
      argument("-o", dest="output", metavar="FILE", help="default: hccl_8p_01234567_ADDRESS.json"),
      example="rank-table make --devices '[0,8)' --server-ip 10.0.0.1")
def rank_table_make(args: argparse.Namespace) -> None:
    """Make the rank table of this machine, with the addresses of its cards."""
    devices = parse_devices(args.devices) if args.devices else ascend_cards()
    if not devices:
        raise RankTableError("this machine shows no Ascend card (/dev/davinci*); give --devices '[0,8)'")
    table = make_rank_table(devices, args.server_ip)
    path = args.output or table_name(table)
    table.save(path)
    print(f"{path}: {table.rank_size} device(s)")
    if ip_address(table.servers[0].server_id).is_loopback:
        print("note: the server's address is a loopback one; with several machines give --server-ip", file=sys.stderr)


@verb("rank-table merge",
      argument("paths", metavar="PATH", nargs="+", help="one table a server"),
      argument("-o", dest="output", metavar="FILE", required=True, help="the merged table"),
      example="rank-table merge hccl_a.json hccl_b.json -o hccl.json")
def rank_table_merge(args: argparse.Namespace) -> None:
    """Merge the rank tables of several servers into one; ranks follow the order of the files."""
    table = merge_rank_tables([read_rank_table(path) for path in args.paths])
    table.save(args.output)
    print(f"{args.output}: {table.rank_size} devices on {len(table.servers)} servers")


VERBS = (check, memory, rank_table_show, rank_table_check, rank_table_wait, rank_table_make, rank_table_merge)
