"""A pinner that pins nothing, and checks what a driver would: the range is mapped, there, not pinned yet."""

from __future__ import annotations

import ctypes
import mmap
import threading
from dataclasses import dataclass, field
from pathlib import Path

PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


@dataclass(frozen=True)
class MapsLine:
    begin: int
    end: int
    permissions: str
    path: str


def maps() -> list[MapsLine]:
    """This process's memory map."""
    lines = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, _, *path = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        lines.append(MapsLine(begin, end, permissions, path[0] if path else ""))
    return lines


def permissions_of(address: int, nbytes: int) -> set[str]:
    """What the pages of a range may be used for; fails where one is not mapped."""
    found = set()
    at = address
    for line in maps():
        if line.begin <= at < line.end:
            found.add(line.permissions)
            at = line.end
        if at >= address + nbytes:
            return found
    raise AssertionError(f"{at:#x} of [{address:#x}, {address + nbytes:#x}) is not mapped")


def missing_pages(address: int, nbytes: int) -> int:
    """Pages of the range that are not in memory."""
    begin = address - address % PAGE
    count = -(-(address + nbytes - begin) // PAGE)
    there = (ctypes.c_ubyte * count)()
    assert _libc.mincore(begin, count * PAGE, there) == 0
    return sum(not page & 1 for page in there)


@dataclass
class FakePinner:
    """`held`: address -> (nbytes, read_only) of what is pinned now; `log`: all calls that succeeded.

    The `fail_at`-th call of `pin` (from 0) raises `error`.
    """

    fail_at: int | None = None
    error: BaseException = field(default_factory=lambda: RuntimeError("CUDA error: out of memory"))
    held: dict[int, tuple[int, bool]] = field(default_factory=dict)
    log: list[tuple[str, int]] = field(default_factory=list)
    calls: int = 0
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pin(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        with self._lock:
            number, self.calls = self.calls, self.calls + 1
            if number == self.fail_at:
                raise self.error
            for other, (length, _) in self.held.items():
                if address < other + length and other < address + nbytes:
                    self.wrong.append(f"{address:#x} is pinned already")
            if missing_pages(address, nbytes):
                self.wrong.append(f"{missing_pages(address, nbytes)} pages were not populated")
            permissions = permissions_of(address, nbytes)
            if not read_only and permissions != {"rw-p"}:
                self.wrong.append(f"pinned for writing, but {permissions}")
            self.held[address] = (nbytes, read_only)
            self.log.append(("pin", address))

    def unpin(self, address: int) -> None:
        with self._lock:
            nbytes, _ = self.held.pop(address)
            permissions_of(address, nbytes)  # fails where it is unmapped
            self.log.append(("unpin", address))

    def __enter__(self) -> FakePinner:
        return self

    def __exit__(self, *_: object) -> None:
        """Everything was unpinned, and nothing was wrong."""
        assert self.wrong == []
        assert self.held == {}
