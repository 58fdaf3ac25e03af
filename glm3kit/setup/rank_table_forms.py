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
from collections.abc import Callable, Iterable
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


class Unfinished(Exception):
    """The table says that it is still being filled."""


@dataclass
class Reading:
    """A table while it is read. A value that cannot be used is None and a fault, so that reading goes on."""

    servers: list[Server] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def fault(self, where: str, what: str) -> None:
        self.faults.append(f"{where}: {what}" if where else what)

    def text(self, holder: dict, key: str, where: str, default: str | None = None) -> str | None:
        """A value that the forms write as a string; a whole number is accepted too."""
        value = holder.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and (value or default is not None):
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

    def objects(self, holder: dict, key: str, where: str) -> list[dict]:
        value = holder.get(key)
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return value
        found = "no such key" if key not in holder else f"got {json.dumps(value)[:60]}"
        self.fault(where, f"{found}; expected {key} to be a list of objects")
        return []

    def count(self, holder: dict, key: str, found: int, what: str, where: str) -> None:
        """Compare a count that the table gives with what it lists."""
        if key in holder and self.number(holder, key, where) not in (None, found):
            self.fault(where, f"{key} says {holder[key]}, but {found} {what} listed; "
                              "the table is unfinished or was cut: make it again")

    def device(self, entry: dict, rank: int | None, where: str) -> list[Device]:
        """The device of an entry, or none if it cannot be used."""
        number = self.number(entry, "device_id", where)
        address = self.text(entry, "device_ip", where, default="")
        if address and not is_address(address):
            self.fault(where, f"device_ip is '{address[:60]}'; expected an address such as 192.1.27.6")
            address = None
        return [] if None in (number, address, rank) else [Device(str(number), address, str(rank))]

    def add(self, server_id: str | None, devices: list[Device], **more: str | None) -> None:
        if server_id is not None:
            self.servers.append(Server(server_id, tuple(devices), **more))


def is_address(text: str) -> bool:
    """Whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _from_server_list(reading: Reading, content: dict) -> None:
    """Version "1.0", and "1.1" and "1.2" with what super pods add."""
    pods = content["version"] in SUPER_PODS
    entries = reading.objects(content, "server_list", "")
    for number, entry in enumerate(entries):
        where = f"server_list[{number}]"
        devices = []
        for n, device in enumerate(reading.objects(entry, "device", where)):
            spot = f"{where}.device[{n}]"
            devices += reading.device(device, reading.number(device, "rank_id", spot), spot)
            if pods:
                reading.text(device, "super_device_id", spot)
        more = {key: reading.text(entry, key, where) for key in ("host_nic_ip", "host_ip") if key in entry}
        reading.add(reading.text(entry, "server_id", where), devices, **more)
    reading.count(content, "server_count", len(entries), "server(s) are", "")
    if content["version"] == "1.2" or "super_pod_list" in content:
        _check_super_pods(reading, content)


def _check_super_pods(reading: Reading, content: dict) -> None:
    """Every server stands in one super pod."""
    placed: list[str | None] = []
    for number, pod in enumerate(reading.objects(content, "super_pod_list", "")):
        where = f"super_pod_list[{number}]"
        reading.text(pod, "super_pod_id", where)
        placed += [reading.text(server, "server_id", f"{where}.server_list[{n}]")
                   for n, server in enumerate(reading.objects(pod, "server_list", where))]
    servers = [server.server_id for server in reading.servers]
    for name in dict.fromkeys([*servers, *filter(None, placed)]):
        if placed.count(name) != 1 or name not in servers:
            reading.fault("super_pod_list", f"has server {name} {placed.count(name)} time(s), server_list "
                                            f"{servers.count(name)} time(s); expected each server once in both")


def _pods_in_order(reading: Reading, instances: list[dict], where: str) -> list[dict]:
    """Sort by the number that ends `pod_name`: that is the order in which ModelArts counts its nodes."""
    if len(instances) < 2:
        return instances
    numbers = []
    for n, instance in enumerate(instances):
        name = reading.text(instance, "pod_name", f"{where}.instance_list[{n}]")
        digits = re.search(r"[0-9]+$", name or "")
        if name is not None and not digits:
            reading.fault(f"{where}.instance_list[{n}]", f'pod_name "{name[:60]}" ends in no number; expected one, '
                                                         "it decides the order of the servers")
        numbers.append(int(digits[0]) if digits else -1)
    if -1 in numbers:
        return instances
    if len(set(numbers)) < len(numbers):
        reading.fault(where, f"pod_names end in {', '.join(map(str, numbers))}; expected different numbers, "
                             "they decide the order of the servers")
    return [instance for _, instance in sorted(zip(numbers, instances, strict=True), key=lambda pair: pair[0])]


def _from_groups(reading: Reading, content: dict) -> None:
    """The group form: ranks are counted on across the pods."""
    rank = 0
    for number, group in enumerate(reading.objects(content, "group_list", "")):
        where = f"group_list[{number}]"
        instances = reading.objects(group, "instance_list", where)
        first = rank
        for instance in _pods_in_order(reading, instances, where):
            spot = f"{where}, pod {str(instance.get('pod_name'))[:60]}"
            devices = []
            for n, entry in enumerate(reading.objects(instance, "devices", spot)):
                devices += reading.device(entry, rank, f"{spot}.devices[{n}]")
                rank += 1
            if instance.get("devices"):  # an instance without cards trains nothing
                reading.add(reading.text(instance, "server_id", spot), devices)
        reading.count(group, "instance_count", len(instances), "instance(s) are", where)
        reading.count(group, "device_count", rank - first, "device(s) are", where)


def _from_lab(reading: Reading, content: dict) -> None:
    """The lab form: an instance is a device with its rank; those of one server_id make a server."""
    for number, group in enumerate(reading.objects(content, "group_list", "")):
        where = f"group_list[{number}]"
        instances = reading.objects(group, "instance_list", where)
        rows = []
        for n, instance in enumerate(instances):
            spot = f"{where}.instance_list[{n}]"
            rank, server_id = reading.number(instance, "rank_id", spot), reading.text(instance, "server_id", spot)
            entries = reading.objects(instance, "devices", spot)
            if len(entries) != 1:
                reading.fault(spot, f"has {len(entries)} devices; expected one, that of rank_id {rank}")
            rows += [(server_id, reading.device(entry, rank, f"{spot}.devices[{i}]"))
                     for i, entry in enumerate(entries)]
        names = _by_server(reading, rows)
        reading.count(group, "instance_count", len(instances), "instance(s) are", where)
        reading.count(group, "device_num", len(rows), "device(s) are", where)
        reading.count(group, "server_num", len(names), "server(s) are", where)


def _by_server(reading: Reading, rows: Iterable[tuple[str | None, list[Device]]]) -> list[str | None]:
    """Gather the devices of rows by server, in the order in which the servers come; returns their names."""
    servers: dict[str | None, list[Device]] = {}
    for server_id, devices in rows:
        servers.setdefault(server_id, []).extend(devices)
    for server_id, devices in servers.items():
        reading.add(server_id, devices)
    return list(servers)


def _from_rank_list(reading: Reading, content: dict) -> None:
    """Version "2.0": the instance of network level 0 is the server, the first address there the device's."""
    entries = reading.objects(content, "rank_list", "")
    rows = []
    for number, entry in enumerate(entries):
        where = f"rank_list[{number}]"
        rank = reading.number(entry, "rank_id", where)
        levels = reading.objects(entry, "level_list", where)
        if not levels or reading.number(levels[0], "net_layer", f"{where}.level_list[0]") != 0:
            reading.fault(where, "level_list does not begin with net_layer 0; expected it, its net_instance_id is "
                                 "the server")
            continue
        spot = f"{where}.level_list[0]"
        server_id = reading.text(levels[0], "net_instance_id", spot)
        addresses = reading.objects(levels[0], "rank_addr_list", spot)
        address = reading.text(addresses[0], "addr", f"{spot}.rank_addr_list[0]") if addresses else ""
        if address and re.fullmatch(r"[0-9a-fA-F]{32}", address):  # an EID is 128 bits in hexadecimal digits
            address = str(ipaddress.IPv6Address(int(address, 16)))
        rows.append((server_id, reading.device(entry | {"device_ip": address or ""}, rank, where)))
    _by_server(reading, rows)
    reading.count(content, "rank_count", len(entries), "rank(s) are", "")


