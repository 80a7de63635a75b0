"""Ranks and workers in any order of events: real plans, `Pipeline`, movers and `Part`; the rest simulated.

Workers load into parameters of their own. They may write into a bucket that they have, and keep nobody
waiting. Messages take any time. A broadcast lets its root go on at once, or only when all have the bytes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from device_for_update_tests import Operation, SimulatedDevice, SimulatedRing, SimulatedStaging, Stream, Use
from groups_for_update_tests import Broadcasts, HostGroup, StreamGroup
from hypothesis import strategies as st
from schedule_for_update_tests import Schedule, Walk

from ckpt_engine.checkpoint.packing import TensorSpec, pack
from ckpt_engine.deadline import Deadline
from ckpt_engine.metadata import HostBufferMeta, Metas, RankMetas
from ckpt_engine.planning.plan import PlannedBucket, UpdatePlan, make_plan
from ckpt_engine.transport.collectives import Collectives
from ckpt_engine.transport.shared_memory import COPIED, STAGED, HostLinks
from ckpt_engine.update.device_movers import DirectMover, GroupMover, Mover
from ckpt_engine.update.host_mover import HostMover, Hosts
from ckpt_engine.update.no_worker import Channel, NoWorker
from ckpt_engine.update.part import Part
from ckpt_engine.update.pipeline import Pipeline

HOST_MEMORY, NCCL, GLOO = "host memory", "devices with nccl", "devices with gloo"
T = TypeVar("T")
NEVER = 1e6
"""Seconds: of deadlines that no simulation reaches."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One update to simulate. `held`: each rank's tensors, in bytes; `hosts`, `workers`: by rank. `outside`:
    tensors of an owner that takes no part, and `places`: how many of its buckets a rank reads ahead."""

    seed: int
    slot_nbytes: int
    slot_count: int
    staging: bool
    held: tuple[tuple[int, ...], ...]
    hosts: tuple[int, ...]
    workers: tuple[bool, ...]
    outside: tuple[int, ...] = ()
    places: int = 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """1 to 4 ranks, on 1 to 3 hosts. Tensors of none, one or several slots, in any order."""
    slot_nbytes = 256 * draw(st.integers(1, 3))
    sizes = st.one_of(
        st.integers(0, 256), st.just(slot_nbytes), st.integers(slot_nbytes + 1, 3 * slot_nbytes)
    )
    size = draw(st.integers(1, 4))

    def for_each_rank(what: st.SearchStrategy[T]) -> st.SearchStrategy[tuple[T, ...]]:
        return st.tuples(*[what] * size)

    shares = for_each_rank(st.lists(sizes, max_size=9).map(tuple))
    held, outside = draw(
        st.tuples(shares, st.lists(sizes, max_size=9).map(tuple)).filter(
            lambda both: any(any(share) for share in (*both[0], both[1]))
        )
    )
    return Case(
        seed=draw(st.integers(0, 2**32)),
        slot_nbytes=slot_nbytes,
        slot_count=draw(st.integers(1, 5)),
        staging=draw(st.booleans()),
        held=held,
        outside=outside,
        places=draw(st.integers(1, 3)),
        hosts=draw(for_each_rank(st.integers(0, 2))),
        workers=draw(for_each_rank(st.integers(0, 4).map(bool))),
    )


OUTSIDE = 99
"""The number of the owner that takes no part."""


def metas_of(case: Case) -> Metas:
    """Of the ranks, and of the owner outside."""
    metas = {}
    for rank, sizes in [*enumerate(case.held), (OUTSIDE, case.outside)]:
        specs = [TensorSpec(f"{rank}.{i:02}", "uint8", (nbytes,), nbytes) for i, nbytes in enumerate(sizes)]
        buffers = tuple(
            HostBufferMeta(address=one.start, nbytes=one.nbytes, tensors=one.tensors)
            for one in pack(specs, 5 * case.slot_nbytes)
        )
        metas[rank] = RankMetas(
            rank=rank, host="h", host_ip="", device_uuid=str(rank), epoch="e", buffers=buffers
        )
    return metas


class Share:
    """What a rank holds: random bytes."""

    def __init__(self, held: RankMetas, seed: int) -> None:
        source = random.Random(f"{seed}-{held.rank}")
        self._buffers = [
            torch.frombuffer(bytearray(source.randbytes(buffer.nbytes) or b"-"), dtype=torch.uint8)
            for buffer in held.buffers
        ]
        self.tensors = {
            tensor.name: self.view(number, tensor.offset, tensor.nbytes)
            for number, buffer in enumerate(held.buffers)
            for tensor in buffer.tensors
        }

    def view(self, buffer: int, offset: int, nbytes: int) -> torch.Tensor:
        return self._buffers[buffer][offset : offset + nbytes]


class SimulatedReader:
    """A daemon: reads its rank's buckets ahead, each at any time, into places whose use is watched."""

    def __init__(self, rank: SimulatedRank, share: Share, count: int, schedule: Schedule) -> None:
        todo = rank.plan.read_by(rank.rank)
        largest = max((item.nbytes for item in todo), default=0)
        self._rank = rank
        self._share = share
        self._free = [torch.full((largest,), 0xCC, dtype=torch.uint8) for _ in range(count)]
        self._todo = deque(todo)
        self._under_way: list[tuple[PlannedBucket, torch.Tensor, Use]] = []
        self._here: dict[int, torch.Tensor] = {}
        self._random = schedule.random
        schedule.daemons.append(self)

    def ready(self) -> bool:
        return bool(self._under_way or (self._todo and self._free))

    def step(self) -> None:
        if self._todo and self._free and (not self._under_way or self._random.random() < 0.5):
            item, place = self._todo.popleft(), self._free.pop()
            use = self._rank.device.use(place, f"reads bucket {item.index} by P2P", writes=True)
            self._under_way.append((item, place, use))
            return
        item, place, use = self._under_way.pop(self._random.randrange(len(self._under_way)))
        for part in item.bucket.ranges:
            place[part.bucket_offset : part.bucket_offset + part.nbytes] = self._share.view(
                part.buffer, part.offset, part.nbytes
            )
        use.end()
        self._here[item.index] = place
        self._rank.reactor.send("the reader", lambda: None)

    def view(self, item: PlannedBucket) -> torch.Tensor | None:
        place = self._here.get(item.index)
        return None if place is None else place[: item.nbytes]

    def let_go(self, item: PlannedBucket) -> None:
        self._free.append(self._here.pop(item.index))


