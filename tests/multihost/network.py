"""Hosts that stand for machines: network namespaces on a switch, each with an address and a rate of its own.

Needs root and iproute2. What a killed run left behind, the next one removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000


def permitted() -> bool:
    """Whether this process may make a Network."""
    return os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("tc") is not None


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Network:
    """`count` hosts, from 0. Only they are on it: nothing leaves this machine."""

    def __init__(self, count: int) -> None:
        sweep()
        self._names = [f"ce-{os.getpid()}-{host}" for host in range(count)]
        self._switch = f"ce-{os.getpid()}-switch"
        try:
            ip("netns", "add", self._switch)
            ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            ip("-n", self._switch, "link", "set", "switch", "up")
            for host in range(count):
                self._join(host)
        except BaseException:
            self.close()
            raise

    def _join(self, host: int) -> None:
        name, port = self._names[host], f"port{host}"
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._switch)
        ip("-n", self._switch, "link", "set", port, "master", "switch", "up")
        ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        ip("-n", name, "addr", "add", f"{self.address6(host)}/64", "dev", "eth0", "nodad")
        ip("-n", name, "link", "set", "eth0", "up")

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def address6(self, host: int) -> str:
        return f"fd77::{host + 1}"

    def prefix(self, host: int) -> Sequence[str]:
        """What runs a command on a host; it becomes the command, with the same pid."""
        return ("ip", "netns", "exec", self._names[host])

    @contextlib.contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """Meanwhile this thread is on a host, with what it connects to and the processes that it starts."""
        with open("/proc/thread-self/ns/net") as here, open(NAMESPACES / self._names[host]) as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(here.fileno())

    def environment(self, host: int) -> dict[str, str]:
        """Of a rank there."""
        return {"GLOO_SOCKET_IFNAME": "eth0", "PS_HOST_IP": self.address(host)}

    def environment6(self, host: int) -> dict[str, str]:
        """The same over IPv6, where nothing names the host's own address: its routes do."""
        return {"GLOO_SOCKET_IFNAME": "eth0"}

    def sent_nbytes(self, host: int) -> int:
        """What it has sent to others so far, with all headers."""
        command = [*self.prefix(host), "cat", "/sys/class/net/eth0/statistics/tx_bytes"]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def slow_down(self, host: int, rate: str) -> None:
        """What it sends, to `rate`, such as 200mbit."""
        limit = ["root", "tbf", "rate", rate, "burst", "512kb", "latency", "50ms"]
        command = [*self.prefix(host), "tc", "qdisc", "replace", "dev", "eth0", *limit]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def cut(self, host: int) -> None:
        """Its cable is pulled."""
        ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def close(self) -> None:
        for name in [*self._names, self._switch]:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def sweep() -> None:
    """Removes the namespaces of runs that are gone."""
    for name in os.listdir(NAMESPACES) if NAMESPACES.exists() else ():
        found = re.fullmatch(r"ce-(\d+)-(\d+|switch)", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            ip("netns", "del", name)
