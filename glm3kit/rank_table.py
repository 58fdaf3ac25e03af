"""Rank tables: which devices of which servers take part, and the rank of each.

Ascend's tools write them as JSON, all values strings. Version "1.0" is HCCL's own form (CANN documentation: "Rank
Table Configuration"); the group form is what ModelArts leaves in training jobs, without rank ids.

    table = read_rank_table(find_rank_table() or "hccl_8p_01234567_127.0.1.1.json")
"""

import dataclasses
import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glm3kit.errors import RankTableError
from glm3kit.files import atomic_write

FORMS = 'version "1.0" (server_list) and the group form of ModelArts (group_list)'
MODELARTS_FOLDER = "user/config"
MODELARTS_NAMES = ("jobstart_hccl.json", "nbstart_hccl.json")  # a training job's, a notebook's


@dataclass(frozen=True)
class Device:
    """One card: its number on the server, the address of its own network port ("" if it has none), its rank."""

    device_id: str
    device_ip: str
    rank_id: str


@dataclass(frozen=True)
class Server:
    """One machine and its cards; `host_nic_ip` is what hccl_tools writes there ("reserve"), kept as read."""

    server_id: str
    devices: tuple[Device, ...]
    host_nic_ip: str | None = None


@dataclass(frozen=True)
class RankTable:
    """Servers in the order of the file; `source` names the file in messages.

    Raises RankTableError if a server, a device or an address repeats, or if the ranks are not 0, 1, 2, ...
    """

    servers: tuple[Server, ...]
    source: str = field(default="rank table", compare=False)

    def __post_init__(self) -> None:
        if not self.devices:
            raise RankTableError(f"{self.source}: lists no device; expected at least one")
        seen = set()  # what may stand once
        for server in self.servers:
            self._once(seen, f"server_id {server.server_id}")
            for device in server.devices:
                spot = f"device {device.device_id} of server {server.server_id}"
                self._once(seen, spot)
                if device.device_ip:
                    _check_address(device.device_ip, f"{self.source}: {spot}")
                    self._once(seen, f"device_ip {device.device_ip}")
                elif len(self.servers) > 1:
                    raise RankTableError(f"{self.source}: {spot} has no device_ip; between servers every device needs "
                                         f"one: `hccn_tool -i {device.device_id} -ip -g` shows it")
        ranks = sorted(int(device.rank_id) for device in self.devices)
        if ranks != list(range(len(ranks))):
            raise RankTableError(f"{self.source}: the rank_ids are {', '.join(map(str, ranks))}; "
                                 f"expected each of 0 to {len(ranks) - 1} once")

    def _once(self, seen: set[str], what: str) -> None:
        if what in seen:
            raise RankTableError(f"{self.source}: {what} stands twice, expected once; make the table again")
        seen.add(what)

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
            if server.host_nic_ip is not None:
                entry["host_nic_ip"] = server.host_nic_ip
            servers.append(entry)
        return {"status": "completed", "version": "1.0", "server_count": str(len(servers)), "server_list": servers}

    def save(self, path: str | Path) -> None:
        """Write the table as version "1.0"."""
        atomic_write(path, json.dumps(self.to_dict(), indent=2) + "\n")


def _check_address(address: str, where: str) -> None:
    try:
        ipaddress.ip_address(address)
    except ValueError as err:
        raise RankTableError(f"{where}: device_ip is '{address}'; expected an address such as 192.1.27.6") from err


def _text(holder: dict, key: str, where: str, default: str | None = None) -> str:
    """A value that the forms write as a string; a whole number is accepted too."""
    value = holder.get(key, default)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or (value == "" and default is None):
        found = f"is {json.dumps(value)}" if key in holder else "is missing"
        raise RankTableError(f'{where}: {key} {found}; expected a string such as "0"')
    return value


def _number(holder: dict, key: str, where: str) -> int:
    value = _text(holder, key, where)
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise RankTableError(f'{where}: {key} is "{value}"; expected a number such as "0"')
    return int(value)


def _objects(holder: dict, key: str, where: str) -> list[dict]:
    value = holder.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        found = "no such key" if key not in holder else f"got {json.dumps(value)[:60]}"
        raise RankTableError(f"{where}: {found}; expected {key} to be a list of objects")
    return value


def _check_count(holder: dict, key: str, found: int, what: str, where: str) -> None:
    if key in holder and _number(holder, key, where) != found:
        raise RankTableError(f"{where}: {key} says {holder[key]}, but {found} {what} listed; "
                             "the table is unfinished or was cut: make it again")


def _device(entry: dict, rank: int, where: str) -> Device:
    return Device(str(_number(entry, "device_id", where)), _text(entry, "device_ip", where, default=""), str(rank))


def _from_version_1_0(content: dict, source: str) -> list[Server]:
    servers = []
    for number, entry in enumerate(_objects(content, "server_list", source)):
        where = f"{source}: server_list[{number}]"
        devices = tuple(_device(device, _number(device, "rank_id", f"{where}.device[{n}]"), f"{where}.device[{n}]")
                        for n, device in enumerate(_objects(entry, "device", where)))
        nic = _text(entry, "host_nic_ip", where) if "host_nic_ip" in entry else None
        servers.append(Server(_text(entry, "server_id", where), devices, nic))
    _check_count(content, "server_count", len(servers), "server(s) are", source)
    return servers