class SimulatedReactor:
    """A rank's waits. `inbox`: what others sent, in order for each sender; it arrives any time later."""

    def __init__(self, schedule: Schedule, device: SimulatedDevice) -> None:
        self._random = schedule.random
        self._device = device
        self._inbox: dict[str, deque[Callable[[], object]]] = {}
        device.has_mail = lambda: any(self._inbox.values())

    def send(self, sender: str, message: Callable[[], object]) -> None:
        """`message` is called when it arrives."""
        self._inbox.setdefault(sender, deque()).append(message)

    def turn(self, seconds: float) -> None:
        """A wait needs nothing but a message. One who only looks (0 s) also sees what his device has done
        since he looked."""
        device = self._device
        seen = device.reached if device.seen is None else device.seen
        device.seen = None
        device.walk.pause("news", lambda: device.has_mail() or (seconds == 0 and device.reached > seen))
        for queue in self._inbox.values():
            for _ in range(self._random.randint(0, len(queue))):
                queue.popleft()()


class SimulatedChannel(NoWorker):
    """A rank's way to its worker: `announced` is checked against the plan and against the bytes."""

    worker_pid: int | None = 1
    connected = True

    def __init__(self, rank: SimulatedRank) -> None:
        super().__init__()
        self._rank = rank

    def announce(self, index: int) -> None:
        assert index == self.announced + 1, "buckets are announced in order"
        self.announced = index
        item = self._rank.plan.buckets[index]
        for tensor in item.bucket.tensors:
            lies_there = self._rank.ring.view(item.ring_offset + tensor.offset, tensor.nbytes)
            assert torch.equal(lies_there, self._rank.expected[tensor.name]), (
                f"rank {self._rank.rank} announces bucket {index}, but {tensor.name} is not there"
            )
        assert self._rank.worker is not None
        self._rank.worker.take(item)

    def give_back(self, index: int) -> None:
        assert index == self.done + 1
        self.done = index


