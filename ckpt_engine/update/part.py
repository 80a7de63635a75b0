"""One rank's part in one update: what it waits for, and the bytes it can reach."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ckpt_engine.checkpoint import HostCheckpoint
from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Device, Ring, Staging
from ckpt_engine.errors import ErrorRecord, UpdateError, UpdateTimeout
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.planning.plan import PlannedBucket, UpdatePlan
from ckpt_engine.timeline.recorder import NO_RECORDER, Recorder
from ckpt_engine.timeline.trace import H2D
from ckpt_engine.update.no_worker import Channel

PAUSE_SECONDS = 0.0001
"""Between two looks at a device's events: far below the milliseconds that a slot's copy takes."""
FIRST_PAUSE_SECONDS = 0.00002
FIRST_LOOKS = 20
"""At first looks come more often: small buckets take less than a pause. (A sleep takes 0.05 ms by itself.)"""


class Reader(Protocol):
    """Reads this rank's buckets by P2P ahead of their turn (`update.p2p_reader`), and wakes the reactor."""

    def view(self, item: PlannedBucket) -> torch.Tensor | None:
        """The bucket's bytes in host memory; None while they are still on their way."""
        ...

    def let_go(self, item: PlannedBucket) -> None:
        """Nobody looks at these bytes any more: others may take their place."""
        ...


@dataclass(kw_only=True)
class Part:
    """`reader`: brings what this rank reads by P2P. `while_waiting` is called before each look at the
    sockets: work that may be done ahead. It returns whether copies are on their way to the ring, whose end it
    has to look for."""

    plan: UpdatePlan
    rank: int
    checkpoint: HostCheckpoint | None
    device: Device
    ring: Ring
    staging: Staging | None
    channel: Channel
    reactor: Reactor
    deadline: Deadline
    reply_timeout: float
    reader: Reader | None = None
    recorder: Recorder = NO_RECORDER
    while_waiting: Callable[[], bool] = lambda: False

    # Waiting

    def wait_for_worker(self, index: int) -> None:
        """Until the worker has given back bucket `index`, on its device too. One that gives nothing back for
        `reply_timeout` seconds is stuck or stopped.

        Raises:
            UpdateTimeout: with the bucket that the worker has.
        """
        self._wait_for_reply(index)
        if not self.channel.connected:
            return  # No worker, and so no events of one: what lies here was only sent on, by our own streams.
        deadline = self.deadline.or_after(self.reply_timeout)
        if index >= 0 and not self._turn_until(
            lambda: self.ring.is_given_back(index), deadline, looks_again=True
        ):
            item = self.plan.buckets[index]
            message = f"the device of the worker (pid {self.channel.worker_pid}) has not done its reload"
            with at_work_on(item):
                raise UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message))

    def _wait_for_reply(self, index: int) -> None:
        while self.channel.done < index:
            before = self.channel.done
            deadline = self.deadline.or_after(self.reply_timeout)
            if not self._turn_until(lambda before=before: self.channel.done > before, deadline):  # type: ignore[misc]
                stuck = self.plan.buckets[before + 1]
                message = (
                    f"the worker (pid {self.channel.worker_pid}) has not given back bucket {stuck.index}: "
                    "it is stopped, or stuck in the engine's own code (then the engine needs a restart; "
                    "CKPT_ENGINE_REPLY_TIMEOUT is how long it may take)"
                )
                with at_work_on(stuck):
                    raise UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message))

    def wait(self, done: Callable[[], bool], what: str, bucket: int) -> None:
        """Until `done()`. Raises UpdateTimeout: `what`, and for which bucket."""
        if not self._turn_until(done, self.deadline):
            message = f"waited for {what} (bucket {bucket})"
            raise UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message))

    def _turn_until(self, done: Callable[[], bool], deadline: Deadline, *, looks_again: bool = False) -> bool:
        """`looks_again`: `done` looks at something that wakes nobody, as a device's events do not."""
        looks = 0
        while True:
            pending = self.while_waiting()
            if done():
                return True
            if deadline.passed:
                return False
            if pending or looks_again:
                self.reactor.turn(0)
                time.sleep(FIRST_PAUSE_SECONDS if looks < FIRST_LOOKS else PAUSE_SECONDS)
            else:
                self.reactor.turn(min(1.0, deadline.remaining + 0.001))
            looks += 1

    # Bytes

    def slots(self, item: PlannedBucket) -> torch.Tensor:
        """The bucket's place in this rank's ring."""
        return self.ring.view(item.ring_offset, item.nbytes)

    def is_here(self, item: PlannedBucket) -> bool:
        """Whether a bucket of which this rank is the root lies in host memory."""
        return item.receiver is None or self._reader.view(item) is not None

    def copy_from_host(self, item: PlannedBucket, target: torch.Tensor) -> None:
        """Enqueues the copies to `target` of a bucket of which this rank is the root; it is here."""
        with self.recorder.on_stream(H2D, item):
            if item.receiver is not None:
                read = self._reader.view(item)
                assert read is not None
                self.device.copy(target, read)
                return
            assert self.checkpoint is not None
            for part in item.bucket.ranges:
                self.device.copy(
                    target[part.bucket_offset : part.bucket_offset + part.nbytes],
                    self.checkpoint.view(part.buffer, part.offset, part.nbytes),
                )

    def let_go(self, item: PlannedBucket) -> None:
        """The bucket lies in the ring: what this rank read of it is needed no more."""
        if item.receiver == self.rank:
            self._reader.let_go(item)

    @property
    def _reader(self) -> Reader:
        assert self.reader is not None
        return self.reader


@contextmanager
def at_work_on(item: PlannedBucket) -> Iterator[None]:
    """Adds the bucket's name to an error of the buckets that has none of its own."""
    try:
        yield
    except UpdateError as error:
        if error.record.stage not in ("", "buckets") or error.record.bucket is not None:
            raise
        record = replace(error.record, stage="buckets", bucket=item.index, tensors=item.names())
        raise type(error)(record, touched=error.touched) from error
    except Exception as error:
        record = ErrorRecord.from_exception(error, stage="buckets", bucket=item.index, tensors=item.names())
        raise UpdateError(record) from error
