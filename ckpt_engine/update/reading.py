"""A receiver's own end of P2P, kept between updates: a store, and the host memory in which reads land.

Bytes may still arrive after a read has failed, for as long as the store lives. So reads never land in a ring,
and after one that failed the staging buffer is given up, the store closed, and only then the memory freed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ckpt_engine.checkpoint.arena import HostArena
from ckpt_engine.host_memory import HostMemoryPinner
from ckpt_engine.metadata import align_up
from ckpt_engine.transport.p2p import P2PStore


@dataclass(kw_only=True, frozen=True, slots=True, eq=False)
class Place:
    """Where one bucket lands: its address, and its bytes. `number`: in the staging buffer `of`."""

    address: int
    memory: torch.Tensor
    number: int
    of: Landing


class Landing(Protocol):
    """Registered host memory in which reads land."""

    def take(self, nbytes: int) -> Place | None:
        """A place for the next bucket; None: not before another one is given back."""
        ...

    def give_back(self, place: Place) -> None:
        """What was there has been copied. Places of another memory are ignored."""
        ...


class StagingBuffer:
    """Registered host memory for `count` buckets of at most `place_nbytes` bytes at once."""

    def __init__(self, arena: HostArena, place_nbytes: int, count: int) -> None:
        self.place_nbytes = place_nbytes
        self.count = count
        self.arena = arena
        self._free = list(range(count))

    def take(self, nbytes: int) -> Place | None:
        """A place; None: all are taken."""
        if not self._free:
            return None
        number = self._free.pop()
        start = number * self.place_nbytes
        memory = self.arena.view(start, nbytes)
        return Place(address=self.arena.address + start, memory=memory, number=number, of=self)

    def give_back(self, place: Place) -> None:
        """One that was taken here; those of another staging buffer are ignored."""
        if place.of is self:
            self._free.append(place.number)

    def reset(self) -> None:
        """All places are free."""
        self._free = list(range(self.count))

    def close(self) -> None:
        """Frees it."""
        self.arena.close()


class Reading:
    """Makes and keeps the store and the staging buffer; one update uses them at a time.

    Args:
        make_store: raises P2PUnavailable.
        pinner: pins the staging buffer, for fast copies to the device; None: it is not pinned.
        rdma_device: says through which reads come; empty: none.
        make_current: makes this rank's device the current one of the thread that reads.
    """

    def __init__(
        self,
        make_store: Callable[[], P2PStore],
        pinner: HostMemoryPinner | None,
        rdma_device: Callable[[], str] = lambda: "",
        make_current: Callable[[], object] = lambda: None,
    ) -> None:
        self.rdma_device = rdma_device
        self.make_current = make_current
        self._make_store = make_store
        self._pinner = pinner
        self._store: P2PStore | None = None
        self._staging: StagingBuffer | None = None

    def store(self) -> P2PStore:
        """Raises P2PUnavailable."""
        if self._store is None:
            self._store = self._make_store()
        return self._store

    def staging(self, nbytes: int, count: int) -> StagingBuffer:
        """`count` places of `nbytes` each, registered with the store; the kept ones, if they are that large.

        Raises:
            P2PUnavailable, HostMemoryError: it cannot be had.
        """
        nbytes = align_up(max(nbytes, 1))
        kept = self._staging
        if kept is not None and kept.place_nbytes >= nbytes and kept.count >= count:
            kept.reset()
            return kept
        store = self.store()
        if kept is not None:
            self._staging = None
            store.unregister(kept.arena.address)
            kept.close()
        arena = HostArena(nbytes * count)
        try:
            arena.populate()
            arena.populated = True
            if self._pinner is not None:
                arena.pin(self._pinner)
            store.register(arena.address, arena.nbytes)
        except BaseException:
            arena.close()
            raise
        self._staging = StagingBuffer(arena, nbytes, count)
        return self._staging

    def unregister(self, address: int) -> None:
        """Memory at which reads landed that is not the staging buffer."""
        if self._store is not None:
            self._store.unregister(address)

    def give_up(self) -> StagingBuffer | None:
        """After a failed read: closes the store, so that no byte of it comes any more. The staging buffer is
        forgotten; whoever knows that nobody copies from it either closes it."""
        store, self._store = self._store, None
        staging, self._staging = self._staging, None
        if store is not None:
            store.close()
        return staging

    def close(self) -> None:
        """Closes the store, then frees the memory. Idempotent."""
        staging = self.give_up()
        if staging is not None:
            staging.close()
