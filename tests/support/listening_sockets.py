"""Which sockets a process listens on, as the kernel tells it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

LISTENS = "0A"
ACCEPTS = 0x10000  # SO_ACCEPTCON, in the flags of /proc/net/unix


class Doors(NamedTuple):
    """`paths`: of Unix sockets, abstract ones with @ in front. `ports`: of TCP, IPv4 and IPv6."""

    paths: list[str]
    ports: list[int]


def doors_of(pid: int) -> Doors:
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
            if link.startswith("socket:["):
                inodes.add(link[8:-1])
    paths, ports = [], []
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[6] in inodes and int(fields[3], 16) & ACCEPTS:
            paths.append(fields[7])
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and fields[9] in inodes:
                ports.append(int(fields[1].rpartition(":")[2], 16))
    return Doors(sorted(paths), sorted(ports))
