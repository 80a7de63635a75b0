"""Moves the plan's buckets: the root's host memory -> every rank's ring -> its worker.

One thread walks the plan's sequence on every rank. A rank takes bucket i once the bucket whose slots it
needs has been given back, which no later bucket can delay: that is why no cycle of waits can form. While
it waits, it announces the buckets that have arrived in its ring and need not be read from there by other
ranks any more, and stages the buckets of which it is the root ahead of the others, so that all roots' copies
run in parallel. What it reads by P2P is read ahead as well, in another thread: bucket k+1 arrives while k is
broadcast and k-1 reloaded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ckpt_engine.planning.plan import PlannedBucket
from ckpt_engine.timeline.trace import SLOT_WAIT
from ckpt_engine.update.device_movers import Mover
from ckpt_engine.update.part import Part, at_work_on


class Pipeline:
    """One rank's walk through one update. `progress` is called with the bytes that the worker gave back."""

    def __init__(self, part: Part, mover: Mover, progress: Callable[[int], object]) -> None:
        self._part = part
        self._mover = mover
        self._progress = progress
        self._on_the_way: deque[PlannedBucket] = deque()
        self._reported = -1
        self._reported_nbytes = 0
        part.while_waiting = self._while_waiting

    def begin(self) -> None:
        """Before the worker is there: copies into slots that nobody uses yet. Nothing is announced.

        Raises:
            UpdateError: with the bucket that was at work.
        """
        self._mover.begin()

    def run(self) -> None:
        """Returns when the worker has given back every bucket: then no other rank reads this ring either.

        Raises:
            UpdateError: with the bucket that was at work.
        """
        part = self._part
        for item in part.plan.buckets:
            with at_work_on(item):
                if item.waits_for >= 0:
                    with part.recorder.on_host(SLOT_WAIT, item):
                        self._wait_until_given_back(item.waits_for)
                self._mover.deliver(item)
            part.recorder.delivered(item)
            self._on_the_way.append(item)
            self._announce()
        self._wait_until_given_back(len(part.plan.buckets) - 1)

    def _wait_until_given_back(self, index: int) -> None:
        """In two steps, so that a late rank is not taken for a stuck worker."""
        self._part.wait(
            lambda: not self._on_the_way or self._on_the_way[0].index > index,
            "the copies to its device, and other ranks that copy from it",
            index,
        )
        self._part.wait_for_worker(index)
        self._part.recorder.has_read(index)

    def _announce(self) -> bool:
        """In sequence, and only what lies in the ring: no worker's stream ever waits for this process.

        Nor what other ranks still read there: the worker may write into a bucket that it has. Returns whether
        a copy was not there yet: nobody tells when it is. It is asked once only, since one that arrives
        between two looks would be neither announced nor looked for.
        """
        while self._on_the_way:
            item = self._on_the_way[0]
            if not self._part.ring.is_ready(item.index):
                return True
            if not self._mover.is_sent_on(item.index):
                return False
            self._part.let_go(item)
            self._part.channel.announce(item.index)
            self._on_the_way.popleft()
            if self._part.channel.connected:
                self._part.recorder.announced(item)
        return False

    def _while_waiting(self) -> bool:
        self._mover.stage_ahead()
        pending = self._announce()
        done = self._part.channel.done
        if done > self._reported:
            given_back = self._part.plan.buckets[self._reported + 1 : done + 1]
            self._reported_nbytes += sum(
                tensor.nbytes for item in given_back for tensor in item.bucket.tensors
            )
            self._reported = done
            self._part.recorder.given_back(done)
            self._progress(self._reported_nbytes)
        return pending
