"""How long a P2P update's reads take by a given assignment, and which assignment is the better one.

A model of what receivers do: each reads its buckets ahead into a few places in host memory, copies them one
after the other into its staging buffer on the device, and broadcasts each in its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ckpt_engine.planning.fluid import Counter, Link, Process, Reached, Simulation, Transfer
from ckpt_engine.planning.receivers import (
    HasSize,
    Topology,
    assign_receiver_ranks,
    balance_receiver_ranks,
    nic_count,
)

S = TypeVar("S", bound=HasSize)

STAGING_NBYTES = 128 * 1024 * 1024
"""About as much as a receiver reads ahead, in at least 3 and at most 8 buckets."""


def staging_shape(items: Sequence[HasSize]) -> tuple[int, int]:
    """Bytes of a place in the staging buffer of whoever reads these, and how many places it has."""
    nbytes = max(item.nbytes for item in items)
    return nbytes, min(max(STAGING_NBYTES // max(nbytes, 1), 3), 8, len(items))


@dataclass(kw_only=True, frozen=True, slots=True)
class ReadRates:
    """Bytes per second: `nic` through each RDMA device, `h2d` from host memory to a device, `broadcast` to
    all receiving ranks. `places`: how many buckets a receiver reads at once."""

    nic: float = 25e9
    h2d: float = 50e9
    broadcast: float = 150e9
    places: int = 3


@dataclass(kw_only=True, frozen=True, slots=True)
class ChosenReads(Generic[S]):
    """`seconds`: what each assignment would take, by its name; `by`: the name of the one that was taken."""

    assigned: list[tuple[int, int, S]]
    by: str
    seconds: dict[str, float]


def choose_receivers(
    buckets: Sequence[tuple[int, S]],
    local_topo: Topology,
    remote_topo: Topology,
    rates: ReadRates | None = None,
) -> ChosenReads[S]:
    """The assignment that takes less time by the model: in rounds (`assign_receiver_ranks`), or balanced
    (`balance_receiver_ranks`); in rounds where both take as long. Raises what they raise."""
    rates = rates or ReadRates()
    candidates = {
        "rounds": assign_receiver_ranks(buckets, local_topo, remote_topo),
        "balanced": balance_receiver_ranks(buckets, local_topo, remote_topo),
    }
    if candidates["rounds"] == candidates["balanced"]:
        del candidates["balanced"]
    seconds = {
        name: predict_reads(assigned, local_topo, remote_topo, rates) for name, assigned in candidates.items()
    }
    best = min(seconds, key=lambda name: seconds[name])
    return ChosenReads(assigned=candidates[best], by=best, seconds=seconds)


def predict_reads(
    assigned: Sequence[tuple[int, int, HasSize]],
    local_topo: Topology,
    remote_topo: Topology,
    rates: ReadRates,
) -> float:
    """Seconds until the last bucket of `assigned` (receiver, owner, bucket) has been broadcast."""
    simulation = Simulation()
    nics = {
        (side, rank): link
        for side, topo in (("receiver", local_topo), ("owner", remote_topo))
        for device, ranks in topo.items()
        for link in (Link(device, rates.nic * nic_count(device)),)
        for rank in ranks
    }
    receivers = {rank: _Receiver(simulation, rates) for rank, _, _ in assigned}
    for receiver, owner, bucket in assigned:
        links = (nics["owner", owner], nics["receiver", receiver])
        receivers[receiver].plan(bucket.nbytes, links)
    for one in receivers.values():
        one.start()
    simulation.start(_broadcast(assigned, receivers, simulation, Link("broadcast", rates.broadcast)))
    return simulation.run()


class _Receiver:
    """Its reads, and the copies out of its places. `staged`, `emptied`: how many buckets went into and out of
    its staging buffer."""

    def __init__(self, simulation: Simulation, rates: ReadRates) -> None:
        self.staged, self.emptied = Counter(), Counter()
        self._simulation = simulation
        self._rates = rates
        self._reads: list[tuple[int, tuple[Link, ...], Counter]] = []
        self._free = Counter(rates.places)

    def plan(self, nbytes: int, links: tuple[Link, ...]) -> None:
        self._reads.append((nbytes, links, Counter()))

    def start(self) -> None:
        self._simulation.start(*map(self._read, range(len(self._reads))), self._stage())

    def _read(self, number: int) -> Process:
        nbytes, links, here = self._reads[number]
        yield Reached(self._free, number + 1)
        yield Transfer(nbytes, links)
        self._simulation.add(here)

    def _stage(self) -> Process:
        pcie = (Link("H2D", self._rates.h2d),)
        for number, (nbytes, _, here) in enumerate(self._reads):
            yield Reached(here, 1)
            yield Reached(self.emptied, number)
            yield Transfer(nbytes, pcie)
            self._simulation.add(self._free)
            self._simulation.add(self.staged)


def _broadcast(
    assigned: Sequence[tuple[int, int, HasSize]],
    receivers: dict[int, _Receiver],
    simulation: Simulation,
    link: Link,
) -> Process:
    for receiver, _, bucket in assigned:
        one = receivers[receiver]
        yield Reached(one.staged, one.emptied.value + 1)
        yield Transfer(bucket.nbytes, (link,))
        simulation.add(one.emptied)
