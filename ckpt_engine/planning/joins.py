"""How long fleets would take to join another one by P2P, or some ranks of a fleet to read what the others
hold: the very plan of each, walked at the same time.

A model, as `prediction` is. Each joiner has the plan that it would make, of the owners' metas or of those
of the joiner before it: who reads which bucket (`receivers`), how it lies in what that one keeps (`kept`),
and what of it must have come there. It reads in that order, as many buckets at once as it has places for,
or as the transport takes; what has come goes the way of all buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from ckpt_engine.errors import ConfigError
from ckpt_engine.metadata import Metas, RankMetas, topology
from ckpt_engine.planning.cluster import P2P, Cluster
from ckpt_engine.planning.fanout import OWNERS, chain
from ckpt_engine.planning.fluid import Counter, Delay, Link, Process, Reached, Simulation, Transfer
from ckpt_engine.planning.kept import KeptLayout
from ckpt_engine.planning.plan import Bucket, PlannedBucket, UpdatePlan, make_plan
from ckpt_engine.planning.prediction import GB, Prediction, Walk, prediction_of
from ckpt_engine.planning.reads import choose_receivers, staging_shape
from ckpt_engine.planning.receivers import (
    Topology,
    assign_receiver_ranks,
    balance_receiver_ranks,
    nic_count,
)
from ckpt_engine.planning.sources import Sources
from ckpt_engine.transport.rdma import share_out

Assigned = Sequence[tuple[int, int, Bucket]]
ASSIGNMENTS: dict[str, Callable[[Sequence[tuple[int, Bucket]], Topology, Topology], Assigned]] = {
    "rounds": assign_receiver_ranks,
    "balanced": balance_receiver_ranks,
    "chosen": lambda buckets, local, remote: choose_receivers(buckets, local, remote).assigned,
}
"""By name; "chosen" is what an update takes."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Slots:
    """What of the settings a plan depends on."""

    slot_nbytes: int
    slot_count: int
    budget: int


@dataclass(kw_only=True, frozen=True, slots=True)
class _Part:
    """What a bucket brings from one rank, once that has so many of its host buffers."""

    rank: int
    nbytes: int
    buffers: int


@dataclass(kw_only=True, frozen=True, slots=True)
class PlannedJoin:
    """One joiner's. `owners`: whose memory it reads, as ranks of hosts; `parts`: of each bucket; `kept`:
    its own metas once it has read, and `layouts` of each receiver. `members`: its ranks, where it is a
    subset of a fleet, which reads what the others hold."""

    plan: UpdatePlan
    members: tuple[int, ...] = ()
    owners: Metas
    parts: Mapping[int, tuple[_Part, ...]]
    kept: Metas
    layouts: Mapping[int, KeptLayout]


@dataclass(kw_only=True, frozen=True, slots=True)
class PredictedJoin:
    """Of one joiner, or subset. `assigned`: seconds of the whole by each assignment; `by`: the one that it
    takes."""

    prediction: Prediction
    assigned: dict[str, float]
    by: str


@dataclass(kw_only=True, frozen=True, slots=True)
class PredictedJoins:
    """Of `joiners` at the same time. `first`, `last`: seconds until the first and the last one is done,
    where each keeps what it reads; `owner_nbytes`: sent by the owners. `from_owners`: until the last one is
    done where none keeps anything, so that all read the owners."""

    joiners: int
    first: float
    last: float
    owner_nbytes: float
    from_owners: float


def owners_of(metas: Metas, cluster: Cluster) -> Metas:
    """`metas` as gathered by the ranks of the fleet that `cluster` joins."""
    owners, p2p = cluster.joined, _p2p_of(cluster)
    nics = p2p.nics if owners.nics is None else owners.nics
    return _on_hosts(metas, "owners", owners.ranks_per_host, nics)


