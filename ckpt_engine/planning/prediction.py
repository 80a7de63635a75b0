"""How long an update would take: the very plan, walked by simulated ranks on a cluster in figures.

A model. It has the walk of the movers (`update/`), their credits and staging buffers, and links that are
shared fairly; it has neither contention that the figures do not know, nor a host's own slowness. What comes
by P2P, and from whom, is in `joins`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckpt_engine.planning.cluster import Cluster
from ckpt_engine.planning.fluid import Counter, Delay, Link, Process, Reached, Simulation, Transfer
from ckpt_engine.planning.plan import PlannedBucket, UpdatePlan

GB = 1e9


@dataclass(kw_only=True, frozen=True, slots=True)
class LinkUse:
    """The busiest of a kind of links: bytes through it, and the seconds in which any went. Rates in GB/s."""

    kind: str
    count: int
    nbytes: float
    busy: float
    rate: float
    capacity: float


@dataclass(kw_only=True, frozen=True, slots=True)
class Prediction:
    """`stages`: seconds of each, as in an `UpdateReport`. `bottleneck`: the kind of link that takes
    longest for its bytes, by itself."""

    seconds: float
    stages: dict[str, float]
    links: tuple[LinkUse, ...]
    bottleneck: str


def predict(plan: UpdatePlan, cluster: Cluster) -> Prediction:
    """Every rank of the cluster is updated, each by a worker of its own."""
    walk = Walk(plan=plan, cluster=cluster)
    walk.start()
    walk.simulation.run()
    return prediction_of(walk)


def prediction_of(walk: Walk) -> Prediction:
    """Of one whose simulation has run."""
    own = walk.cluster.seconds
    stages = {
        "begin": own.begin,
        "handshake": own.handshake,
        "buckets": walk.end,
        "release": own.release,
        "post_hook": own.post_hook,
        "decide": own.decide,
        "publish": own.publish,
    }
    links = tuple(_use(kind, links) for kind, links in walk.links.items() if any(one.nbytes for one in links))
    return Prediction(
        seconds=sum(stages.values()),
        stages=stages,
        links=links,
        bottleneck=max(links, key=lambda use: use.nbytes / use.capacity).kind if links else "",
    )


def _use(kind: str, links: list[Link]) -> LinkUse:
    busiest = max(links, key=lambda link: link.busy)
    return LinkUse(
        kind=kind,
        count=len(links),
        nbytes=busiest.nbytes,
        busy=busiest.busy,
        rate=busiest.nbytes / busiest.busy / GB if busiest.busy else 0.0,
        capacity=busiest.capacity / GB,
    )


@dataclass(kw_only=True)
class Walk:
    """A fleet's way through a plan. `links`: by their kinds; `end`: when its last worker had loaded all.

    Of what comes by P2P: `here[index]` counts to 1 when a bucket lies in its receiver's host memory,
    `copied[rank]` the buckets that a receiver has copied out of there. `members`: the ranks that are updated.
    """

    plan: UpdatePlan
    cluster: Cluster
    members: Sequence[int] = ()
    simulation: Simulation = field(default_factory=Simulation)
    links: dict[str, list[Link]] = field(default_factory=dict)
    here: dict[int, Counter] = field(init=False)
    copied: dict[int, Counter] = field(init=False)
    end: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.members = sorted(self.members) or range(self.cluster.world_size)
        read = [item for item in self.plan.buckets if item.receiver is not None]
        self.here = {item.index: Counter() for item in read}
        self.copied = {item.root: Counter() for item in read}

    def start(self) -> None:
        """Its processes; whoever brings what is read adds to `here`."""
        if self.cluster.device == "cpu":
            _on_hosts(self)
        else:
            _on_devices(self)

    def on_hosts(self) -> dict[int, list[int]]:
        """The members of each host that has any."""
        found: dict[int, list[int]] = {}
        for rank in self.members:
            found.setdefault(self.cluster.host_of(rank), []).append(rank)
        return found

    def link(self, kind: str, gb_per_second: float) -> Link:
        link = Link(kind, gb_per_second * GB)
        self.links.setdefault(kind, []).append(link)
        return link

    def is_here(self, item: PlannedBucket) -> bool:
        return item.receiver is None or self.here[item.index].value > 0

    def from_host(self, item: PlannedBucket, links: tuple[Link, ...]) -> Process:
        """The root's copy of a bucket out of its host memory, once it is there."""
        if item.receiver is not None:
            yield Reached(self.here[item.index], 1)
        yield Transfer(item.nbytes, links)
        if item.receiver is not None:
            self.simulation.add(self.copied[item.receiver])

    def reload(self, links: tuple[Link, ...], arrived: Counter, given_back: Counter) -> Process:
        """A worker. Those of all devices have the same work at the same times: one stands for all."""
        own = self.cluster.seconds
        for item in self.plan.buckets:
            yield Reached(arrived, item.index + 1)
            yield Delay(own.bucket + own.tensor * len(item.bucket.tensors))
            yield Transfer(item.nbytes, links)
            self.simulation.add(given_back)
        self.end = max(self.end, self.simulation.now)


