"""The simulator: times worked out by hand, and max-min fairness checked by its definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_engine.errors import PlanError
from ckpt_engine.planning.fluid import (
    Counter,
    Delay,
    Link,
    Process,
    Reached,
    Simulation,
    Transfer,
    _fair,
    _Flow,
)

reproducible = settings(derandomize=True, print_blob=True, deadline=None, max_examples=300)


def move(simulation: Simulation, ends: list[float], nbytes: float, *links: Link, after: float = 0) -> Process:
    yield Delay(after)
    yield Transfer(nbytes, links)
    ends.append(simulation.now)


def test_transfers_share_a_link() -> None:
    """100 B/s. The first has 200 B; the second comes after 1 s with 50 B: each gets 50 B/s, and it is done at
    2 s. The first has then had 100 + 50 B, and does the other 50 at 100 B/s: done at 2.5 s."""
    simulation, ends = Simulation(), [[], []]
    link = Link("nic", 100)
    simulation.start(move(simulation, ends[0], 200, link), move(simulation, ends[1], 50, link, after=1))
    assert simulation.run() == pytest.approx(2.5)
    assert ends == [[pytest.approx(2.5)], [pytest.approx(2.0)]]
    assert (link.nbytes, link.busy) == (250, pytest.approx(2.5))


def test_what_one_cannot_use_the_others_get() -> None:
    """Two go through a NIC of 100 B/s, one of them through a disk of 20 B/s as well: 20 and 80 B/s.
    160 B at 80 B/s: 2 s. The other: 80 B at 20 B/s: 4 s."""
    simulation, ends = Simulation(), [[], []]
    nic, disk = Link("nic", 100), Link("disk", 20)
    simulation.start(move(simulation, ends[0], 160, nic), move(simulation, ends[1], 80, nic, disk))
    assert simulation.run() == pytest.approx(4)
    assert ends[0] == [pytest.approx(2)]


def test_processes_wait_for_counters() -> None:
    """A producer makes one every second, a consumer takes 1.5 s for each: it ends 1.5 s after the last but
    one was begun: 1 + 1.5 * 3."""
    simulation = Simulation()
    made = Counter()

    def produce() -> Process:
        for _ in range(3):
            yield Delay(1)
            simulation.add(made)

    def consume() -> Process:
        for number in range(3):
            yield Reached(made, number + 1)
            yield Delay(1.5)

    simulation.start(consume(), produce())
    assert simulation.run() == pytest.approx(5.5)


def test_a_cycle_of_waits_is_an_error() -> None:
    simulation = Simulation()
    never = Counter()

    def wait() -> Process:
        yield Reached(never, 1)

    simulation.start(wait(), wait())
    with pytest.raises(PlanError, match="2 processes of the simulation wait for ever"):
        simulation.run()


def test_nothing_takes_no_time() -> None:
    simulation, ends = Simulation(), []
    simulation.start(move(simulation, ends, 0, Link("nic", 1)), move(simulation, ends, 10))
    assert simulation.run() == 0
    assert ends == [0, 0]


@pytest.mark.parametrize("capacity", [0, -1, float("nan")])
def test_a_link_needs_a_rate(capacity: float) -> None:
    with pytest.raises(PlanError, match="nic 3"):
        Link("nic 3", capacity)


@st.composite
def networks(draw: st.DrawFn) -> list[Link]:
    links = [Link(f"l{number}", draw(st.integers(1, 50))) for number in range(draw(st.integers(1, 5)))]
    for _ in range(draw(st.integers(1, 8))):
        used = draw(st.lists(st.sampled_from(links), min_size=1, max_size=3, unique_by=id))
        flow = _Flow(tuple(used), 1.0, move(Simulation(), [], 1))
        for link in used:
            link.flows[flow] = None
    return links


@reproducible
@given(networks())
def test_rates_are_max_min_fair(links: list[Link]) -> None:
    """By definition: no link carries more than it can, and every flow has a full link on which nobody has
    more than it."""
    rates = _fair(links)
    flows = {flow for link in links for flow in link.flows}
    assert rates.keys() == flows
    loads = {link: sum(rates[flow] for flow in link.flows) for link in links}
    assert all(load <= link.capacity * (1 + 1e-9) for link, load in loads.items())
    for flow in flows:
        assert any(
            loads[link] >= link.capacity * (1 - 1e-9)
            and all(rates[other] <= rates[flow] * (1 + 1e-9) for other in link.flows)
            for link in flow.links
        )


@reproducible
@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 20)), min_size=1, max_size=8))
def test_a_link_is_never_idle_while_there_is_work(jobs: list[tuple[int, int]]) -> None:
    """So all are done when one after the other would be: the end of the last busy period."""
    simulation = Simulation()
    link = Link("nic", 100)
    simulation.start(*(move(simulation, [], nbytes, link, after=after) for nbytes, after in jobs))
    free = 0.0
    for nbytes, after in sorted(jobs, key=lambda job: job[1]):
        free = max(free, after) + nbytes / 100
    assert simulation.run() == pytest.approx(free)