def _form(content: dict) -> tuple[str, Callable[[Reading, dict], None] | None]:
    """The name of a table's form, for messages, and what reads it."""
    if "group_list" in content:
        lab = content.get("deploy_mode") == "lab" or "para_plane_nic_num" in content
        return ("lab form", _from_lab) if lab else ("group form", _from_groups)
    version = content.get("version")
    if version is None:
        return f"no version, keys {', '.join(map(str, content)) or 'none'}", None
    known = {"1.0": _from_server_list, "2.0": _from_rank_list} | dict.fromkeys(SUPER_PODS, _from_server_list)
    return f"version {json.dumps(version)[:60]}", known.get(version) if isinstance(version, str) else None


def _check_status(reading: Reading, content: dict) -> None:
    status = content.get("status")
    if status == "initializing":
        raise Unfinished
    if status is None and content.get("version") == "2.0":  # optional there
        return
    if status not in ("completed", "complete"):  # one component of ModelArts writes the shorter word
        reading.fault("", f'status is {json.dumps(status)[:60]}; expected "completed"')


def read_form(content: dict) -> tuple[list[Server], list[str]]:
    """Read a parsed table of any form -> its servers, as far as they can be read, and every fault.

    Raises Unfinished if its status is "initializing".
    """
    reading = Reading()
    _check_status(reading, content)
    form, read = _form(content)
    if read is None:
        reading.fault("", f'is of {form}; the forms read are version "1.0", "1.1", "1.2" (server_list), "2.0" '
                          "(rank_list), and the group and lab forms (group_list)")
    else:
        read(reading, content)
    faults = reading.faults + conflicts(reading.servers, whole=not reading.faults)
    return reading.servers, list(dict.fromkeys(faults))


def conflicts(servers: Iterable[Server], whole: bool = True) -> list[str]:
    """What servers that each can be read are in conflict about; [] for a table that can be used.

    whole: whether nothing is known to be missing: then ranks without a gap are expected.
    """
    servers = list(servers)
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