def plan_join(owners: Metas, cluster: Cluster, slots: Slots, assignment: str = "chosen") -> PlannedJoin:
    """The plan of one that reads `owners`.

    Args:
        assignment: a key of ASSIGNMENTS.

    Raises:
        ConfigError: a host's RDMA devices cannot be shared out among its ranks.
        PlanError, CheckpointError: there is no plan.
    """
    empty = {
        rank: RankMetas(rank=rank, host="", host_ip="", device_uuid=f"rank-{rank}", epoch=f"kept-{rank}")
        for rank in range(cluster.world_size)
    }
    mine = _on_hosts(empty, "joiners", cluster.ranks_per_host, _p2p_of(cluster).nics)
    return _planned("joined", {}, mine, owners, Sources.of_fleets([owners]), cluster, slots, assignment)


def plan_subset(
    metas: Metas, ranks: Collection[int], cluster: Cluster, slots: Slots, assignment: str = "chosen"
) -> PlannedJoin:
    """The plan by which `ranks` of a fleet that holds `metas` are updated, while the others do nothing: what
    those hold is read by P2P. Raises as `plan_join`."""
    if outside := sorted(set(ranks) - set(metas)):
        raise ConfigError(f"rank {outside[0]} is none of the cluster's: it has 0 to {len(metas) - 1}")
    if not ranks:
        raise ConfigError("no rank to update: give at least one")
    fleet = _on_hosts(metas, "fleet", cluster.ranks_per_host, _p2p_of(cluster).nics)
    mine = {rank: held for rank, held in fleet.items() if rank in ranks}
    others = {rank: held for rank, held in fleet.items() if rank not in ranks}
    return _planned("subset", mine, mine, others, Sources(others), cluster, slots, assignment)


def _planned(
    name: str,
    held: Metas,
    members: Metas,
    owners: Metas,
    sources: Sources,
    cluster: Cluster,
    slots: Slots,
    assignment: str,
) -> PlannedJoin:
    """`held`: what members have in their own memory."""
    local, remote = topology(members), topology(sources.planned)
    plan = make_plan(
        name,
        held,
        slot_nbytes=slots.slot_nbytes,
        slot_count=slots.slot_count,
        budget=slots.budget,
        staging=len(members) > 1 and cluster.device != "cpu",
        outside=sources.planned,
        assign=lambda buckets: ASSIGNMENTS[assignment](buckets, local, remote),
    )
    read = [item for item in plan.buckets if item.receiver is not None]
    layouts = {rank: KeptLayout(plan.read_by(rank), sources) for rank in sorted({item.root for item in read})}
    return PlannedJoin(
        plan=plan,
        members=tuple(members),
        owners=owners,
        parts={item.index: _parts_of(item, sources) for item in read},
        kept={
            rank: meta.model_copy(update={"buffers": layouts[rank].buffers(0) if rank in layouts else ()})
            for rank, meta in members.items()
        },
        layouts=layouts,
    )


def predict_join(owners: Metas, cluster: Cluster, slots: Slots) -> PredictedJoin:
    """One joiner, with each assignment. Raises as `plan_join`."""
    return _predicted({name: plan_join(owners, cluster, slots, name) for name in ASSIGNMENTS}, cluster)


def predict_subset(metas: Metas, ranks: Collection[int], cluster: Cluster, slots: Slots) -> PredictedJoin:
    """An update of `ranks` alone, with each assignment. Raises as `plan_subset`."""
    joins = {name: plan_subset(metas, ranks, cluster, slots, name) for name in ASSIGNMENTS}
    # Whom it reads are ranks of hosts like its own.
    return _predicted(joins, cluster.model_copy(update={"owners": None}))


def _predicted(joins: Mapping[str, PlannedJoin], cluster: Cluster) -> PredictedJoin:
    found = {name: _join_alone(join, cluster) for name, join in joins.items()}
    same = {name for name, join in joins.items() if join.plan.buckets == joins["chosen"].plan.buckets}
    return PredictedJoin(
        prediction=found["chosen"],
        assigned={name: found[name].seconds for name in ASSIGNMENTS if name != "chosen"},
        by="rounds" if "rounds" in same else "balanced",
    )