def _pods_in_order(instances: list[dict], where: str) -> list[dict]:
    """Sort by the number that ends `pod_name`: that is the order in which ModelArts counts its nodes."""
    if len(instances) < 2:
        return instances
    numbers = []
    for n, instance in enumerate(instances):
        name = _text(instance, "pod_name", f"{where}.instance_list[{n}]")
        digits = re.search(r"[0-9]+$", name)
        if not digits:
            raise RankTableError(f'{where}.instance_list[{n}]: pod_name "{name}" ends in no number; expected one, '
                                 "it decides the order of the servers")
        numbers.append(int(digits[0]))
    if len(set(numbers)) < len(numbers):
        raise RankTableError(f"{where}: pod_names end in {', '.join(map(str, numbers))}; expected different numbers, "
                             "they decide the order of the servers")
    return [instance for _, instance in sorted(zip(numbers, instances, strict=True), key=lambda pair: pair[0])]


def _from_groups(content: dict, source: str) -> list[Server]:
    servers: list[Server] = []
    rank = 0
    for number, group in enumerate(_objects(content, "group_list", source)):
        where = f"{source}: group_list[{number}]"
        instances = _objects(group, "instance_list", where)
        found = 0
        for instance in _pods_in_order(instances, where):
            spot = f"{where}, pod {instance.get('pod_name')}"
            entries = _objects(instance, "devices", spot)
            devices = tuple(_device(entry, rank + n, f"{spot}.devices[{n}]") for n, entry in enumerate(entries))
            if devices:  # an instance without cards trains nothing
                servers.append(Server(_text(instance, "server_id", spot), devices))
            rank += len(devices)
            found += len(devices)
        _check_count(group, "instance_count", len(instances), "instance(s) are", where)
        _check_count(group, "device_count", found, "device(s) are", where)
    return servers


def _form(content: dict) -> str:
    """Name the form of a table, for choosing its reader and for messages."""
    if "group_list" in content:
        lab = content.get("deploy_mode") == "lab" or "para_plane_nic_num" in content
        return "the lab form (one instance a device, para_plane_nic_*)" if lab else "group form"
    version = content.get("version")
    if version is None:
        return f"no version, keys {', '.join(map(str, content)) or 'none'}"
    names = {"1.1": ", of a super pod", "1.2": ", of super pods", "2.0": ", a plain rank_list"}
    return f'version "{version}"{names.get(str(version), "")}'


def _check_status(content: dict, source: str) -> None:
    status = content.get("status")
    if status in ("completed", "complete"):  # one component of ModelArts writes the shorter word
        return
    if status == "initializing":
        raise RankTableError(f'{source}: status is "initializing": the platform has not assigned all devices yet; '
                             'wait until status is "completed", then try again')
    raise RankTableError(f'{source}: status is {json.dumps(status)[:60]}; expected "completed"')


def _load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as err:
        raise RankTableError(f"{path}: no such file; expected a rank table, on ModelArts "
                             f"/{MODELARTS_FOLDER}/{MODELARTS_NAMES[0]}") from err
    except json.JSONDecodeError as err:
        raise RankTableError(f"{path}:{err.lineno}: is no JSON (column {err.colno}: {err.msg}); "
                             "correct that line or make the table again") from err
    except (OSError, ValueError, RecursionError) as err:  # no text, a number of 5,000 digits, 10,000 brackets
        raise RankTableError(f"{path}: cannot be read as JSON text: {err}") from err
    if not isinstance(content, dict):
        raise RankTableError(f"{path}: holds a {type(content).__name__}; expected an object with status and devices")
    return content


def read_rank_table(path: str | Path) -> RankTable:
    """Read a rank table of version "1.0" or of ModelArts' group form.

    In the group form servers follow the number that ends their pod's name and ranks are counted on across them.
    Raises RankTableError that says what is wrong and where: no file, no JSON (with the line), still initializing,
    another form (named), a server, device or address that repeats, counts that do not agree.
    Example: read_rank_table("/user/config/jobstart_hccl.json").rank_size -> 8
    """
    path = Path(path)
    source = str(path)
    content = _load(path)
    _check_status(content, source)
    form = _form(content)
    if form == "group form":
        return RankTable(tuple(_from_groups(content, source)), source)
    if form == 'version "1.0"':
        return RankTable(tuple(_from_version_1_0(content, source)), source)
    raise RankTableError(f"{source}: is {form}; the forms read are {FORMS}")


def find_rank_table(environ: Mapping[str, str] = os.environ, root: str | Path = "/") -> Path | None:
    """Where this machine's rank table is: RANK_TABLE_FILE (a file or a folder), else ModelArts' two known files.

    Returns None if there is none. Raises RankTableError if RANK_TABLE_FILE is set but leads nowhere.
    """
    folder = Path(root) / MODELARTS_FOLDER
    given = environ.get("RANK_TABLE_FILE")
    if given:
        folder = Path(given)
        if folder.is_file():
            return folder
    for name in MODELARTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    if given:
        found = f"a folder without {' or '.join(MODELARTS_NAMES)}" if folder.is_dir() else "no such file or folder"
        raise RankTableError(f"RANK_TABLE_FILE={given}: {found}; set it to the rank table, or unset it")
    return None


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
    base = ipaddress.ip_address("127.0.0.1")
    devices = tuple(Device(str(n), str(base + n), str(n)) for n in range(count))
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
            marks = [f"server_id {server.server_id}"]
            marks += [f"device_ip {device.device_ip}" for device in server.devices if device.device_ip]
            for mark in marks:
                if mark in owner:
                    raise RankTableError(f"{name}: {mark} is also in {owner[mark]}; expected every server once: "
                                         "give each file once, or regenerate with --server-ip set on each machine")
            owner |= dict.fromkeys(marks, name)
            devices = tuple(dataclasses.replace(d, rank_id=str(base + int(d.rank_id))) for d in server.devices)
            servers.append(dataclasses.replace(server, devices=devices))
        base += table.rank_size
    return RankTable(tuple(servers), "merged rank table")
