"""Reads a receiver's buckets by P2P, in a thread of its own, ahead of their turn.

A bucket counts as here only once each owner has said, after the read, that the lease on its share still
holds: so no byte of a share that was freed or refilled meanwhile reaches an engine. When an owner cannot be
read any more, what is still to come of it is read from others that hold the same bytes, if there are any.
An owner that is still filling its share is waited for, bucket by bucket.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile

import torch

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ErrorRecord, P2PError, PlanError, UpdateError
from ckpt_engine.metadata import RankMetas
from ckpt_engine.planning.plan import PlannedBucket
from ckpt_engine.planning.sources import Extent, Sources
from ckpt_engine.timeline.recorder import Recorder
from ckpt_engine.timeline.trace import P2P
from ckpt_engine.transport.lease_messages import ALL
from ckpt_engine.transport.leases import Lease
from ckpt_engine.transport.p2p import Piece, Read
from ckpt_engine.update.reading import Landing, Place, Reading, StagingBuffer

logger = logging.getLogger(__name__)

POLL_SECONDS = (0.0005, 0.004)
"""Between looks at reads, at first and at most: far below what one takes, and a core is not spent on it."""
SOURCE_SECONDS = 0.002
"""Between questions to a source that is still filling its share."""
CLOSE_SECONDS = 30.0
"""How long the end of an update waits for the thread, which is in a call of the store at worst."""


class Unreadable(Exception):
    """A source cannot be read any more."""

    def __init__(self, source: int, item: PlannedBucket, error: Exception) -> None:
        super().__init__(str(error))
        self.source = source
        self.item = item
        self.error = error


@dataclass(kw_only=True, eq=False)
class _Bucket:
    """One that is on its way: its place, what is still missing, by source, and what has ended."""

    item: PlannedBucket
    place: Place
    begun: float
    deadline: Deadline
    reads: dict[int, Read] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)


class P2PReader:
    """Reads `items`, in this order, from `sources`.

    Args:
        take_lease: takes one on a source's share; raises P2PError. Called in the thread; so is what it is
            given, while it waits, whose error ends the wait.
        landing: where reads land, in memory that is registered with the store that there is; called again
            after a failure.
        came: called in the thread with each bucket whose bytes are right, in this order.
        read_timeout: seconds after which a read that has not ended counts as failed.
        recorder: of the update's course.
    """

    def __init__(
        self,
        items: Sequence[PlannedBucket],
        sources: Sources,
        reading: Reading,
        take_lease: Callable[[RankMetas, Callable[[], object]], Lease],
        *,
        landing: Callable[[], Landing],
        came: Callable[[PlannedBucket], object] = lambda item: None,
        read_timeout: float,
        recorder: Recorder,
    ) -> None:
        self._sources = sources
        self._reading = reading
        self._take_lease = take_lease
        self._landing = landing
        self._came = came
        # Since when nothing more could be read of a source that fills its share, and when it was last asked.
        self._waits: dict[int, tuple[float, float]] = {}
        self._read_timeout = read_timeout
        self._recorder = recorder
        self._todo = deque(items)
        self._next: dict[int, tuple[Extent, ...]] | None = None
        self._on_the_way: deque[_Bucket] = deque()
        self._here: dict[int, Place] = {}
        self._given_back: deque[Place] = deque()
        self._leases: dict[int, Lease] = {}
        self._lost: dict[int, str] = {}
        self._abandoned: list[StagingBuffer] = []
        self._failure: Exception | None = None
        self._stopping = False
        self._patience = POLL_SECONDS[0]
        self._changed = threading.Condition()
        self.nbytes = 0
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._place = landing()
        self._store = reading.store()
        self.transport = self._store.transport
        self._thread = threading.Thread(target=self._run, name="ckpt-engine-p2p", daemon=True)
        self._thread.start()

    # The pipeline's side

    def fileno(self) -> int:
        """Readable when a bucket has come, or none will come any more."""
        return self._wake_read

    def check(self) -> None:
        """To be called when `fileno` is readable.

        Raises:
            UpdateError: a bucket cannot be read; it is named.
        """
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        if self._failure is not None:
            raise self._failure

    def view(self, item: PlannedBucket) -> torch.Tensor | None:
        place = self._here.get(item.index)
        return None if place is None else place.memory

    def let_go(self, item: PlannedBucket) -> None:
        with self._changed:
            self._given_back.append(self._here.pop(item.index))
            self._changed.notify()

    @property
    def lost(self) -> tuple[str, ...]:
        """Sources that could not be read any more, and why."""
        return tuple(self._lost.values())

    def stop(self) -> None:
        """Ends the reads, and the leases. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.error("a read by P2P does not end: its thread and its memory are left behind")

    def close(self) -> None:
        """Frees what failed reads left behind; no copy out of it is under way any more. Idempotent."""
        self.stop()
        if self._thread.is_alive():
            return
        while self._abandoned:
            self._abandoned.pop().close()
        for fd in (self._wake_read, self._wake_write):
            if fd >= 0:
                os.close(fd)
        self._wake_read = self._wake_write = -1

    # The thread's

    def _run(self) -> None:
        try:
            self._reading.make_current()
            while not self._stopping and (self._todo or self._on_the_way):
                try:
                    self._start_reads()
                    came = self._look()
                except Unreadable as unreadable:
                    self._go_on_without(unreadable)
                    continue
                self._patience = POLL_SECONDS[0] if came else min(2 * self._patience, POLL_SECONDS[1])
                if not came:
                    self._pause()
        except Exception as error:  # noqa: BLE001 - raised where the update waits
            self._failure = error
        finally:
            for lease in self._leases.values():
                lease.release()
            if self._on_the_way:
                self._give_up_memory()
            self._wake()

    def _pause(self) -> None:
        with self._changed:
            if not self._given_back and not self._stopping:
                self._changed.wait(self._patience if self._on_the_way or self._waits else None)

    def _start_reads(self) -> None:
        while self._given_back:
            self._place.give_back(self._given_back.popleft())
        while self._todo:
            item = self._todo[0]
            if self._next is None:  # else it is asked again and again while there is no place
                self._next = self._sources.reads_of(item.bucket, self._lost)
            reads = self._next
            if not all(self._has(source, parts, item) for source, parts in reads.items()):
                return
            place = self._place.take(item.nbytes)
            if place is None:
                return
            bucket = _Bucket(
                item=self._todo.popleft(),
                place=place,
                begun=time.monotonic(),
                deadline=Deadline.after(self._read_timeout),
            )
            self._on_the_way.append(bucket)
            self._next = None
            for source, extents in reads.items():
                self._start(bucket, source, extents)

    def _has(self, source: int, extents: Sequence[Extent], item: PlannedBucket) -> bool:
        """Whether a source holds this by now. It is asked at most every SOURCE_SECONDS."""
        with self._reads_from(source, item):
            lease = self._leases.get(source)
            if lease is None:
                lease = self._leases[source] = self._take_lease(self._sources.by_number[source], self._go_on)
            now, before = time.monotonic(), lease.present
            since, asked = self._waits.get(source, (now, 0.0))
            needed = max(part.buffer for part in extents) + 1
            if before != ALL and before < needed and now - asked >= SOURCE_SECONDS:
                lease.check()
                since = since if lease.present == before else now
                self._waits[source] = (since, now)
                if now - since > self._read_timeout:
                    raise P2PError(f"it has read nothing more itself for {self._read_timeout:g} s")
            return lease.present == ALL or lease.present >= needed

    def _go_on(self) -> None:
        if self._stopping:
            raise P2PError("the update has ended")

    def _start(self, bucket: _Bucket, source: int, extents: Sequence[Extent]) -> None:
        held = self._sources.by_number[source]
        with self._reads_from(source, bucket.item):
            assert held.p2p_address is not None
            pieces = [
                Piece(local=bucket.place.address + part.offset, remote=part.address, nbytes=part.nbytes)
                for part in extents
            ]
            bucket.reads[source] = self._store.start_read(held.p2p_address, pieces)

    def _look(self) -> bool:
        """Whether a bucket has come. In order: one that came before its turn would only wait here."""
        read = list(takewhile(self._has_ended, self._on_the_way))
        # What was read before the owner says so was read while the lease held.
        for source, item in {source: bucket.item for bucket in read for source in bucket.ended}.items():
            with self._reads_from(source, item):
                self._leases[source].check()
        for bucket in read:
            self._on_the_way.popleft()
            self.nbytes += sum(tensor.nbytes for tensor in bucket.item.bucket.tensors)
            self._recorder.add(P2P, bucket.item, bucket.begun, time.monotonic())
            self._here[bucket.item.index] = bucket.place
            self._came(bucket.item)
        if read:
            self._wake()
        return bool(read)

    def _has_ended(self, bucket: _Bucket) -> bool:
        """Whether all reads of a bucket have."""
        for source, read in list(bucket.reads.items()):
            with self._reads_from(source, bucket.item):
                if read.poll():
                    del bucket.reads[source]
                    bucket.ended.append(source)
                elif bucket.deadline.passed:
                    raise P2PError(f"no end of a read within {self._read_timeout:g} s")
        return not bucket.reads

    @contextmanager
    def _reads_from(self, source: int, item: PlannedBucket) -> Iterator[None]:
        try:
            yield
        except P2PError as error:
            raise Unreadable(source, item, error) from error

    def _go_on_without(self, unreadable: Unreadable) -> None:
        """Reads what is missing from others. The reads that are under way end with their store.

        Raises:
            UpdateError: nobody else holds what is missing.
        """
        source = unreadable.source
        held = self._sources.by_number[source]
        who = f"rank {held.rank} on host {held.host} ({held.p2p_address}, session {held.session})"
        self._lost[source] = f"{who} cannot be read by P2P: {unreadable.error}"
        if (lease := self._leases.pop(source, None)) is not None:
            lease.release()
        missing = [unreadable.item, *(bucket.item for bucket in self._on_the_way), *self._todo]
        self._check_others_hold(missing, unreadable)
        logger.warning("%s; the same bytes are read from others", self._lost[source])
        self._give_up_memory()
        self._todo = deque(sorted(set(missing), key=lambda item: item.index))
        self._on_the_way.clear()
        self._waits.clear()
        self._next = None
        self._place = self._landing()
        self._store = self._reading.store()

    def _check_others_hold(self, missing: Sequence[PlannedBucket], unreadable: Unreadable) -> None:
        item = missing[0]
        try:
            for item in missing:
                self._sources.reads_of(item.bucket, self._lost)
        except PlanError as error:
            record = ErrorRecord(
                error_type="P2PError",
                message=f"{self._lost[unreadable.source]}; {error}",
                stage="buckets",
                bucket=item.index,
                tensors=item.names(),
            )
            raise UpdateError(record) from unreadable.error

    def _give_up_memory(self) -> None:
        abandoned = self._reading.give_up()
        if abandoned is not None:
            self._abandoned.append(abandoned)

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")
