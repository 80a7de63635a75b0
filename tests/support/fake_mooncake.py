"""A stand-in for mooncake's TransferEngine, in the memory of this process, which fails as the real one does.

What the real one was seen to do, and this one does too: a peer that is gone, or memory that is not
registered there, is status -1; a transfer from a peer that is stopped fails when its time is over, and its
bytes may come later, until the engine is gone; registering twice is -7; an id that has ended is not asked
again. What an RDMA device's driver does beside that: it registers only pages that this process may write.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path


class FakeNetwork:
    """The engines that reach each other. `looks`: how often a transfer is still under way when asked."""

    def __init__(self, looks: int = 1) -> None:
        self.looks = looks
        self.engines: dict[str, FakeEngine] = {}

    def engine(self, address: str, *, rdma: bool = False) -> FakeEngine:
        made = self.engines[address] = FakeEngine(self, rdma=rdma)
        return made


class FakeEngine:
    def __init__(self, network: FakeNetwork, *, rdma: bool = False) -> None:
        self.network = network
        self.rdma = rdma
        self.alive = True
        self.stopped = False
        self.registered: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self._transfers: dict[int, tuple[str, int, int, int]] = {}
        self._late: list[tuple[int, int, int]] = []
        self._next = 1

    def batch_register_memory(self, addresses: Sequence[int], sizes: Sequence[int]) -> int:
        for address, nbytes in zip(addresses, sizes, strict=True):
            if any(
                address < start + size and start < address + nbytes for start, size in self.registered.items()
            ):
                return -7
            if self.rdma and not is_writable(address, nbytes):
                return -1
            self.registered[address] = nbytes
        return 0

    def batch_unregister_memory(self, addresses: Sequence[int]) -> int:
        return 0 if all(self.registered.pop(address, None) is not None for address in addresses) else -3

    def batch_transfer_async_read(
        self, peer: str, local: Sequence[int], remote: Sequence[int], sizes: Sequence[int]
    ) -> int:
        (here,), (there,), (nbytes,) = local, remote, sizes
        other = self.network.engines.get(peer)
        if other is None or not other.alive:
            return 0
        number, self._next = self._next, self._next + 1
        self._transfers[number] = (peer, here, there, nbytes)
        self._waiting[number] = self.network.looks
        return number

    def transfer_check_status(self, number: int) -> int:
        peer, here, there, nbytes = self._transfers[number]  # KeyError: it was asked after its end
        if self._waiting[number]:
            self._waiting[number] -= 1
            return 0
        del self._transfers[number], self._waiting[number]
        other = self.network.engines[peer]
        if other.stopped:
            self._late.append((here, there, nbytes))
            return -1
        if not other.alive or not other.holds(there, nbytes):
            return -1
        ctypes.memmove(here, there, nbytes)
        return 1

    def holds(self, address: int, nbytes: int) -> bool:
        return any(
            start <= address and address + nbytes <= start + size for start, size in self.registered.items()
        )

    def bytes_come_late(self) -> int:
        """Those of transfers that had failed; how many transfers."""
        late, self._late = self._late, []
        for here, there, nbytes in late:
            ctypes.memmove(here, there, nbytes)
        return len(late)


def is_writable(address: int, nbytes: int) -> bool:
    """Whether this process may write all pages of the range, by the kernel's list of them."""
    writable = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _ = line.split(maxsplit=2)
        if "w" in permissions:
            begin, end = (int(part, 16) for part in span.split("-"))
            writable.append((begin, end))
    at = address
    for begin, end in writable:  # in ascending order
        if begin <= at < end:
            at = end
    return at >= address + nbytes
