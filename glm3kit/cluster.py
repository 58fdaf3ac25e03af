"""Which of the machines of a run is this one?

    here = own_addresses()
"""

import socket

import psutil


def own_addresses() -> set[str]:
    """Every IP address of this machine's network interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {entry.address.partition("%")[0]  # IPv6 may have a zone after it
            for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in families}
