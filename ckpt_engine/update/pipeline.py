"""Moves the plan's buckets: owner's host memory -> every rank's ring -> its worker.

One thread walks the plan's sequence on every rank. A rank takes bucket i once the bucket whose slots it
needs has been released, which no later bucket can delay: that is why no cycle of waits can form. While
it waits, it stages the buckets it owns ahead of the others, so that all owners' copies run in parallel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ckpt_engine.checkpoint import HostCheckpoint
from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Device, Ring
from ckpt_engine.errors import ErrorRecord, UpdateError, UpdateTimeout
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.ipc.sender import WorkerChannel
from ckpt_engine.planning.plan import PlannedBucket, UpdatePlan
from ckpt_engine.transport.collectives import Collectives
from ckpt_engine.transport.shared_memory import COPIED, STAGED, HostLinks


@dataclass(kw_only=True, frozen=True, slots=True)
class Hosts:
    """Which ranks share a host: `by_rank` names each rank's host, `leaders` is each host's first rank."""

    by_rank: Mapping[int, str]
    leaders: tuple[int, ...]

    @classmethod
    def of(cls, by_rank: Mapping[int, str]) -> Hosts:
        first: dict[str, int] = {}
        for rank in sorted(by_rank):
            first.setdefault(by_rank[rank], rank)
        return cls(by_rank=dict(by_rank), leaders=tuple(sorted(first.values())))

    def local_ranks(self, rank: int) -> list[int]:
        return [other for other in sorted(self.by_rank) if self.by_rank[other] == self.by_rank[rank]]

    def leader_of(self, rank: int) -> int:
        return self.local_ranks(rank)[0]

    def source_for(self, rank: int, owner: int) -> int:
        """The rank on `rank`'s host from whose ring a bucket of `owner` is copied."""
        return owner if self.by_rank[owner] == self.by_rank[rank] else self.leader_of(rank)


