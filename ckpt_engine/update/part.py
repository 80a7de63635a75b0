"""One rank's part in one update: what it waits for, and the bytes it can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ckpt_engine.checkpoint import HostCheckpoint
from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Device, Ring, Staging
from ckpt_engine.errors import ErrorRecord, UpdateError, UpdateTimeout
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.planning.plan import PlannedBucket, UpdatePlan
from ckpt_engine.update.no_worker import Channel


@dataclass(kw_only=True)
class Part:
    """`while_waiting` is called before each look at the sockets: work that may be done ahead."""

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
    while_waiting: Callable[[], None] = lambda: None

    # Waiting

    def wait_for_worker(self, index: int) -> None:
        """Until the worker has given back bucket `index`. One that gives nothing back for `reply_timeout`
        seconds is stuck or stopped.

        Raises:
            UpdateTimeout: with the bucket that the worker has.
        """
        while self.channel.done < index:
            before = self.channel.done
            deadline = self.deadline.or_after(self.reply_timeout)
            if not self._turn_until(lambda before=before: self.channel.done > before, deadline):  # type: ignore[misc]
                stuck = self.plan.buckets[before + 1]
                message = (
                    f"the worker (pid {self.channel.worker_pid}) has not given back bucket {stuck.index}: "
                    "it is stopped, or stuck in the engine's own code (then the engine needs a restart)"
                )
                with at_work_on(stuck):
                    raise UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message))

    def wait(self, done: Callable[[], bool], what: str, bucket: int) -> None:
        """Until `done()`. Raises UpdateTimeout: `what`, and for which bucket."""
        if not self._turn_until(done, self.deadline):
            message = f"waited for {what} (bucket {bucket})"
            raise UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message))

    def _turn_until(self, done: Callable[[], bool], deadline: Deadline) -> bool:
        while True:
            self.while_waiting()
            if done():
                return True
            if deadline.passed:
                return False
            self.reactor.turn(min(1.0, deadline.remaining + 0.001))

    # Bytes

    def slots(self, item: PlannedBucket) -> torch.Tensor:
        """The bucket's place in this rank's ring."""
        return self.ring.view(item.ring_offset, item.nbytes)

    def copy_from_host(self, item: PlannedBucket, target: torch.Tensor) -> None:
        """Enqueues the copies of a bucket that this rank owns from its host buffers to `target`."""
        assert self.checkpoint is not None
        for part in item.bucket.ranges:
            self.device.copy(
                target[part.bucket_offset : part.bucket_offset + part.nbytes],
                self.checkpoint.view(part.buffer, part.offset, part.nbytes),
            )

    def await_slots(self, item: PlannedBucket) -> None:
        """What the current stream does next waits until the worker has read what lay in these slots."""
        if item.waits_for >= 0:
            self.ring.await_given_back(item.waits_for)


@contextmanager
def at_work_on(item: PlannedBucket) -> Iterator[None]:
    """Adds the bucket's name to an error that has no stage or bucket of its own."""
    try:
        yield
    except UpdateError as error:
        if error.record.stage or error.record.bucket is not None:
            raise
        record = replace(error.record, stage="buckets", bucket=item.index, tensors=item.names())
        raise type(error)(record, touched=error.touched) from error
    except Exception as error:
        record = ErrorRecord.from_exception(error, stage="buckets", bucket=item.index, tensors=item.names())
        raise UpdateError(record) from error
