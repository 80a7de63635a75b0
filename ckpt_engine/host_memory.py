"""How much memory this host can still give, and what pins it for a device."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class HostMemoryPinner(Protocol):
    """Pins host memory: its pages stay where they are, and a device copies from and to them at full speed.

    Any thread may call it, several at a time.
    """

    def pin(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        """Pins bytes [address, address + nbytes), all of which are mapped, as one range.

        Args:
            read_only: the memory may not be written (it is mapped without PROT_WRITE).

        Raises:
            HostMemoryError, RuntimeError, OSError: it cannot be pinned, and why; it is not pinned then.
        """
        ...

    def unpin(self, address: int) -> None:
        """Ends what `pin` of the same address began; the memory is still mapped."""
        ...


def available_host_memory(proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be allocated without swapping: MemAvailable, or less where a cgroup (v2) limits it.

    What cannot be read limits nothing. Memory that other processes are about to take is not foreseen.
    """
    limits = [_cgroup_available(directory) for directory in _cgroup_directories(proc, cgroup_root)]
    limits.append(_keyed_numbers(proc / "meminfo").get("MemAvailable:", 2**63 // 1024) * 1024)
    return max(0, min(limit for limit in limits if limit is not None))


def _cgroup_directories(proc: Path, root: Path) -> list[Path]:
    """This process's cgroup and those above it: a limit of each one counts."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    inside = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    # In a container without a cgroup namespace the path is the host's, while the mount begins at ours.
    below = Path(inside)
    return [root / directory for directory in (below, *below.parents)]


def _cgroup_available(directory: Path) -> int | None:
    try:
        limit = int((directory / "memory.max").read_text())
        used = int((directory / "memory.current").read_text())
    except (OSError, ValueError):  # not there, or "max": no limit
        return None
    stat = _keyed_numbers(directory / "memory.stat")
    # `memory.current` counts the page cache, which a checkpoint just written or read may fill to the limit;
    # the kernel gives it up for anonymous memory, as MemAvailable assumes too.
    reclaimable = sum(stat.get(key, 0) for key in ("inactive_file", "active_file", "slab_reclaimable"))
    return limit - max(0, used - reclaimable)


def _keyed_numbers(path: Path) -> dict[str, int]:
    """Lines of `key number ...` as in /proc/meminfo and memory.stat; empty if unreadable."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