class Pipeline:
    """One rank's part in one update. `links` is None for a lone rank, `between_hosts` on one host."""

    def __init__(
        self,
        *,
        plan: UpdatePlan,
        rank: int,
        hosts: Hosts,
        checkpoint: HostCheckpoint | None,
        device: Device,
        ring: Ring,
        channel: WorkerChannel,
        links: HostLinks | None,
        between_hosts: Collectives | None,
        reactor: Reactor,
        deadline: Deadline,
        reply_timeout: float,
        progress: Callable[[int], object],
    ) -> None:
        self._plan = plan
        self._rank = rank
        self._hosts = hosts
        self._checkpoint = checkpoint
        self._device = device
        self._ring = ring
        self._channel = channel
        self._links = links
        self._between_hosts = between_hosts
        self._reactor = reactor
        self._deadline = deadline
        self._reply_timeout = reply_timeout
        self._progress = progress
        self._readers = [other for other in hosts.local_ranks(rank) if other != rank]
        self._own = deque(item for item in plan.buckets if item.owner == rank)
        self._sources = [hosts.source_for(rank, item.owner) for item in plan.buckets]
        self._staged: set[int] = set()
        self._copies = [0] * len(plan.buckets)
        self._reported = -1

    def on_note(self, kind: int, rank: int, bucket: int) -> None:
        """A note from another rank of this host."""
        if kind == STAGED and self._sources[bucket] == rank:
            self._staged.add(bucket)
        elif kind == COPIED:
            self._copies[bucket] += 1

    def run(self) -> None:
        """Returns when the worker has given back every bucket and no rank reads this ring any more.

        Raises:
            UpdateError: with the bucket that was at work.
        """
        for item in self._plan.buckets:
            with _at_work_on(item):
                self._wait_for_slots(item)
                self._deliver(item)
            self._channel.announce(item.index)
        last = len(self._plan.buckets) - 1
        self._wait_for_worker(last)
        own = [index for index, source in enumerate(self._sources) if source == self._rank]
        self._wait(lambda: all(self._copied(index) for index in own), "the other ranks to copy", own[-1:])

    # Waiting

    def _wait_for_slots(self, item: PlannedBucket) -> None:
        if item.waits_for < 0:
            return
        self._wait_for_worker(item.waits_for)
        self._wait(lambda: self._copied(item.waits_for), "the other ranks to copy", [item.waits_for])

    def _wait_for_worker(self, index: int) -> None:
        """A worker that gives nothing back for `reply_timeout` seconds is stuck or stopped."""
        while self._channel.done < index:
            before = self._channel.done
            deadline = self._deadline.or_after(self._reply_timeout)
            if not self._turn_until(lambda before=before: self._channel.done > before, deadline):  # type: ignore[misc]
                stuck = self._plan.buckets[before + 1]
                message = (
                    f"the worker (pid {self._channel.worker_pid}) has not given back bucket {stuck.index}: "
                    "it is stopped, or stuck in the engine's own code (then the engine needs a restart)"
                )
                with _at_work_on(stuck):
                    raise UpdateTimeout(_timeout(message))

    def _wait(self, done: Callable[[], bool], what: str, buckets: list[int]) -> None:
        if not self._turn_until(done, self._deadline):
            raise UpdateTimeout(_timeout(f"waited for {what} (bucket {', '.join(map(str, buckets))})"))

    def _turn_until(self, done: Callable[[], bool], deadline: Deadline) -> bool:
        while True:
            self._stage_ahead()
            self._report()
            if done():
                return True
            if deadline.passed:
                return False
            self._reactor.turn(min(1.0, deadline.remaining + 0.001))

    def _report(self) -> None:
        if self._channel.done > self._reported:
            self._reported = self._channel.done
            self._progress(sum(item.nbytes for item in self._plan.buckets[: self._reported + 1]))

    # Moving

    def _free(self, item: PlannedBucket) -> bool:
        """Whether nobody uses the slots that `item` needs."""
        return item.waits_for <= self._channel.done and (item.waits_for < 0 or self._copied(item.waits_for))

    def _copied(self, index: int) -> bool:
        """Whether every rank that copies bucket `index` from this rank's ring has done so."""
        return self._sources[index] != self._rank or self._copies[index] == len(self._readers)

    def _stage_ahead(self) -> None:
        """Copies the buckets this rank owns into its ring, as far as there are free slots."""
        while self._own and self._free(self._own[0]):
            item = self._own.popleft()
            with _at_work_on(item):
                self._stage(item)

    def _stage(self, item: PlannedBucket) -> None:
        assert self._checkpoint is not None
        target = self._slots(item)
        for part in item.bucket.ranges:
            self._device.copy(
                target[part.bucket_offset : part.bucket_offset + part.nbytes],
                self._checkpoint.view(part.buffer, part.offset, part.nbytes),
            )
        self._have(item)

    def _have(self, item: PlannedBucket) -> None:
        """The bucket lies in this ring: the host's other ranks may copy it."""
        self._staged.add(item.index)
        for reader in self._readers:
            assert self._links is not None
            self._links.tell(reader, STAGED, item.index)

    def _deliver(self, item: PlannedBucket) -> None:
        """Returns when the bucket lies in this rank's ring, and has been sent on where that is its part."""
        source = self._sources[item.index]
        root_leader = self._hosts.leader_of(item.owner)
        is_leader = self._rank in self._hosts.leaders
        if is_leader and self._rank != root_leader:
            self._between(item, root_leader)
            self._have(item)
            return
        self._wait(lambda: item.index in self._staged, f"rank {source} to stage", [item.index])
        if source != self._rank:
            assert self._links is not None
            theirs = self._links.ring_of(source).view(item.ring_offset, item.nbytes)
            self._device.copy(self._slots(item), theirs)
            self._links.tell(source, COPIED, item.index)
        if is_leader:
            self._between(item, root_leader)

    def _between(self, item: PlannedBucket, root_leader: int) -> None:
        if self._between_hosts is None:
            return
        root = self._hosts.leaders.index(root_leader)
        self._between_hosts.broadcast(
            self._slots(item), root, self._deadline, poll=lambda: self._reactor.turn(0)
        )

    def _slots(self, item: PlannedBucket) -> torch.Tensor:
        return self._ring.view(item.ring_offset, item.nbytes)


def _timeout(message: str) -> ErrorRecord:
    return ErrorRecord(error_type="UpdateTimeout", message=message)


@contextmanager
def _at_work_on(item: PlannedBucket) -> Iterator[None]:
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
