"""Many joiners at once: who reads from whom, so that owners send each byte to a few of them at most.

A joiner is a source for others from its first bucket on. So joiners form trees below the owners, and a bucket
goes down as it comes. With one reader each they are chains, in which every NIC receives and sends at full
speed, and the last one is late by one bucket for each that is before it. With more readers trees are flatter,
and slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_engine.errors import PlanError
from ckpt_engine.planning.fluid import Counter, Link, Process, Reached, Simulation, Transfer

OWNERS = -1
"""In place of a joiner's number: the owners."""


@dataclass(kw_only=True, frozen=True, slots=True)
class FanOut:
    """`sources`: for each joiner the joiner that it reads from, or `OWNERS`; always one before it.
    `owner_readers`, `joiner_readers`: how many read from the owners, and from a joiner, at most."""

    sources: tuple[int, ...]
    owner_readers: int
    joiner_readers: int


@dataclass(kw_only=True, frozen=True, slots=True)
class FanOutRates:
    """Bytes per second that the owners send, and that each joiner receives and sends, at most."""

    owners: float = 25e9
    joiner: float = 25e9


@dataclass(kw_only=True, frozen=True, slots=True)
class PredictedFanOut:
    """`seconds`: until the last joiner has all; `first`: until the first has. `owner_nbytes`: sent by the
    owners."""

    plan: FanOut
    seconds: float
    first: float
    owner_nbytes: float


def fan_out(joiners: int, *, owner_readers: int, joiner_readers: int) -> FanOut:
    """Trees of `joiners`, filled level by level: as flat as the numbers of readers allow.

    Raises:
        PlanError: one of the numbers is below 1.
    """
    if min(joiners, owner_readers, joiner_readers) < 1:
        raise PlanError(
            f"{joiners} joiners, {owner_readers} readers of the owners and {joiner_readers} of a joiner: "
            "give at least one of each"
        )
    sources = [
        OWNERS if joiner < owner_readers else (joiner - owner_readers) // joiner_readers
        for joiner in range(joiners)
    ]
    return FanOut(sources=tuple(sources), owner_readers=owner_readers, joiner_readers=joiner_readers)


def chain(joiners: int) -> FanOut:
    """The trees that joiners form: each reads the one before it. No other ones are faster by the model."""
    return fan_out(joiners, owner_readers=1, joiner_readers=1)


def predict_fan_out(plan: FanOut, buckets: Sequence[int], rates: FanOutRates) -> PredictedFanOut:
    """Simulates the plan: each joiner reads the buckets, of these sizes in bytes, one after the other, each
    as soon as its source has it."""
    simulation = Simulation()
    owners = Link("owners", rates.owners)
    sends = [Link(f"joiner {joiner} sends", rates.joiner) for joiner in range(len(plan.sources))]
    receives = [Link(f"joiner {joiner} receives", rates.joiner) for joiner in range(len(plan.sources))]
    held = [Counter() for _ in plan.sources]
    ends: list[float] = []

    def join(joiner: int) -> Process:
        source = plan.sources[joiner]
        sender = owners if source == OWNERS else sends[source]
        for number, nbytes in enumerate(buckets):
            if source != OWNERS:
                yield Reached(held[source], number + 1)
            yield Transfer(nbytes, (sender, receives[joiner]))
            simulation.add(held[joiner])
        ends.append(simulation.now)

    simulation.start(*map(join, range(len(plan.sources))))
    simulation.run()
    return PredictedFanOut(plan=plan, seconds=max(ends), first=min(ends), owner_nbytes=owners.nbytes)


def plan_fan_out(
    joiners: int, buckets: Sequence[int], rates: FanOutRates, *, most_owner_readers: int = 2
) -> PredictedFanOut:
    """The trees in which the last joiner has all the soonest, by simulation; of equally fast ones those in
    which the owners send less.

    Args:
        most_owner_readers: so many joiners, at most, read from the owners: they send each byte so often.
    """
    shapes = [
        fan_out(joiners, owner_readers=top, joiner_readers=below)
        for top in range(1, min(most_owner_readers, joiners) + 1)
        for below in (1, 2, 4)
    ]
    found = [predict_fan_out(plan, buckets, rates) for plan in dict.fromkeys(shapes)]
    return min(found, key=lambda one: (round(one.seconds, 6), one.owner_nbytes, one.plan.joiner_readers))