def predict_joins(
    owners: Metas, cluster: Cluster, slots: Slots, joiners: Sequence[int]
) -> list[PredictedJoins]:
    """So many joiners at once, for each of these numbers. Raises as `plan_join`."""
    joins = _chain_of_plans(owners, cluster, slots, max(joiners))
    # Who comes later changes nothing for those before: one race tells of all numbers.
    kept = _Race(joins, cluster, keep=True, loading={0, *(count - 1 for count in joiners)})
    at_once = _p2p_of(cluster).readers

    @cache
    def from_owners(count: int) -> float:
        return max(_Race(joins[:1] * count, cluster, keep=False).seconds.values()) if count else 0.0

    return [
        PredictedJoins(
            joiners=count,
            first=kept.seconds[0],
            last=kept.seconds[count - 1],
            owner_nbytes=kept.owner_nbytes,
            # Those who are admitted at the same time end at the same time; then the next ones are.
            from_owners=count // at_once * from_owners(at_once) + from_owners(count % at_once),
        )
        for count in joiners
    ]


def _join_alone(join: PlannedJoin, cluster: Cluster) -> Prediction:
    return prediction_of(_Race([join], cluster, keep=False).walks[0])


def _chain_of_plans(owners: Metas, cluster: Cluster, slots: Slots, count: int) -> list[PlannedJoin]:
    """Each reads what the one before it keeps; after a few all are alike."""
    joins = [plan_join(owners, cluster, slots)]
    while len(joins) < count:
        before = joins[-1]
        alike = before.kept == before.owners
        joins.append(before if alike else plan_join(before.kept, cluster, slots))
    return joins


def _p2p_of(cluster: Cluster) -> P2P:
    if cluster.p2p is None:
        raise ConfigError(f"{cluster.name}: a [p2p] table must say how ranks read from other hosts")
    return cluster.p2p


def _on_hosts(metas: Metas, fleet: str, ranks_per_host: int, nics: int) -> Metas:
    """As held by ranks that can be read, on hosts with so many RDMA devices."""
    names = share_out([f"nic{number}" for number in range(nics)], ranks_per_host) if nics else None
    return {
        rank: held.model_copy(
            update={
                "host": f"{fleet}-{rank // ranks_per_host}",
                "rdma_device": names[rank % ranks_per_host] if names else None,
                "checkpoint": "joined",
                "epoch": held.epoch or f"{fleet}-{rank}",
                "session": f"{fleet}-{rank}",
                "p2p_address": "model",
                "lease_address": "model",
            }
        )
        for rank, held in metas.items()
    }


def _parts_of(item: PlannedBucket, sources: Sources) -> tuple[_Part, ...]:
    return tuple(
        _Part(
            rank=sources.by_number[number].rank,
            nbytes=sum(extent.nbytes for extent in extents),
            buffers=max(extent.buffer for extent in extents) + 1,
        )
        for number, extents in sources.reads_of(item.bucket).items()
    )


@dataclass(kw_only=True)
class _Side:
    """Whom a joiner reads: by rank, what sends, and how many host buffers are there (no counter: all)."""

    sends: Mapping[int, Link]
    present: Mapping[int, Counter] = field(default_factory=dict)


