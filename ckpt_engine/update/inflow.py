"""What of an update comes by P2P: which sources are read, who reads, and the leases on the owners' memory.

The first member asks the sources for admission before the members meet, in one order for all updates, so that
two updates never wait for each other. Then every receiver takes leases of its own, as the same reader, which
the sources grant at once: an owner's memory is kept for as long as anybody may be reading it.

A fleet that joins another may keep what it reads, and announce that: then others read it in its turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from ckpt_engine.checkpoint import HostCheckpoint
from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, ErrorRecord, P2PError, P2PUnavailable, UpdateError
from ckpt_engine.gathered import Senders
from ckpt_engine.metadata import Metas, RankMetas, metas_from_json, metas_to_json, topology
from ckpt_engine.planning.plan import Assignment, PlannedBucket, UpdatePlan
from ckpt_engine.planning.reads import choose_receivers, staging_shape
from ckpt_engine.planning.sources import Sources
from ckpt_engine.timeline.recorder import Recorder
from ckpt_engine.transport.leases import Announcement, Lease, Share
from ckpt_engine.update.introduction import Meeting, ReadsByP2P
from ckpt_engine.update.keeping import Keeping, KeptShare
from ckpt_engine.update.p2p_reader import P2PReader
from ckpt_engine.update.rank import Rank
from ckpt_engine.update.reading import Landing
from ckpt_engine.update.seeking import Others, directory_of, find, seek

logger = logging.getLogger(__name__)

TRY_SECONDS = 0.5
"""How long one fleet of several may take to admit this update before the next one is asked."""
GRANT_SECONDS = 10.0
"""How long an owner that has admitted this update may take to grant a lease."""


@dataclass(kw_only=True)
class Inflow:
    """One update's, on one member. `leads`: it is the first. `token`: its own, under which it is admitted.
    `keeping`: how what is read is kept; None: it is not. `kept`: what was, after a commit."""

    me: Rank
    senders: Senders
    leads: bool
    token: str
    deadline: Deadline
    keeping: Keeping | None = None
    kept: HostCheckpoint | None = None
    _kept: KeptShare | None = None
    _announcement: Announcement | None = None
    _admissions: list[Lease] = field(default_factory=list)
    _sources: Sources | None = None
    _reading: P2PReader | None = None

    def prepare(self) -> ReadsByP2P:
        """Before the members meet: what this one says about reading.

        Raises:
            ConfigError: there is nothing to keep.
            UpdateError: the sources do not admit this update.
        """
        if self.keeping is not None and not self.senders.fleets:
            raise ConfigError("keep=True keeps what is read of another fleet: load its metas first")
        if not self.senders.has_sources:
            return ReadsByP2P()
        told = ReadsByP2P()
        if self.leads:
            announces = self.keeping is not None
            self._announcement, others = find(self.senders, self.deadline, announces=announces)
            told = ReadsByP2P(first_fleet=self._admit(others), found=others.to_json())
        try:
            transport = self.me.reading.store().transport
            device = self.me.reading.rdma_device()
        except P2PUnavailable as error:
            return replace(told, problem=str(error))
        return replace(told, transport=transport, rdma_device=device)

    def _admit(self, others: Others) -> int:
        """Waits for a fleet of sources to take this update; which one of several."""
        order = others.order or (0,)
        problems = []
        for patience in (TRY_SECONDS, None) if len(order) > 1 else (None,):
            for number in order:
                wait = self.deadline if patience is None else self.deadline.or_after(patience)
                try:
                    self._take_all(self.senders.sources(number, others.fleets), wait)
                except P2PError as error:
                    problems.append(str(error))
                else:
                    return number
        raise UpdateError(ErrorRecord(error_type="P2PError", message="; ".join(dict.fromkeys(problems))))

    def _take_all(self, sources: Sources, deadline: Deadline) -> None:
        owners = [sources.by_number[number] for number, held in sources.planned.items() if held.tensor_count]
        try:
            for held in sorted(owners, key=lambda held: (held.session, held.rank)):
                self._admissions.append(self._lease_of(held, deadline, self.token))
        except BaseException:
            self._release()
            raise

    def _lease_of(
        self, held: RankMetas, deadline: Deadline, reader: str, poll: Callable[[], object] = lambda: None
    ) -> Lease:
        return Lease.take(Share.of(held), deadline, reader=reader, poll=poll)

    # Once the members have met

    def plan_reads(self, meeting: Meeting) -> tuple[Metas, Assignment | None]:
        """What is to be read, and who reads what: alike on every member.

        Raises:
            P2PUnavailable: nobody can read.
        """
        if not self.senders.has_sources:
            return {}, None
        found = [metas_from_json(text) for text in meeting.found]
        sources = self._sources = self.senders.sources(meeting.first_fleet, found)
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
            self._withdraw()
            return None
        assert self._sources is not None
        reading = self.me.reading
        nbytes, count = staging_shape(items)
        landing: Callable[[], Landing] = lambda: reading.staging(nbytes, count)  # noqa: E731
        came: Callable[[PlannedBucket], object] = lambda item: None  # noqa: E731
        if self.keeping is not None:
            kept = self._kept = self._keep(self.keeping, items, plan.checkpoint, meeting.token)
            serving = self.keeping.ends.serving
            landing = lambda: kept.landing(reading.store().register)  # noqa: E731
            came = lambda item: kept.came(item, serving)  # noqa: E731
        admitted = {held.session for held in self._sources.planned.values() if held.tensor_count}

        def take_lease(held: RankMetas, poll: Callable[[], object]) -> Lease:
            # Whoever takes a lost source's place has not admitted this update yet.
            patience = self.deadline.or_after(GRANT_SECONDS) if held.session in admitted else self.deadline
            return self._lease_of(held, patience, meeting.token, poll)

        self._reading = P2PReader(
            items,
            self._sources,
            reading,
            take_lease,
            landing=landing,
            came=came,
            read_timeout=self.me.settings.reply_timeout,
            recorder=recorder,
        )
        return self._reading

    def _keep(self, keeping: Keeping, items: Sequence[PlannedBucket], name: str, group: str) -> KeptShare:
        """Makes room for what is read, and announces it."""
        assert self._sources is not None
        kept = KeptShare(name, items, self._sources, keeping.ends.pinner)
        try:
            metas = keeping.promise(kept.checkpoint)
            self._announce(group, metas)
            kept.prepare()
            if metas.readable:
                keeping.ends.serving.register(kept.checkpoint)
        except BaseException:
            self._withdraw()
            keeping.ends.serving.withdraw(name, Deadline.after(0), force=True)
            kept.close()
            raise
        return kept

    def _announce(self, group: str, metas: RankMetas) -> None:
        directory = directory_of(self.senders)
        if directory is None or not metas.readable:
            self._withdraw()
            return
        try:
            if self._announcement is None and not self.leads:
                self._announcement, _ = seek(directory, self.deadline, announces=True, waits=False)
            if self._announcement is not None:
                self._announcement.announce(group, metas_to_json({metas.rank: metas}))
        except P2PError as error:
            logger.warning("others are not told that this rank keeps %r: %s", directory.checkpoint, error)
            self._withdraw()

    def _withdraw(self) -> None:
        announcement, self._announcement = self._announcement, None
        if announcement is not None:
            announcement.release()

    # The end

    def stop(self) -> None:
        """No more reads, no more leases. Idempotent."""
        if self._reading is not None:
            self._reading.stop()
        self._release()

    def commit(self) -> None:
        """What was kept stays: `kept` from here on."""
        if self._kept is not None:
            assert self.keeping is not None
            self.me.reading.unregister(self._kept.address)
            self.kept, self._kept = self._kept.checkpoint, None
            if self._announcement is not None:
                self.keeping.ends.announced(self.kept.name, self._announcement)
                self._announcement = None

    def close(self) -> None:
        """Once no copy out of what was read is under way. Idempotent."""
        if self._reading is not None:
            self._reading.close()
        self._withdraw()
        kept, self._kept = self._kept, None
        if kept is not None:
            assert self.keeping is not None
            # Others may be reading it: they go elsewhere.
            self.keeping.ends.serving.withdraw(kept.checkpoint.name, Deadline.after(0), force=True)
            self.me.reading.unregister(kept.address)
            kept.close()

    def _release(self) -> None:
        while self._admissions:
            self._admissions.pop().release()

    def report(self) -> dict[str, Any]:
        """The fields of `UpdateReport` that it knows."""
        found: dict[str, Any] = {"content": self.senders.content}
        if self.kept is not None:
            found["kept_nbytes"] = self.kept.nbytes
        if self._reading is not None:
            found |= {
                "transport": self._reading.transport,
                "p2p_nbytes": self._reading.nbytes,
                "lost_sources": self._reading.lost,
            }
        return found
