"""Make the rank table of a bare machine: its cards, and the address of each card's network port.

Addresses come from `hccn_tool -i N -ip -g` (Ascend's driver package), else from /etc/hccn.conf (lines such as
`address_0=192.168.0.1`), as MindFormers' hccl_tools.py takes them.

    make_rank_table(parse_devices("[0,8)"), server_ip="10.0.0.1").save("hccl_8p_01234567_10.0.0.1.json")
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from glm3kit.errors import RankTableError
from glm3kit.setup.rank_table import RankTable
from glm3kit.setup.rank_table_forms import Device, Server, is_address


def parse_devices(text: str) -> list[int]:
    """Read a half-open range of device ids: "[0,8)" -> 0 to 7.

    Raises RankTableError for anything else; for "[0,8]" it says which of its two readings to write.
    """
    found = re.fullmatch(r"\s*\[\s*([0-9]{1,3})\s*,\s*([0-9]{1,3})\s*([)\]])\s*", text)
    if not found:
        raise RankTableError(f"devices '{text}': expected a half-open range such as '[0,8)', the devices 0 to 7 "
                             "(in quotes: a shell reads brackets)")
    first, end = int(found[1]), int(found[2])
    if found[3] == "]":
        raise RankTableError(f"devices '{text}': ends in ']', which would include device {end}; ranges are half-open: "
                             f"write '[{first},{end})' for the devices {first} to {end - 1}, or '[{first},{end + 1})' "
                             f"for {first} to {end}")
    if first >= end:
        raise RankTableError(f"devices '{text}': holds no device; expected the first below the end, such as '[0,8)'")
    return list(range(first, end))


def _ask_tool(tool: str, device: int) -> str:
    """The address that hccn_tool prints ("ipaddr:192.168.0.1"); raises RankTableError where it prints none."""
    try:
        done = subprocess.run([tool, "-i", str(device), "-ip", "-g"], capture_output=True, text=True, errors="replace",
                              timeout=30, stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise RankTableError(f"{tool} -i {device} -ip -g: {err}") from err
    found = re.search(r"ipaddr:\s*([0-9a-fA-F.:]+)", done.stdout)
    if done.returncode or not found:
        said = (done.stdout + done.stderr).strip()[-200:] or "nothing"
        raise RankTableError(f"{tool} -i {device} -ip -g: ended with {done.returncode} and printed {said}; "
                             "expected a line such as 'ipaddr:192.168.0.1'")
    return found[1]


def device_addresses(devices: Sequence[int], environ: Mapping[str, str] = os.environ,
                     root: str | Path = "/") -> dict[int, str]:
    """The network address of each device, from hccn_tool where there is one, else from /etc/hccn.conf.

    Raises RankTableError that names what was tried and the devices without an address.
    """
    folder = Path(root) / "usr/local/Ascend/driver/tools"  # where the driver puts it, off most people's PATH
    refused = f"hccn_tool: not found on PATH or in {folder}"
    if tool := shutil.which("hccn_tool", path=f"{environ.get('PATH', os.defpath)}{os.pathsep}{folder}"):
        try:
            return {device: _ask_tool(tool, device) for device in devices}
        except RankTableError as err:  # in a container it may be refused what a file tells
            refused = str(err)
    config = Path(root) / "etc/hccn.conf"
    try:
        text = config.read_text(encoding="utf-8", errors="replace")
    except OSError as err:
        raise RankTableError(f"the addresses of the devices are not to be found.\n{refused}\n{config}: {err.strerror}\n"
                             "Run this on the machine with the cards, outside of containers, as root") from err
    found = {int(number): address for number, address in re.findall(r"(?m)^\s*address_([0-9]+)\s*=\s*(\S+)", text)}
    if missing := [device for device in devices if not is_address(found.get(device, ""))]:
        has = ", ".join(f"address_{number}={address}" for number, address in sorted(found.items())) or "no address_N"
        raise RankTableError(f"{config}: no address for device(s) {', '.join(map(str, missing))}; it has {has}; "
                             "ask for other devices, or set the addresses with `hccn_tool -i N -ip -s`")
    return {device: found[device] for device in devices}


def make_rank_table(devices: Sequence[int], server_ip: str | None = None, environ: Mapping[str, str] = os.environ,
                    root: str | Path = "/") -> RankTable:
    """The rank table of this machine for some of its devices, ranks in their order.

    server_ip: this machine's address on the network between the machines; default: that of its name, as hccl_tools.py
        takes it. Tables that will be merged need it: names often have the same loopback address on every machine.
    Raises RankTableError if a device has no address.
    """
    if server_ip is not None and not is_address(server_ip):
        raise RankTableError(f"--server-ip {server_ip}: is no address; expected one such as 10.0.0.1")
    try:
        server_ip = server_ip or socket.gethostbyname(socket.gethostname())
    except OSError as err:
        raise RankTableError(f"this machine's name {socket.gethostname()} has no address ({err}); "
                             "give --server-ip") from err
    addresses = device_addresses(devices, environ, root)
    cards = tuple(Device(str(device), addresses[device], str(rank)) for rank, device in enumerate(devices))
    return RankTable((Server(server_ip, cards, host_nic_ip="reserve"),), "this machine")


def table_name(table: RankTable) -> str:
    """The file name that hccl_tools.py gives: hccl_8p_01234567_127.0.1.1.json."""
    (server,) = table.servers
    digits = "".join(device.device_id for device in server.devices)
    return f"hccl_{table.rank_size}p_{digits}_{server.server_id}.json"