# Devices of their own: update/device_movers.py


def _on_devices(walk: Walk) -> None:
    plan, cluster = walk.plan, walk.cluster
    arrived, given_back = Counter(), Counter()
    rates = cluster.rates
    hosts: dict[int, Link] = {}
    h2d: dict[int, tuple[Link, ...]] = {}
    for rank in sorted({item.root for item in plan.buckets}):
        host = cluster.host_of(rank)
        if rates.h2d_host is not None and host not in hosts:
            hosts[host] = walk.link("H2D of a host", rates.h2d_host)
        h2d[rank] = (walk.link("H2D", rates.h2d), *([hosts[host]] if host in hosts else []))
    workers = (walk.link("reload", rates.reload),)
    walk.simulation.start(walk.reload(workers, arrived, given_back))
    if len(walk.members) == 1:
        walk.simulation.start(_straight(walk, h2d, arrived, given_back))
        return
    own = {rank: [item for item in plan.buckets if item.root == rank] for rank in h2d}
    filled, emptied = ({rank: Counter() for rank in own} for _ in range(2))
    if plan.staging_nbytes:
        walk.simulation.start(
            *(_stage(walk, own[rank], h2d[rank], filled[rank], emptied[rank]) for rank in own)
        )
    walk.simulation.start(_broadcast(walk, h2d, (filled, emptied), arrived, given_back))


def _straight(walk: Walk, h2d: dict[int, tuple[Link, ...]], arrived: Counter, given_back: Counter) -> Process:
    """A lone rank."""
    for item in walk.plan.buckets:
        yield Reached(given_back, item.waits_for + 1)
        yield from walk.from_host(item, h2d[item.root])
        walk.simulation.add(arrived)


def _stage(
    walk: Walk, items: list[PlannedBucket], links: tuple[Link, ...], filled: Counter, emptied: Counter
) -> Process:
    for number, item in enumerate(items):
        yield Reached(emptied, number)
        yield from walk.from_host(item, links)
        walk.simulation.add(filled)


def _broadcast(
    walk: Walk,
    h2d: dict[int, tuple[Link, ...]],
    staging: tuple[dict[int, Counter], dict[int, Counter]],
    arrived: Counter,
    given_back: Counter,
) -> Process:
    """All ranks' broadcast streams, which go the same way at the same time."""
    filled, emptied = staging
    cluster, rates = walk.cluster, walk.cluster.rates
    links = [walk.link("broadcast", rates.broadcast)]
    hosts = len(walk.on_hosts())
    if hosts > 1:
        links.append(walk.link("between hosts", rates.between_hosts or rates.broadcast))
    steps = math.ceil(math.log2(hosts)) * cluster.seconds.step
    for item in walk.plan.buckets:
        yield Reached(given_back, item.waits_for + 1)
        if walk.plan.staging_nbytes:
            yield Reached(filled[item.root], emptied[item.root].value + 1)
            yield Delay(item.nbytes / rates.copy_ / GB)
            walk.simulation.add(emptied[item.root])
        else:
            yield from walk.from_host(item, h2d[item.root])
        yield Delay(steps)
        yield Transfer(item.nbytes, tuple(links))
        walk.simulation.add(arrived)