class Worker:
    """A daemon for its host, and a stream. From the announcement until it gave a bucket back, it has it."""

    def __init__(self, rank: SimulatedRank, channel: SimulatedChannel, schedule: Schedule) -> None:
        self.parameters: dict[str, torch.Tensor] = {}
        self.stream = Stream()
        self._rank = rank
        self._channel = channel
        self._inbox: deque[tuple[PlannedBucket, Use]] = deque()
        self._writes = schedule.random.random() < 0.5
        schedule.daemons += [self, self.stream]

    def take(self, item: PlannedBucket) -> None:
        slots = self._rank.ring.view(item.ring_offset, item.nbytes)
        what = f"the worker has bucket {item.index}"
        self._inbox.append((item, self._rank.device.use(slots, what, writes=self._writes)))

    def ready(self) -> bool:
        return bool(self._inbox)

    def step(self) -> None:
        rank, (item, use) = self._rank, self._inbox.popleft()
        self.stream.enqueue(self._reload(item))
        self.stream.do(use.end)
        rank.ring.mark_given_back(item.index, self.stream)

        def reply() -> None:
            rank.reactor.send("the worker", lambda: self._channel.give_back(item.index))

        if rank.device.in_host_memory:
            self.stream.do(reply)
        else:
            reply()

    def _reload(self, item: PlannedBucket) -> Operation:
        for tensor in item.bucket.tensors:
            place = self._rank.ring.view(item.ring_offset + tensor.offset, tensor.nbytes)
            self.parameters[tensor.name] = place.clone()
            yield None
            if self._writes:
                place.fill_(0xBB)


class SimulatedRank:
    """A rank's walk, and what it walks through. Its device's memory may be another update's."""

    def __init__(
        self, fleet: Fleet, schedule: Schedule, memory: Memory, share: Share, outside: Share
    ) -> None:
        self.plan = fleet.plan
        self.expected = fleet.expected
        self.device, self.ring = memory.device, memory.ring
        self._memory = memory
        rank = self.rank = self.device.rank
        self.reactor = SimulatedReactor(schedule, self.device)
        self.worker: Worker | None = None
        channel: Channel = NoWorker()
        if fleet.case.workers[rank]:
            channel = connected = SimulatedChannel(self)
            self.worker = Worker(self, connected, schedule)
            self.ring.accept_events()
        fakes: Any = {"device": self.device, "ring": self.ring, "staging": memory.staging}
        fakes |= {"checkpoint": share, "reactor": self.reactor}
        part = Part(
            plan=self.plan,
            rank=rank,
            channel=channel,
            reader=SimulatedReader(self, outside, fleet.case.places, schedule),
            deadline=Deadline.after(NEVER),
            reply_timeout=NEVER,
            **fakes,
        )
        self.mover = fleet.mover_of(self, part)
        self._pipeline = Pipeline(part, self.mover, lambda nbytes: None)
        self.device.walk = Walk(f"rank {rank}", self._walk)
        schedule.walks.append(self.device.walk)
        schedule.daemons += [self.device.copies, self.device.broadcasts]

    def _walk(self) -> None:
        self._pipeline.begin()
        self._pipeline.run()
        # Freed, as a session does next: nobody may use it from here on.
        for buffer in (self._memory.ring, self._memory.staging):
            if buffer is not None:
                use = self.device.use(buffer.bytes, "frees its memory", writes=True)
                buffer.bytes.fill_(0xDD)
                use.end()


@dataclass
class Memory:
    """What a rank keeps between updates."""

    device: SimulatedDevice
    ring: SimulatedRing
    staging: SimulatedStaging | None


