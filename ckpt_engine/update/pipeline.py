"""Moves the plan's buckets: owner's host memory -> every rank's ring -> its worker.

One thread walks the plan's sequence on every rank. A rank takes bucket i once the bucket whose slots it
needs has been given back, which no later bucket can delay: that is why no cycle of waits can form. While
it waits, it stages the buckets it owns ahead of the others, so that all owners' copies run in parallel.
"""

from __future__ import annotations

from collections.abc import Callable

from ckpt_engine.update.device_movers import Mover
from ckpt_engine.update.part import Part, at_work_on


class Pipeline:
    """One rank's walk through one update. `progress` is called with the bytes that the worker gave back."""

    def __init__(self, part: Part, mover: Mover, progress: Callable[[int], object]) -> None:
        self._part = part
        self._mover = mover
        self._progress = progress
        self._reported = -1
        self._reported_nbytes = 0
        part.while_waiting = self._while_waiting

    def run(self) -> None:
        """Returns when the worker has given back every bucket and no rank reads this ring any more.

        Raises:
            UpdateError: with the bucket that was at work.
        """
        part = self._part
        for item in part.plan.buckets:
            with at_work_on(item):
                if item.waits_for >= 0:
                    part.wait_for_worker(item.waits_for)
                    self._mover.wait_for_readers(item.waits_for)
                self._mover.deliver(item)
            part.channel.announce(item.index)
        part.wait_for_worker(len(part.plan.buckets) - 1)
        self._mover.wait_for_readers(len(part.plan.buckets) - 1)

    def _while_waiting(self) -> None:
        self._mover.stage_ahead()
        done = self._part.channel.done
        if done > self._reported:
            given_back = self._part.plan.buckets[self._reported + 1 : done + 1]
            self._reported_nbytes += sum(
                tensor.nbytes for item in given_back for tensor in item.bucket.tensors
            )
            self._reported = done
            self._progress(self._reported_nbytes)
