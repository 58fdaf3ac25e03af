"""The forms that rank tables come in, each read into the same servers and devices; every fault of a table is collected.

- Version "1.0": HCCL's own form (CANN documentation, "Rank Table Configuration").
- Group form: what ModelArts leaves in training jobs; no rank ids.
- Lab form: the group form of older tools, one instance a device (`para_plane_nic_*`).
- Versions "1.1" and "1.2": super pods (Atlas A3), version "1.0" with `super_device_id` and `super_pod_list`.
- Version "2.0": a plain list of ranks (Ascend 950); its addresses stand by network level.

    servers, faults = read_form(json.loads(text))
"""

import ipaddress
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SUPER_PODS = ("1.1", "1.2")


@dataclass(frozen=True)
class Device:
    """One card: its number on the server, the address of its own network port ("" if it has none), its rank."""

    device_id: str
    device_ip: str
    rank_id: str


@dataclass(frozen=True)
class Server:
    """One machine and its cards; `host_nic_ip` is what hccl_tools writes there ("reserve"), kept as read.

    host_ip: the machine's own address, where server_id is another name of it.
    """

    server_id: str
    devices: tuple[Device, ...]
    host_nic_ip: str | None = None
    host_ip: str | None = None


@dataclass
class Reading:
    """A table while it is read. A value that cannot be used is None and a fault, so that reading goes on."""

    servers: list[Server] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def fault(self, where: str, what: str) -> None:
        self.faults.append(f"{where}: {what}" if where else what)

    def text(self, holder: dict, key: str, where: str) -> str | None:
        """A value that the forms write as a string; a whole number is accepted too."""
        value = holder.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value:
            return value
        found = f"is {json.dumps(value)[:60]}" if key in holder else "is missing"
        self.fault(where, f'{key} {found}; expected a string such as "0"')
        return None

    def number(self, holder: dict, key: str, where: str) -> int | None:
        value = self.text(holder, key, where)
        if value is None or re.fullmatch(r"[0-9]{1,9}", value):
            return None if value is None else int(value)
        self.fault(where, f'{key} is "{value[:60]}"; expected a number such as "0"')
        return None

    def objects(self, holder: dict, key: str, where: str = "") -> list[tuple[str, dict]]:
        """The objects of a list, each with its place in the table."""
        value = holder.get(key)
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return [(f"{where}.{key}[{n}]".lstrip("."), item) for n, item in enumerate(value)]
        found = "no such key" if key not in holder else f"got {json.dumps(value)[:60]}"
        self.fault(where, f"{found}; expected {key} to be a list of objects")
        return []

    def compare(self, holder: dict, where: str = "", **listed: int) -> None:
        """Compare counts that the table gives, such as device_count, with what it lists."""
        for key, found in listed.items():
            if key in holder and self.number(holder, key, where) not in (None, found):
                self.fault(where, f"{key} says {holder[key]}, but {found} {key.split('_')[0]}(s) are listed; "
                                  "the table is unfinished or was cut: make it again")

    def device(self, entry: dict, rank: int | None, where: str) -> list[Device]:
        """The device of an entry, or none if it cannot be used."""
        number = self.number(entry, "device_id", where)
        address = str(entry.get("device_ip", ""))
        if address and not is_address(address):
            self.fault(where, f"device_ip is '{address[:60]}'; expected an address such as 192.1.27.6")
            address = None
        return [] if None in (number, address, rank) else [Device(str(number), address, str(rank))]

    def add(self, server_id: str | None, devices: list[Device], **more: str | None) -> None:
        if server_id is not None:
            self.servers.append(Server(server_id, tuple(devices), **more))

    def add_by_server(self, rows: Iterable[tuple[str | None, list[Device]]]) -> int:
        """Gather the devices of rows by server, in the order in which the servers come; returns how many there are."""
        servers: dict[str | None, list[Device]] = {}
        for server_id, devices in rows:
            servers.setdefault(server_id, []).extend(devices)
        for server_id, devices in servers.items():
            self.add(server_id, devices)
        return len(servers)


