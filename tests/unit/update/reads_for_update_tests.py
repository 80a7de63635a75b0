"""Fleets that hold tensors in this process's memory, and a reader of what they hold."""

from __future__ import annotations

import random
import select
from collections.abc import Callable
from typing import cast

import torch
from store_for_update_tests import FakeLease, FakeNetwork

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import P2PError
from ckpt_engine.metadata import HostBufferMeta, Metas, RankMetas, TensorMeta
from ckpt_engine.planning.plan import PlannedBucket, UpdatePlan, make_plan
from ckpt_engine.planning.sources import Sources
from ckpt_engine.timeline.recorder import NO_RECORDER
from ckpt_engine.transport.leases import Lease
from ckpt_engine.update.p2p_reader import P2PReader
from ckpt_engine.update.reading import Landing, Reading

SEED = 20271002
SECONDS = 30.0
SLOT = 4096


class Owners:
    """Fleets in this process's memory: `held[fleet][rank]` are tensors' names, of `nbytes` each."""

    def __init__(self, held: list[list[list[str]]], nbytes: int = 3000) -> None:
        self.memory: list[torch.Tensor] = []
        self.expected: dict[str, torch.Tensor] = {}
        self.fleets = [
            {rank: self._rank(f"f{number}", rank, names, nbytes) for rank, names in enumerate(fleet)}
            for number, fleet in enumerate(held)
        ]

    def _rank(self, fleet: str, rank: int, names: list[str], nbytes: int) -> RankMetas:
        room = -(-nbytes // 256) * 256
        memory = torch.zeros(max(1, room * len(names)), dtype=torch.uint8)
        self.memory.append(memory)
        for place, name in enumerate(names):
            data = torch.frombuffer(
                bytearray(random.Random(f"{SEED}-{name}").randbytes(nbytes)), dtype=torch.uint8
            )
            self.expected[name] = data
            memory[place * room : place * room + nbytes] = data
        tensors = tuple(
            TensorMeta(name=name, dtype="uint8", shape=(nbytes,), offset=place * room, nbytes=nbytes)
            for place, name in enumerate(names)
        )
        buffer = HostBufferMeta(
            address=memory.data_ptr(), nbytes=memory.numel(), tensors=tensors, origin="the first share"
        )
        return RankMetas(
            rank=rank,
            host=f"host-{fleet}",
            host_ip="",
            device_uuid=f"{fleet}-{rank}",
            epoch="e",
            checkpoint="c",
            session=fleet,
            p2p_address=f"{fleet}:{rank}",
            p2p_transport="memory",
            lease_address=f"{fleet}:{rank}",
            buffers=(buffer,) if names else (),
        )


def plan_of(sources: Sources, slot_nbytes: int = SLOT) -> UpdatePlan:
    return make_plan(
        "c",
        {},
        slot_nbytes=slot_nbytes,
        slot_count=3,
        budget=2**30,
        outside=sources.planned,
        assign=lambda buckets: [(0, owner, bucket) for owner, bucket in buckets],
    )


class Reads:
    """A reader of all that `fleets` hold, in a network that a test steers."""

    def __init__(self, fleets: list[Metas], places: int = 3, read_timeout: float = SECONDS) -> None:
        self.network = FakeNetwork()
        self.reading = Reading(self.network.make_store, None)
        self.sources = Sources.of_fleets(fleets)
        self.plan = plan_of(self.sources)
        self.leases: dict[str, FakeLease] = {}
        self.refuses: set[str] = set()
        self._places = places
        self._read_timeout = read_timeout

    def start(
        self,
        landing: Callable[[], Landing] | None = None,
        came: Callable[[PlannedBucket], object] = lambda item: None,
    ) -> P2PReader:
        return P2PReader(
            self.plan.read_by(0),
            self.sources,
            self.reading,
            self._lease,
            landing=landing or self._staging,
            came=came,
            read_timeout=self._read_timeout,
            recorder=NO_RECORDER,
        )

    def _staging(self) -> Landing:
        return self.reading.staging(max(item.nbytes for item in self.plan.buckets), self._places)

    def _lease(self, held: RankMetas, poll: Callable[[], object]) -> Lease:
        assert held.p2p_address is not None
        if held.p2p_address in self.refuses:
            raise P2PError("refused: its metas are out of date")
        lease = self.leases.get(held.p2p_address)
        if lease is None or lease.released.is_set():
            lease = self.leases[held.p2p_address] = FakeLease()
        return cast(Lease, lease)


def wait(reader: P2PReader, done: Callable[[], bool]) -> None:
    """As an update's reactor does."""
    deadline = Deadline.after(SECONDS)
    while not done():
        assert not deadline.passed, "no news from the reader"
        if select.select([reader.fileno()], [], [], 0.1)[0]:
            reader.check()
