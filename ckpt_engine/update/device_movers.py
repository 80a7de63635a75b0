"""How a bucket gets into this rank's ring, on devices of their own: a lone rank's copy, or a broadcast.

A mover only enqueues; the ring's *ready* event says when the bytes are there. `HostMover` (host_mover.py)
is the third of them, for ranks whose rings lie in host memory.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from ckpt_engine.planning.plan import PlannedBucket
from ckpt_engine.timeline.trace import BROADCAST
from ckpt_engine.transport.collectives import Collectives
from ckpt_engine.update.part import Part, at_work_on


class Mover(Protocol):
    """Moves buckets to this rank's ring; every rank calls `deliver` for every bucket, in sequence."""

    def begin(self) -> None:
        """Enqueues the first copies, while the worker is still on its way. Copies that are made at once would
        keep its messages waiting."""
        ...

    def stage_ahead(self) -> None:
        """Copies buckets of which this rank is the root ahead of their turn, as far as there is room and they
        are here. Cheap if not."""
        ...

    def is_sent_on(self, index: int) -> bool:
        """Whether no other rank reads bucket `index`, or one before it, from this rank's ring any more."""
        ...

    def deliver(self, item: PlannedBucket) -> None:
        """Brings the bucket into this rank's ring, and marks it ready. Its slots are free."""
        ...


class DirectMover:
    """For a lone rank: host memory to slot."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._begun = 0

    def begin(self) -> None:
        if not self._part.device.enqueues:
            return
        for item in self._part.plan.buckets:
            if item.waits_for >= 0 or not self._part.is_here(item):
                return
            with at_work_on(item):
                self._copy(item)
            self._begun += 1

    def stage_ahead(self) -> None: ...

    def is_sent_on(self, index: int) -> bool:
        return True

    def deliver(self, item: PlannedBucket) -> None:
        if item.index < self._begun:
            return
        self._part.wait(lambda: self._part.is_here(item), "its bytes, read by P2P,", item.index)
        self._copy(item)

    def _copy(self, item: PlannedBucket) -> None:
        part = self._part
        with part.device.use_copy_stream():
            part.copy_from_host(item, part.slots(item))
            part.ring.mark_ready(item.index)


class GroupMover:
    """For ranks with a device each: the root's copy to its device, then a broadcast among them.

    With a staging buffer a root copies its next bucket while others broadcast theirs, so that all roots'
    copies run at the same time; without one (too little memory) copies and broadcasts take turns.
    """

    def __init__(self, part: Part, members: tuple[int, ...], group: Collectives) -> None:
        self._part = part
        self._members = members
        self._group = group
        self._own = deque(item for item in part.plan.buckets if item.root == part.rank)
        self._filled: PlannedBucket | None = None
        self._staging = part.staging

    def begin(self) -> None:
        if self._part.device.enqueues:
            self.stage_ahead()

    def stage_ahead(self) -> None:
        if self._staging is None or self._filled is not None or not self._own:
            return
        if not self._part.is_here(self._own[0]):
            return
        item = self._own.popleft()
        with at_work_on(item), self._part.device.use_copy_stream():
            self._part.copy_from_host(item, self._staging.fill()[: item.nbytes])
            self._staging.mark_filled()
        self._filled = item

    def is_sent_on(self, index: int) -> bool:
        return True  # a bucket is ready once the broadcast has read it

    def deliver(self, item: PlannedBucket) -> None:
        part = self._part
        self.stage_ahead()
        if item.root == part.rank:
            part.wait(
                lambda: self._filled is item or part.is_here(item), "its bytes, read by P2P,", item.index
            )
            self.stage_ahead()
        with part.device.use_broadcast_stream():
            slots = part.slots(item)
            if item.root == part.rank:
                self._bring(item)
            with part.recorder.on_stream(BROADCAST, item):
                self._group.broadcast(
                    slots, self._members.index(item.root), part.deadline, poll=lambda: part.reactor.turn(0)
                )
            part.ring.mark_ready(item.index)
        self.stage_ahead()

    def _bring(self, item: PlannedBucket) -> None:
        """The root's bytes, from its staging buffer or straight from its host memory."""
        part = self._part
        if self._staging is None:
            part.copy_from_host(item, part.slots(item))
            return
        assert self._filled is item
        part.device.copy(part.slots(item), self._staging.empty()[: item.nbytes])
        self._staging.mark_emptied()
        self._filled = None