def is_address(text: str) -> bool:
    """Whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _from_server_list(reading: Reading, content: dict) -> None:
    """Version "1.0", and "1.1" and "1.2" with what super pods add."""
    entries = reading.objects(content, "server_list")
    for where, entry in entries:
        devices = []
        for spot, device in reading.objects(entry, "device", where):
            devices += reading.device(device, reading.number(device, "rank_id", spot), spot)
            if content["version"] in SUPER_PODS:
                reading.text(device, "super_device_id", spot)
        more = {key: reading.text(entry, key, where) for key in ("host_nic_ip", "host_ip") if key in entry}
        reading.add(reading.text(entry, "server_id", where), devices, **more)
    reading.compare(content, server_count=len(entries))
    if content["version"] == "1.2" or "super_pod_list" in content:
        _check_super_pods(reading, content)


def _check_super_pods(reading: Reading, content: dict) -> None:
    """Every server stands in one super pod."""
    placed: list[str | None] = []
    for where, pod in reading.objects(content, "super_pod_list"):
        reading.text(pod, "super_pod_id", where)
        placed += [reading.text(server, "server_id", spot)
                   for spot, server in reading.objects(pod, "server_list", where)]
    servers = [server.server_id for server in reading.servers]
    for name in dict.fromkeys([*servers, *filter(None, placed)]):
        if placed.count(name) != 1 or name not in servers:
            reading.fault("super_pod_list", f"has server {name} {placed.count(name)} time(s), server_list "
                                            f"{servers.count(name)} time(s); expected each server once in both")


def _pod_number(reading: Reading, instance: dict, where: str) -> int:
    """The number that ends `pod_name`, in whose order ModelArts counts its nodes; -1, and a fault, for none."""
    name = reading.text(instance, "pod_name", where)
    digits = re.search(r"[0-9]{1,18}$", name or "")
    if name is not None and not digits:
        reading.fault(where, f'pod_name "{name[:60]}" ends in no number; expected one, it decides the order of the '
                             "servers")
    return int(digits[0]) if digits else -1


def _from_groups(reading: Reading, content: dict) -> None:
    """The group form: ranks are counted on across the pods."""
    rank = 0
    for where, group in reading.objects(content, "group_list"):
        instances, first = reading.objects(group, "instance_list", where), rank
        if len(instances) > 1:
            numbers = {place: _pod_number(reading, instance, place) for place, instance in instances}
            if len({*numbers.values()}) < len(numbers) and -1 not in numbers.values():
                reading.fault(where, f"pod_names end in {', '.join(map(str, numbers.values()))}; expected different "
                                     "numbers, they decide the order of the servers")
            instances.sort(key=lambda item, numbers=numbers: numbers[item[0]])
        for spot, instance in instances:
            devices = []
            for place, entry in reading.objects(instance, "devices", spot):
                devices += reading.device(entry, rank, place)
                rank += 1
            if instance.get("devices"):  # an instance without cards trains nothing
                reading.add(reading.text(instance, "server_id", spot), devices)
        reading.compare(group, where, instance_count=len(instances), device_count=rank - first)


def _from_lab(reading: Reading, content: dict) -> None:
    """The lab form: an instance is a device with its rank; those of one server_id make a server."""
    for where, group in reading.objects(content, "group_list"):
        instances, rows = reading.objects(group, "instance_list", where), []
        for spot, instance in instances:
            rank, server_id = reading.number(instance, "rank_id", spot), reading.text(instance, "server_id", spot)
            entries = reading.objects(instance, "devices", spot)
            if len(entries) != 1:
                reading.fault(spot, f"has {len(entries)} devices; expected one, that of rank_id {rank}")
            rows += [(server_id, reading.device(entry, rank, place)) for place, entry in entries]
        reading.compare(group, where, instance_count=len(instances), device_num=len(rows),
                        server_num=reading.add_by_server(rows))


def _from_rank_list(reading: Reading, content: dict) -> None:
    """Version "2.0": the instance of network level 0 is the server, the first address there the device's."""
    entries, rows = reading.objects(content, "rank_list"), []
    for where, entry in entries:
        rank = reading.number(entry, "rank_id", where)
        spot, level = next(iter(reading.objects(entry, "level_list", where)), (where, {}))
        if not level or reading.number(level, "net_layer", spot) != 0:
            reading.fault(where, "level_list does not begin with net_layer 0; expected it, its net_instance_id is "
                                 "the server")
            continue
        server_id, address = reading.text(level, "net_instance_id", spot), ""
        for place, first in reading.objects(level, "rank_addr_list", spot)[:1]:
            address = reading.text(first, "addr", place) or ""
        if re.fullmatch(r"[0-9a-fA-F]{32}", address):  # an EID is 128 bits in hexadecimal digits
            address = str(ipaddress.IPv6Address(int(address, 16)))
        rows.append((server_id, reading.device(entry | {"device_ip": address}, rank, where)))
    reading.add_by_server(rows)
    reading.compare(content, rank_count=len(entries))