# Rings in host memory: update/host_mover.py


def _on_hosts(walk: Walk) -> None:
    cluster, rates = walk.cluster, walk.cluster.rates
    on_hosts = walk.on_hosts()
    memory = {host: walk.link("memory of a host", rates.memory or 1e9) for host in on_hosts}
    network = {host: walk.link("between hosts", rates.between_hosts or 1e9) for host in on_hosts}
    count = len(walk.plan.buckets)
    # On each host the rank from whose ring the others copy has the bucket.
    staged = {host: [Counter() for _ in range(count)] for host in on_hosts}
    copied = {host: [Counter() for _ in range(count)] for host in on_hosts}
    for rank in walk.members:
        host = cluster.host_of(rank)
        links = (walk.link("copies of a rank", rates.h2d), memory[host])
        one = _HostRank(
            walk=walk,
            rank=rank,
            neighbours=on_hosts[host],
            links=links,
            network=network,
            staged=staged,
            copied=copied[host],
        )
        workers = (walk.link("reload", rates.reload), memory[host])
        walk.simulation.start(
            one.walks(), one.announces(), walk.reload(workers, one.announced, one.given_back)
        )


@dataclass(kw_only=True)
class _HostRank:
    """One rank whose ring lies in host memory: its one thread, and its worker. `neighbours`: the members of
    its host."""

    walk: Walk
    rank: int
    neighbours: Sequence[int]
    links: tuple[Link, ...]
    network: Mapping[int, Link]
    staged: Mapping[int, list[Counter]]
    copied: list[Counter]
    here: Counter = field(default_factory=Counter)
    announced: Counter = field(default_factory=Counter)
    given_back: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._cluster = self.walk.cluster
        self._host = self._cluster.host_of(self.rank)
        self._leader = self.neighbours[0]
        self._own = deque(item for item in self.walk.plan.buckets if item.root == self.rank)

    def _is_source(self, item: PlannedBucket) -> bool:
        return self.rank == (item.root if self._is_local(item) else self._leader)

    def _is_local(self, item: PlannedBucket) -> bool:
        return self._cluster.host_of(item.root) == self._host

    def _stages_ahead(self) -> Process:
        while (
            self._own and self._own[0].waits_for < self.given_back.value and self.walk.is_here(self._own[0])
        ):
            yield from self._stages()

    def _stages(self) -> Process:
        item = self._own.popleft()
        yield from self.walk.from_host(item, self.links)
        self.walk.simulation.add(self.staged[self._host][item.index])

    def walks(self) -> Process:
        add = self.walk.simulation.add
        for item in self.walk.plan.buckets:
            yield from self._stages_ahead()
            yield Reached(self.given_back, item.waits_for + 1)
            yield from self._stages_ahead()
            if self._own and self._own[0] is item:
                yield from self._stages()  # it waits for the read
            if self._is_local(item) or self.rank != self._leader:
                yield Reached(self.staged[self._host][item.index], 1)
                if not self._is_source(item):
                    yield Transfer(item.nbytes, self.links)
                    add(self.copied[item.index])
            else:
                theirs = self._cluster.host_of(item.root)
                yield Reached(self.staged[theirs][item.index], 1)
                yield Transfer(item.nbytes, (self.network[theirs], self.network[self._host]))
                add(self.staged[self._host][item.index])
            add(self.here)

    def announces(self) -> Process:
        """Not before nobody reads the bucket from this ring any more."""
        readers = len(self.neighbours) - 1
        for item in self.walk.plan.buckets:
            yield Reached(self.here, item.index + 1)
            if self._is_source(item):
                yield Reached(self.copied[item.index], readers)
            self.walk.simulation.add(self.announced)
