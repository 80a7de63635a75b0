"""Which NUMA node of the host a device hangs on, and which of its CPUs this process may use.

Memory that is first touched by a CPU lies on that CPU's node. Where the device's copies have to pass from one
node to the other, they are slower, and they share that way with everything else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")


@dataclass(frozen=True, slots=True)
class NumaPlace:
    """`cpus`: those of the node that this process is allowed; maybe none."""

    node: int
    cpus: frozenset[int]

    def __str__(self) -> str:
        return f"NUMA node {self.node}, of whose CPUs {len(self.cpus)} are allowed here"


def numa_place(
    pci_address: str, sysfs: Path = SYSFS, allowed: frozenset[int] | None = None
) -> NumaPlace | None:
    """Where the device at `pci_address` ("0000:1b:00.0") is; None on hosts of one node, or where unknown.

    Args:
        allowed: the CPUs that this process may use; by default asked of the system, which knows of
            containers' limits.
    """
    nodes = parse_list(_text(sysfs / "devices/system/node/online"))
    node = _text(sysfs / "bus/pci/devices" / pci_address.lower() / "numa_node")
    if len(nodes) < 2 or not node.isdigit():  # -1: the firmware does not say
        return None
    if allowed is None:
        allowed = frozenset(os.sched_getaffinity(0))
    cpus = parse_list(_text(sysfs / f"devices/system/node/node{node}/cpulist"))
    return NumaPlace(int(node), cpus & allowed)


def parse_list(text: str) -> frozenset[int]:
    """Numbers as the kernel lists them, such as "0-3,8"; empty where it is no such list."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return frozenset()
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # not there, or not shown in this container
        return ""