def read_form(content: dict) -> tuple[list[Server], list[str]]:
    """Read a parsed table of any form -> its servers, as far as they can be read, and every fault."""
    reading = Reading()
    version, status = content.get("version"), content.get("status")
    # One component of ModelArts writes the shorter word; version "2.0" need not say it.
    if status not in ("completed", "complete") and not (status is None and version == "2.0"):
        reading.fault("", f'status is {json.dumps(status)[:60]}; expected "completed"')
    if "group_list" in content:
        lab = content.get("deploy_mode") == "lab" or "para_plane_nic_num" in content
        read = _from_lab if lab else _from_groups
        read(reading, content)
    elif version in ("1.0", *SUPER_PODS):
        _from_server_list(reading, content)
    elif version == "2.0":
        _from_rank_list(reading, content)
    else:
        form = f"version {json.dumps(version)[:60]}" if version is not None else (
            f"no version, keys {', '.join(map(str, content)) or 'none'}")
        reading.fault("", f'is of {form}; the forms read are version "1.0", "1.1", "1.2" (server_list), "2.0" '
                          "(rank_list), and the group and lab forms (group_list)")
    faults = reading.faults + conflicts(reading.servers, whole=not reading.faults)
    return reading.servers, list(dict.fromkeys(faults))


def conflicts(servers: Sequence[Server], whole: bool = True) -> list[str]:
    """What servers that each can be read are in conflict about; [] for a table that can be used.

    whole: whether nothing is known to be missing: then ranks without a gap are expected.
    """
    marks = []  # what may stand once
    faults, ranks = [], []
    for server in servers:
        marks.append(f"server_id {server.server_id}")
        for device in server.devices:
            spot = f"device {device.device_id} of server {server.server_id}"
            marks += [spot, f"rank_id {device.rank_id}"]
            ranks.append(int(device.rank_id))
            if device.device_ip:
                marks.append(f"device_ip {device.device_ip}")
            elif len(servers) > 1:
                faults.append(f"{spot} has no device_ip; between servers every device needs one: "
                              f"`hccn_tool -i {device.device_id} -ip -g` shows it")
    twice = [mark for mark, count in Counter(marks).items() if count > 1]
    faults += [f"{mark} stands twice, expected once; make the table again" for mark in twice]
    if not ranks and whole:
        faults.append("lists no device; expected at least one")
    if whole and not twice and sorted(ranks) != list(range(len(ranks))):
        faults.append(f"the rank_ids are {', '.join(map(str, sorted(ranks)))}; "
                      f"expected each of 0 to {len(ranks) - 1} once")
    return faults