class _Race:
    """Joiners who come at once; runs when it is made. `seconds`: of joiners by number, with all stages.

    Args:
        keep: each has a place for every bucket, and reads the joiner before it (`fanout.chain`). Else it has
            a staging buffer, and all read the owners.
        loading: those whose own copies and workers are simulated too, for which no read waits where all is
            kept; None: all.
    """

    def __init__(
        self,
        joins: Sequence[PlannedJoin],
        cluster: Cluster,
        *,
        keep: bool,
        loading: Collection[int] | None = None,
    ) -> None:
        self._cluster, self._p2p, self._keep = cluster, _p2p_of(cluster), keep
        self._simulation = Simulation()
        self._loading = range(len(joins)) if loading is None else loading
        owners = _Side(sends=_nics_of(joins[0].owners, cluster.joined.nic or self._p2p.nic))
        sources = chain(len(joins)).sources if keep else (OWNERS,) * len(joins)
        self.walks: list[Walk] = []
        sides: list[_Side] = []
        for number, (join, source) in enumerate(zip(joins, sources, strict=True)):
            walk = Walk(plan=join.plan, cluster=cluster, members=join.members, simulation=self._simulation)
            mine = _Side(
                sends=_nics_of(join.kept, self._p2p.nic), present={rank: Counter() for rank in join.layouts}
            )
            whom = owners if source == OWNERS else sides[source]
            self._simulation.start(self._join(number, walk, join, whom, mine))
            self.walks.append(walk)
            sides.append(mine)
        self._simulation.run()
        self.seconds = {number: prediction_of(self.walks[number]).seconds for number in self._loading}
        self.owner_nbytes = sum(link.nbytes for link in set(owners.sends.values()))

    def _join(self, number: int, walk: Walk, join: PlannedJoin, whom: _Side, mine: _Side) -> Process:
        if self._keep:
            yield Delay(number * self._cluster.seconds.announce)
        receives = _nics_of(join.kept, self._p2p.nic)
        walk.links["P2P, who is read"] = list(dict.fromkeys(whom.sends.values()))
        walk.links["P2P, who reads"] = list(dict.fromkeys(receives[rank] for rank in join.layouts))
        for rank in join.layouts:
            items = join.plan.read_by(rank)
            came = [Counter() for _ in items]
            self._simulation.start(
                self._reads(walk, join, items, came, whom, receives[rank]),
                self._comes(walk, join, items, came, mine.present[rank]),
            )
        if number in self._loading:
            walk.start()

    def _reads(
        self,
        walk: Walk,
        join: PlannedJoin,
        items: Sequence[PlannedBucket],
        came: Sequence[Counter],
        whom: _Side,
        receives: Link,
    ) -> Process:
        """A receiver starts its reads, in order."""
        places = len(items) if self._keep else staging_shape(items)[1]
        ended = Counter()
        for number, item in enumerate(items):
            for part in join.parts[item.index]:
                if part.rank in whom.present:
                    yield Reached(whom.present[part.rank], part.buffers)
            yield Reached(walk.copied[item.root], number - places + 1)
            yield Reached(ended, number - self._p2p.at_once + 1)
            self._simulation.start(
                *(
                    self._read(part.nbytes, (whom.sends[part.rank], receives), came[number])
                    for part in join.parts[item.index]
                ),
                self._ends(came[number], len(join.parts[item.index]), ended),
            )

    def _read(self, nbytes: int, links: tuple[Link, ...], came: Counter) -> Process:
        yield Transfer(nbytes, links)
        self._simulation.add(came)

    def _ends(self, came: Counter, parts: int, ended: Counter) -> Process:
        yield Reached(came, parts)
        self._simulation.add(ended)

    def _comes(
        self,
        walk: Walk,
        join: PlannedJoin,
        items: Sequence[PlannedBucket],
        came: Sequence[Counter],
        present: Counter,
    ) -> Process:
        """Buckets count as here in their order, once the lease was looked at."""
        layout = join.layouts[items[0].root]
        for item, one in zip(items, came, strict=True):
            yield Reached(one, len(join.parts[item.index]))
            yield Delay(self._cluster.seconds.read)
            self._simulation.add(walk.here[item.index])
            self._simulation.add(present, layout.present[item.index] - present.value)


def _nics_of(metas: Metas, gb_per_second: float) -> dict[int, Link]:
    """By rank, one direction of what it reads or sends through; ranks behind the same have the same."""
    links: dict[int, Link] = {}
    for device, ranks in topology(metas).items():
        links |= dict.fromkeys(ranks, Link(device, gb_per_second * GB * nic_count(device)))
    return links
