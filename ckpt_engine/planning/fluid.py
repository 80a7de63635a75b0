"""A small simulator: processes that wait for each other, and transfers that share links fairly.

A process is a generator. It yields what it waits for:

    def owner():
        for nbytes in sizes:
            yield Reached(emptied, 1)            # until a counter has come so far
            yield Transfer(nbytes, (pcie, nic))  # until the bytes have gone through all these links
            yield Delay(0.001)                   # seconds
            simulation.add(filled)

Transfers that go on at the same time share each link as equally as the other links let them (max-min
fairness). Nothing is random: the same processes take the same time, on every rank that asks.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field

from ckpt_engine.errors import PlanError


@dataclass(eq=False, slots=True)
class Link:
    """Something that bytes go through. `capacity`: bytes per second.

    After a run, `nbytes` went through it, in `busy` seconds in which anything did.
    """

    name: str
    capacity: float
    nbytes: float = 0.0
    busy: float = 0.0
    flows: dict[_Flow, None] = field(default_factory=dict)
    since: float = 0.0

    def __post_init__(self) -> None:
        if not self.capacity > 0:
            raise PlanError(f"{self.name}: {self.capacity} bytes per second is not above 0")


@dataclass(eq=False, slots=True)
class Counter:
    """Counts up; processes wait until it has reached a value."""

    value: int = 0
    waiting: list[tuple[int, int, Process]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Delay:
    seconds: float


@dataclass(frozen=True, slots=True)
class Reached:
    counter: Counter
    value: int


@dataclass(frozen=True, slots=True)
class Transfer:
    nbytes: float
    links: tuple[Link, ...]


Process = Generator[Delay | Reached | Transfer, None, None]


@dataclass(eq=False, slots=True)
class _Flow:
    links: tuple[Link, ...]
    left: float
    process: Process
    rate: float = 0.0
    since: float = 0.0
    version: int = 0


class Simulation:
    """Runs processes; `now` is in seconds from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Process | _Flow, int]] = []
        self._order = 0
        self._waiting = 0
        self._changed: dict[Link, None] = {}

    def start(self, *processes: Process) -> None:
        """They take their first steps when `run` is called, or at once if it was."""
        for process in processes:
            self._at(self.now, process)

    def add(self, counter: Counter, by: int = 1) -> None:
        """Counts up, and wakes whoever waited for that."""
        counter.value += by
        while counter.waiting and counter.waiting[0][0] <= counter.value:
            _, _, process = heapq.heappop(counter.waiting)
            self._waiting -= 1
            self._at(self.now, process)

    def run(self) -> float:
        """Until nothing goes on any more; the seconds that took.

        Raises:
            PlanError: processes wait for each other for ever.
        """
        while self._events or self._changed:
            if self._changed and (not self._events or self._events[0][0] > self.now):
                self._share()
                continue
            time, _, what, version = heapq.heappop(self._events)
            if isinstance(what, _Flow):
                if what.version != version:
                    continue
                self.now = time
                self._end(what)
                what = what.process
            self.now = time
            self._step(what)
        if self._waiting:
            raise PlanError(f"{self._waiting} processes of the simulation wait for ever")
        return self.now

    def _at(self, time: float, what: Process | _Flow, version: int = 0) -> None:
        self._order += 1
        heapq.heappush(self._events, (time, self._order, what, version))

    def _step(self, process: Process) -> None:
        wait = next(process, None)
        if wait is None:
            return
        if isinstance(wait, Delay):
            self._at(self.now + wait.seconds, process)
        elif isinstance(wait, Reached):
            if wait.counter.value >= wait.value:
                self._at(self.now, process)
            else:
                self._order += 1
                self._waiting += 1
                heapq.heappush(wait.counter.waiting, (wait.value, self._order, process))
        elif wait.nbytes <= 0 or not wait.links:
            self._at(self.now, process)
        else:
            flow = _Flow(wait.links, wait.nbytes, process, since=self.now)
            for link in wait.links:
                if not link.flows:
                    link.since = self.now
                link.flows[flow] = None
                link.nbytes += wait.nbytes
                self._changed[link] = None

    def _end(self, flow: _Flow) -> None:
        flow.version += 1
        for link in flow.links:
            del link.flows[flow]
            if not link.flows:
                link.busy += self.now - link.since
            self._changed[link] = None

    def _share(self) -> None:
        """Gives every flow that a change may concern its fair rate."""
        links, self._changed = self._changed, {}
        todo = list(links)
        while todo:
            for flow in todo.pop().flows:
                for link in flow.links:
                    if link not in links:
                        links[link] = None
                        todo.append(link)
        for flow, rate in _fair(links).items():
            if rate != flow.rate:
                flow.left = max(0.0, flow.left - flow.rate * (self.now - flow.since))
                flow.rate, flow.since = rate, self.now
                flow.version += 1
                self._at(self.now + flow.left / rate, flow, flow.version)


def _fair(links: Iterable[Link]) -> dict[_Flow, float]:
    """Max-min fair rates: again and again the tightest link's flows get equal shares of what it has left."""
    left = {link: [link.capacity, len(link.flows)] for link in links if link.flows}
    shares = [
        (capacity / count, number, link) for number, (link, (capacity, count)) in enumerate(left.items())
    ]
    heapq.heapify(shares)
    rates: dict[_Flow, float] = {}
    while shares:
        share, number, link = heapq.heappop(shares)
        capacity, count = left[link]
        if not count:
            continue
        if capacity / count > share:  # others of its flows turned out to need less
            heapq.heappush(shares, (capacity / count, number, link))
            continue
        for flow in link.flows:
            if flow not in rates:
                rates[flow] = share
                for other in flow.links:
                    rest = left[other]
                    rest[0] = max(0.0, rest[0] - share)
                    rest[1] -= 1
    return rates
