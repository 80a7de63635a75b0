"""Buckets between ranks whose rings lie in host memory: copied inside a host, broadcast between hosts.

Inside a host every rank copies a bucket from its source's ring: the root's, or, on a host without the
root, that of the host's first rank (its *leader*), which gets it from the root's host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from ckpt_engine.planning.plan import PlannedBucket
from ckpt_engine.timeline.trace import BROADCAST, COPY, SOURCE_WAIT
from ckpt_engine.transport.collectives import Collectives
from ckpt_engine.transport.shared_memory import COPIED, STAGED, HostLinks
from ckpt_engine.update.part import Part, at_work_on


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

    def source_for(self, rank: int, root: int) -> int:
        """The rank on `rank`'s host from whose ring a bucket of `root` is copied."""
        return root if self.by_rank[root] == self.by_rank[rank] else self.leader_of(rank)


class HostMover:
    """`between_hosts`: the leaders' group; None on one host, and for ranks that are no leaders."""

    def __init__(self, part: Part, hosts: Hosts, links: HostLinks, between_hosts: Collectives | None) -> None:
        self._part = part
        self._hosts = hosts
        self._links = links
        self._between_hosts = between_hosts
        rank, buckets = part.rank, part.plan.buckets
        self._readers = [other for other in hosts.local_ranks(rank) if other != rank]
        self._own = deque(item for item in buckets if item.root == rank)
        self._sources = [hosts.source_for(rank, item.root) for item in buckets]
        self._unread = deque(index for index, source in enumerate(self._sources) if source == rank)
        self._staged: set[int] = set()
        self._copies = [0] * len(buckets)

    def on_note(self, kind: int, rank: int, bucket: int) -> None:
        """A note from another rank of this host."""
        if kind == STAGED and self._sources[bucket] == rank:
            self._staged.add(bucket)
        elif kind == COPIED:
            self._copies[bucket] += 1

    def begin(self) -> None:
        """Nothing is enqueued in host memory."""

    def stage_ahead(self) -> None:
        while self._own and self._free(self._own[0]) and self._part.is_here(self._own[0]):
            item = self._own.popleft()
            with at_work_on(item):
                self._part.copy_from_host(item, self._part.slots(item))
                self._have(item)

    def _free(self, item: PlannedBucket) -> bool:
        """Whether nobody uses the slots that `item` needs. What a worker gave back was sent on before."""
        return item.waits_for <= self._part.channel.done

    def is_sent_on(self, index: int) -> bool:
        while self._unread and self._copies[self._unread[0]] == len(self._readers):
            self._unread.popleft()
        return not self._unread or self._unread[0] > index

    def _have(self, item: PlannedBucket) -> None:
        """The bucket lies in this ring: the host's other ranks may copy it."""
        self._staged.add(item.index)
        for reader in self._readers:
            self._links.tell(reader, STAGED, item.index)

    def deliver(self, item: PlannedBucket) -> None:
        """Also sends the bucket on, where that is this rank's part."""
        rank = self._part.rank
        source = self._sources[item.index]
        root_leader = self._hosts.leader_of(item.root)
        is_leader = rank in self._hosts.leaders
        if is_leader and rank != root_leader:
            self._between(item, root_leader)
            self._have(item)
            return
        with self._part.recorder.on_host(SOURCE_WAIT, item):
            self._part.wait(lambda: item.index in self._staged, f"rank {source} to stage", item.index)
        if source != rank:
            theirs = self._links.ring_of(source).view(item.ring_offset, item.nbytes)
            with self._part.recorder.on_host(COPY, item):
                self._part.device.copy(self._part.slots(item), theirs)
            self._links.tell(source, COPIED, item.index)
        if is_leader:
            self._between(item, root_leader)

    def _between(self, item: PlannedBucket, root_leader: int) -> None:
        if self._between_hosts is None:
            return
        part = self._part
        root = self._hosts.leaders.index(root_leader)
        with part.recorder.on_host(BROADCAST, item):
            self._between_hosts.broadcast(
                part.slots(item), root, part.deadline, poll=lambda: part.reactor.turn(0)
            )