class Fleet:
    """Updates of `case`, one after the other, in the same memory; `kind`: of its devices and groups."""

    def __init__(self, case: Case, kind: str) -> None:
        self.case = case
        self.kind = kind
        in_host_memory = kind == HOST_MEMORY
        metas = metas_of(case)
        readers = random.Random(case.seed)
        self.plan: UpdatePlan = make_plan(
            "c",
            {rank: held for rank, held in metas.items() if rank != OUTSIDE},
            outside={OUTSIDE: metas[OUTSIDE]},
            assign=lambda buckets: [
                (readers.randrange(len(case.held)), owner, bucket) for owner, bucket in buckets
            ],
            slot_nbytes=case.slot_nbytes,
            slot_count=case.slot_count,
            budget=2**40,
            staging=case.staging and len(case.held) > 1 and not in_host_memory,
        )
        self.hosts = Hosts.of({rank: f"host{host}" for rank, host in enumerate(case.hosts)})
        self.expected: dict[str, torch.Tensor] = {}
        self.ranks: list[SimulatedRank] = []
        self.staged: dict[tuple[int, int, int], Use] = {}  # by source, reader, bucket
        self._uses: list[Use] = []
        self._memory = []
        for rank in range(len(case.held)):
            device = SimulatedDevice(rank, self._uses, in_host_memory=in_host_memory)
            is_root = any(item.root == rank for item in self.plan.buckets)
            staging = self.plan.staging_nbytes if is_root else 0
            self._memory.append(
                Memory(
                    device,
                    SimulatedRing(device, self.plan.ring.nbytes, self.plan.ring.count),
                    SimulatedStaging(device, staging) if staging else None,
                )
            )

    def update(self, number: int) -> None:
        """Raises AssertionError: what was not as it must be."""
        seed = self.case.seed + number
        schedule = Schedule(seed)
        *shares, outside = [Share(held, seed) for held in metas_of(self.case).values()]
        self.expected = {name: data for share in (*shares, outside) for name, data in share.tensors.items()}
        self._broadcasts = Broadcasts(eager=schedule.random.random() < 0.5)
        self.ranks = []
        for memory, share in zip(self._memory, shares, strict=True):
            self.ranks.append(SimulatedRank(self, schedule, memory, share, outside))
        schedule.run()
        assert not self._uses
        for rank in self.ranks:
            if rank.worker is not None:
                assert rank.worker.parameters.keys() == self.expected.keys()
                for name, data in rank.worker.parameters.items():
                    assert torch.equal(data, self.expected[name]), f"rank {rank.rank} has {name} wrong"

    def mover_of(self, rank: SimulatedRank, part: Part) -> Mover:
        """As `update.movers.make_mover`."""
        everybody = tuple(range(len(self.case.held)))
        if len(everybody) == 1:
            return DirectMover(part)
        if self.kind != HOST_MEMORY:
            return GroupMover(part, everybody, self._group(rank, everybody))
        leaders = self.hosts.leaders
        between = self._group(rank, leaders) if len(leaders) > 1 and rank.rank in leaders else None
        return HostMover(part, self.hosts, cast(HostLinks, Links(rank, self)), between)

    def _group(self, rank: SimulatedRank, members: tuple[int, ...]) -> Collectives:
        return (StreamGroup if self.kind == NCCL else HostGroup)(rank.device, self._broadcasts, members)


class Links:
    """As `HostLinks`: notes to the ranks of this host, and views of their rings."""

    def __init__(self, rank: SimulatedRank, fleet: Fleet) -> None:
        self._rank = rank
        self._fleet = fleet

    def ring_of(self, rank: int) -> SimulatedRing:
        return self._of(rank).ring

    def tell(self, rank: int, kind: int, bucket: int) -> None:
        me, other = self._rank, self._of(rank)
        if kind == STAGED:
            # From here on the other may read it, until it says that it has.
            item = me.plan.buckets[bucket]
            slots = me.ring.view(item.ring_offset, item.nbytes)
            use = me.device.use(slots, f"bucket {bucket} for rank {rank}", writes=False)
            self._fleet.staged[me.rank, rank, bucket] = use
        else:
            assert kind == COPIED
            self._fleet.staged.pop((rank, me.rank, bucket)).end()
        other.reactor.send(
            f"rank {me.rank}", lambda: cast(HostMover, other.mover).on_note(kind, me.rank, bucket)
        )
        me.device.walk.pause("a turn after a note")

    def _of(self, rank: int) -> SimulatedRank:
        assert self._fleet.hosts.by_rank[rank] == self._fleet.hosts.by_rank[self._rank.rank]
        return self._fleet.ranks[rank]
