"""What a joiner keeps of the weights that it reads: host memory that others read from, bucket by bucket.

Reads land where the bytes are to stay: in an arena with a place for each bucket of this receiver. It is
offered to others before the first byte is there; they may read as many of its host buffers as have come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckpt_engine.checkpoint import HostCheckpoint
from ckpt_engine.checkpoint.arena import HostArena
from ckpt_engine.host_memory import HostMemoryPinner
from ckpt_engine.metadata import RankMetas
from ckpt_engine.planning.kept import KeptLayout
from ckpt_engine.planning.plan import PlannedBucket
from ckpt_engine.planning.sources import Sources
from ckpt_engine.update.p2p_ends import P2PEnds
from ckpt_engine.update.reading import Place
from ckpt_engine.update.serving import Serving


@dataclass(kw_only=True, frozen=True)
class Keeping:
    """How a rank offers what it keeps. `promise`: lets others wait for a share; its metas."""

    ends: P2PEnds
    promise: Callable[[HostCheckpoint], RankMetas]


class KeptShare:
    """One receiver's, of one update: `checkpoint` is complete once all of `items` have come.

    Args:
        items: what is read, in this order.
        pinner: pins the memory; None: it is not pinned.

    Raises:
        HostMemoryError: the host has not the memory for it.
    """

    def __init__(
        self, name: str, items: Sequence[PlannedBucket], sources: Sources, pinner: HostMemoryPinner | None
    ) -> None:
        self._pinner = pinner
        self._layout = KeptLayout(items, sources)
        self._arena = HostArena(self._layout.nbytes)
        buffers = self._layout.buffers(self._arena.address)
        self.checkpoint = HostCheckpoint.of_memory(name, self._arena, buffers)
        self._come = self._next = 0

    def prepare(self) -> None:
        """Gives the memory its pages, and pins it. Raises HostMemoryError."""
        self._arena.populate()
        self._arena.populated = True
        if self._pinner is not None:
            self._arena.pin(self._pinner)

    def landing(self, register: Callable[[int, int], object]) -> KeptShare:
        """This, as where reads land, beginning with what has not come; `register`: with their store."""
        if self._arena.nbytes:
            register(self._arena.address, self._arena.nbytes)
        self._next = self._come
        return self

    def take(self, nbytes: int) -> Place | None:
        """As of `reading.Landing`; each bucket has its place."""
        number = self._next
        self._next += 1
        start, room = self._layout.places[number]
        assert nbytes == room
        memory = self._arena.view(start, nbytes)
        return Place(address=self._arena.address + start, memory=memory, number=number, of=self)

    def give_back(self, place: Place) -> None:
        """As of `reading.Landing`; what is here stays."""

    def came(self, item: PlannedBucket, serving: Serving) -> None:
        """A bucket's bytes are right: others may read it."""
        self._come += 1
        serving.came(self.checkpoint.name, self._layout.present[item.index])

    @property
    def address(self) -> int:
        return self._arena.address

    def close(self) -> None:
        """Frees it. Idempotent."""
        self.checkpoint.close()
