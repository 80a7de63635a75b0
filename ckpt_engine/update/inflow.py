"""What of an update comes by P2P: which sources are read, who reads, and the leases on the owners' memory.

The first member asks the sources for admission before the members meet, in one order for all updates, so that
two updates never wait for each other. Then every receiver takes leases of its own, as the same reader, which
the sources grant at once: an owner's memory is kept for as long as anybody may be reading it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ErrorRecord, P2PError, P2PUnavailable, UpdateError
from ckpt_engine.gathered import Senders
from ckpt_engine.metadata import Metas, RankMetas, topology
from ckpt_engine.planning.plan import Assignment, PlannedBucket, UpdatePlan
from ckpt_engine.planning.reads import choose_receivers
from ckpt_engine.planning.sources import Sources
from ckpt_engine.timeline.recorder import Recorder
from ckpt_engine.transport.leases import Lease
from ckpt_engine.update.introduction import Meeting, ReadsByP2P
from ckpt_engine.update.p2p_reader import P2PReader
from ckpt_engine.update.rank import Rank

logger = logging.getLogger(__name__)

TRY_SECONDS = 0.5
"""How long one fleet of several may take to admit this update before the next one is asked."""
GRANT_SECONDS = 10.0
"""How long an owner that has admitted this update may take to grant a lease."""
STAGING_NBYTES = 128 * 1024 * 1024
"""About as much as a receiver reads ahead, in at least 3 and at most 8 buckets."""


def staging_shape(items: Sequence[PlannedBucket]) -> tuple[int, int]:
    """Bytes of a place in the staging buffer of whoever reads these, and how many places it has."""
    nbytes = max(item.nbytes for item in items)
    return nbytes, min(max(STAGING_NBYTES // max(nbytes, 1), 3), 8, len(items))


@dataclass(kw_only=True)
class Inflow:
    """One update's, on one member. `leads`: it is the first. `token`: its own, under which it is admitted."""

    me: Rank
    senders: Senders
    leads: bool
    token: str
    deadline: Deadline
    _admissions: list[Lease] = field(default_factory=list)
    _sources: Sources | None = None
    _reading: P2PReader | None = None

    def prepare(self) -> ReadsByP2P:
        """Before the members meet: what this one says about reading.

        Raises:
            UpdateError: the sources do not admit this update.
        """
        if not self.senders.has_sources:
            return ReadsByP2P()
        first = self._admit() if self.leads else 0
        try:
            transport = self.me.reading.store().transport
            device = self.me.reading.rdma_device()
        except P2PUnavailable as error:
            return ReadsByP2P(problem=str(error), first_fleet=first)
        return ReadsByP2P(transport=transport, rdma_device=device, first_fleet=first)

    def _admit(self) -> int:
        """Waits for a fleet of sources to take this update; which one of several."""
        fleets = self.senders.fleet_count
        order = list(range(fleets))
        random.shuffle(order)
        problems = []
        for patience in (TRY_SECONDS, None) if fleets > 1 else (None,):
            for number in order:
                wait = self.deadline if patience is None else self.deadline.or_after(patience)
                try:
                    self._take_all(self.senders.sources(number), wait)
                except P2PError as error:
                    problems.append(str(error))
                else:
                    return number
        raise UpdateError(ErrorRecord(error_type="P2PError", message="; ".join(dict.fromkeys(problems))))

    def _take_all(self, sources: Sources, deadline: Deadline) -> None:
        owners = [held for held in sources.planned.values() if held.tensor_count]
        try:
            for held in sorted(owners, key=lambda held: (held.session, held.rank)):
                self._admissions.append(self._lease_of(held, deadline, self.token))
        except BaseException:
            self._release()
            raise

    def _lease_of(self, held: RankMetas, deadline: Deadline, reader: str) -> Lease:
        assert held.lease_address is not None
        return Lease.take(
            held.lease_address, held.session, held.checkpoint, held.epoch, deadline, reader=reader
        )

    # Once the members have met

    def plan_reads(self, meeting: Meeting) -> tuple[Metas, Assignment | None]:
        """What is to be read, and who reads what: alike on every member.

        Raises:
            P2PUnavailable: nobody can read.
        """
        if not self.senders.has_sources:
            return {}, None
        sources = self._sources = self.senders.sources(meeting.first_fleet)
        local = meeting.readers({held.p2p_transport for held in sources.by_number.values()})
        remote = topology(sources.planned)

        return sources.planned, lambda buckets: choose_receivers(buckets, local, remote).assigned

    def start(self, plan: UpdatePlan, meeting: Meeting, recorder: Recorder) -> P2PReader | None:
        """Begins to read this rank's buckets; None: it has none.

        Raises:
            P2PUnavailable, HostMemoryError: there is no store, or no memory to read into.
        """
        items = plan.read_by(self.me.rank)
        if not items:
            return None
        assert self._sources is not None
        nbytes, count = staging_shape(items)
        self._reading = P2PReader(
            items,
            self._sources,
            self.me.reading,
            lambda held: self._lease_of(held, self.deadline.or_after(GRANT_SECONDS), meeting.token),
            place_nbytes=nbytes,
            place_count=count,
            read_timeout=self.me.settings.reply_timeout,
            recorder=recorder,
        )
        return self._reading

    # The end

    def stop(self) -> None:
        """No more reads, no more leases. Idempotent."""
        if self._reading is not None:
            self._reading.stop()
        self._release()

    def close(self) -> None:
        """Once no copy out of what was read is under way. Idempotent."""
        if self._reading is not None:
            self._reading.close()

    def _release(self) -> None:
        while self._admissions:
            self._admissions.pop().release()

    def report(self) -> dict[str, Any]:
        """The fields of `UpdateReport` that it knows."""
        found: dict[str, Any] = {"content": self.senders.content}
        if self._reading is not None:
            found |= {
                "transport": self._reading.transport,
                "p2p_nbytes": self._reading.nbytes,
                "lost_sources": self._reading.lost,
            }
        return found
