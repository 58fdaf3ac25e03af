"""Rank tables: which devices of which servers take part, and the rank of each; finding, reading and merging them.

Ascend's tools write them as JSON; the forms are in rank_table_forms.py, making one on a bare machine in hccn.py.

    table = read_rank_table(find_rank_table() or "hccl_8p_01234567_127.0.1.1.json")
"""

import dataclasses
import ipaddress
import json
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glm3kit.errors import RankTableError
from glm3kit.files import atomic_write
from glm3kit.setup.rank_table_forms import Device, Server, conflicts, read_form

MODELARTS_FOLDER = "user/config"
MODELARTS_NAMES = ("jobstart_hccl.json", "nbstart_hccl.json")  # a training job's, a notebook's
SHOWN_FAULTS = 8  # in the message of an error


class UnfinishedTableError(RankTableError):
    """A rank table that waiting may make whole: not there yet, cut in the middle, or "initializing"."""


@dataclass(frozen=True)
class RankTable:
    """Servers in the order of the file; `source` names the file in messages.

    Raises RankTableError if a server, a device or an address repeats, or if the ranks are not 0, 1, 2, ...
    """

    servers: tuple[Server, ...]
    source: str = field(default="rank table", compare=False)

    def __post_init__(self) -> None:
        _refuse(self.source, conflicts(self.servers))

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices in the order of their ranks."""
        return tuple(sorted((device for server in self.servers for device in server.devices),
                            key=lambda device: int(device.rank_id)))

    @property
    def rank_size(self) -> int:
        """Number of devices, which is the number of ranks."""
        return sum(len(server.devices) for server in self.servers)

    def first(self, count: int) -> "RankTable":
        """The table of the first `count` ranks.

        Raises RankTableError with both numbers if there are fewer.
        """
        if self.rank_size < count:
            raise RankTableError(f"{self.source}: lists {self.rank_size} device(s), but {count} are asked for "
                                 "(data_parallel x tensor_parallel); ask for fewer or give the table of more devices")
        cut = (dataclasses.replace(server, devices=tuple(d for d in server.devices if int(d.rank_id) < count))
               for server in self.servers)
        return RankTable(tuple(server for server in cut if server.devices), self.source)

    def to_dict(self) -> dict:
        """The table as version "1.0", every value a string."""
        servers = []
        for server in self.servers:
            entry: dict = {"server_id": server.server_id, "device": [vars(device).copy() for device in server.devices]}
            entry |= {key: value for key in ("host_nic_ip", "host_ip") if (value := getattr(server, key)) is not None}
            servers.append(entry)
        return {"status": "completed", "version": "1.0", "server_count": str(len(servers)), "server_list": servers}

    def save(self, path: str | Path) -> None:
        """Write the table as version "1.0"."""
        atomic_write(path, json.dumps(self.to_dict(), indent=2) + "\n")


def _refuse(source: str, faults: Sequence[str]) -> None:
    """Raise RankTableError with the first faults, if there are any."""
    lines = [f"{source}: {fault}" for fault in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        lines.append(f"{source}: {len(faults) - SHOWN_FAULTS} more faults; "
                     f"`glm3kit rank-table check {source}` lists them all")
    if lines:
        raise RankTableError("\n".join(lines))


def _load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as err:
        raise UnfinishedTableError(f"{path}: no such file; expected a rank table, on ModelArts "
                                   f"/{MODELARTS_FOLDER}/{MODELARTS_NAMES[0]}") from err
    except json.JSONDecodeError as err:
        raise UnfinishedTableError(f"{path}:{err.lineno}: is no JSON (column {err.colno}: {err.msg}); "
                                   "correct that line or make the table again") from err
    except (OSError, ValueError, RecursionError) as err:  # no text, a number of 5,000 digits, 10,000 brackets
        raise RankTableError(f"{path}: cannot be read as JSON text: {err}") from err
    if not isinstance(content, dict):
        raise RankTableError(f"{path}: holds a {type(content).__name__}; expected an object with status and devices")
    if content.get("status") == "initializing":
        raise UnfinishedTableError(f'{path}: status is "initializing": the platform has not assigned all devices yet; '
                                   'wait until status is "completed" (`glm3kit rank-table wait`), then try again')
    return content


def read_rank_table(path: str | Path) -> RankTable:
    """Read a rank table of any form: version "1.0", "1.1", "1.2" or "2.0", or the group or lab form.

    In the group form servers follow the number that ends their pod's name and ranks are counted on across them.
    Raises RankTableError that says what is wrong and where: no file, no JSON (with the line), still initializing,
    another form (named), a server, device or address that repeats, counts that do not agree.
    Example: read_rank_table("/user/config/jobstart_hccl.json").rank_size -> 8
    """
    servers, faults = read_form(_load(Path(path)))
    _refuse(str(path), faults)
    return RankTable(tuple(servers), str(path))


def check_rank_table(path: str | Path) -> list[str]:
    """Every fault of a rank table; [] for one that can be used."""
    try:
        return read_form(_load(Path(path)))[1]
    except RankTableError as err:
        return [str(err).removeprefix(f"{path}: ")]


def format_rank_table(table: RankTable, own_addresses: Collection[str] = ()) -> str:
    """A table as plain text: its servers, and rank, number and address of every device.

    own_addresses: of this machine, to mark it among the servers.
    """
    lines = [f"{table.source}: {table.rank_size} device(s) on {len(table.servers)} server(s)"]
    for server in table.servers:
        here = " (this machine)" if {server.server_id, server.host_ip} & set(own_addresses) else ""
        name = server.server_id + (f", host {server.host_ip}" if server.host_ip else "")
        lines += ["", f"server {name}{here}: {len(server.devices)} device(s)", "  rank  device  address"]
        lines += [f"{device.rank_id:>6}  {device.device_id:>6}  {device.device_ip or '-'}"
                  for device in sorted(server.devices, key=lambda device: int(device.rank_id))]
    return "\n".join(lines)


def find_rank_table(environ: Mapping[str, str] = os.environ, root: str | Path = "/") -> Path | None:
    """Where this machine's rank table is: RANK_TABLE_FILE (a file or a folder), else ModelArts' two known files.

    Returns None if there is none. Raises RankTableError if RANK_TABLE_FILE is set but leads nowhere.
    """
    given = environ.get("RANK_TABLE_FILE")
    folder = Path(given) if given else Path(root) / MODELARTS_FOLDER
    for path in (folder, *(folder / name for name in MODELARTS_NAMES)):
        if path.is_file():
            return path
    if given:
        found = f"a folder without {' or '.join(MODELARTS_NAMES)}" if folder.is_dir() else "no such file or folder"
        raise UnfinishedTableError(f"RANK_TABLE_FILE={given}: {found}; set it to the rank table, or unset it")
    return None


def rank_table_path(path: str | Path | None = None, environ: Mapping[str, str] = os.environ,
                    root: str | Path = "/") -> str | Path:
    """The path that was given, else where this machine has its table; raises UnfinishedTableError if it has none."""
    found = path or find_rank_table(environ, root)
    if found is None:
        raise UnfinishedTableError(f"no rank table: RANK_TABLE_FILE is not set and {Path(root) / MODELARTS_FOLDER} "
                                   "holds none; give its path")
    return found


def wait_for_rank_table(path: str | Path | None = None, timeout_s: float = 600,
                        say: Callable[[str], None] = print, environ: Mapping[str, str] = os.environ,
                        root: str | Path = "/", poll_s: float = 2) -> RankTable:
    """Read the rank table as soon as it is complete; a table that is complete already is returned at once.

    path: the file; by default where the platform puts it. say: is told what is being waited for, whenever that changes.
    A table that had to be waited for must read the same twice, `poll_s` apart: the platform sets it back to
    "initializing" when it replaces a pod.
    Raises UnfinishedTableError if it is not complete after `timeout_s` seconds, RankTableError at once for a complete
    one with faults.
    """
    start, told, before = time.monotonic(), "", None
    while True:
        try:
            place = rank_table_path(path, environ, root)
            table = read_rank_table(place)
            if not told or table == before:
                return table
            before, what = table, f"{place}: is complete; making sure that it stays so"
        except UnfinishedTableError as err:
            if time.monotonic() - start > timeout_s:
                raise UnfinishedTableError(f"{err}\nWaited {timeout_s:g} s; is the job still being scheduled, or a pod "
                                           "pending? A longer time limit waits on") from err
            before, what = None, f"went back: a pod is being replaced. {err}" if before else str(err)
        if what != told:
            say(f"still waiting: {what}" if told else f"waiting (at most {timeout_s:g} s): {what}")
            told = what
        time.sleep(poll_s)


def ascend_cards(root: str | Path = "/") -> list[int]:
    """The Ascend cards that this machine shows: the numbers of /dev/davinci0, /dev/davinci1, ..."""
    return sorted(int(match[1]) for path in (Path(root) / "dev").glob("davinci*")
                  if (match := re.fullmatch(r"davinci([0-9]+)", path.name)))


def local_rank_table(count: int, server_id: str = "127.0.0.1") -> RankTable:
    """A table for `count` processes on this machine, with loopback addresses: for a machine without cards.

    Example: local_rank_table(2).save("rank_table.json")
    """
    if count < 1:
        raise RankTableError(f"a rank table of {count} devices was asked for; expected at least 1")
    devices = tuple(Device(str(n), str(ipaddress.ip_address("127.0.0.1") + n), str(n)) for n in range(count))
    return RankTable((Server(server_id, devices),), "local rank table")


def merge_rank_tables(tables: Sequence[RankTable]) -> RankTable:
    """Merge rank tables into one; ranks follow the order of the arguments.

    tables: parsed tables, one a server.
    Raises RankTableError if a server_id or device_ip repeats.
    Example: two tables of 8 devices -> ranks "0" to "15"
    """
    if not tables:
        raise RankTableError("no rank table to merge; give at least one")
    owner: dict[str, str] = {}  # what may stand once -> the table that has it
    servers, base = [], 0
    for number, table in enumerate(tables, start=1):
        name = f"table {number} ({table.source})"
        for server in table.servers:
            addresses = [f"device_ip {device.device_ip}" for device in server.devices if device.device_ip]
            for mark in (f"server_id {server.server_id}", *addresses):
                if owner.setdefault(mark, name) != name:
                    raise RankTableError(f"{name}: {mark} is also in {owner[mark]}; expected every server once: "
                                         "give each file once, or regenerate with --server-ip set on each machine")
            devices = tuple(dataclasses.replace(d, rank_id=str(base + int(d.rank_id))) for d in server.devices)
            servers.append(dataclasses.replace(server, devices=devices))
        base += table.rank_size
    return RankTable(tuple(servers), "merged rank table")
