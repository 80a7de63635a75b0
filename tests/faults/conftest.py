"""Launches that tests share, and the table of how soon faults were reported."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports_for_fault_tests import Reports
from world_for_fault_tests import NewWorld, World, Worlds

from tests.support.steered import Engines, Fleet

_REPORTS = Reports()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Where several processes run the tests, their reports go to the one that has them run.
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["faults"] = _REPORTS.seconds


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401 - xdist's
    for fault, seconds in getattr(node, "workeroutput", {}).get("faults", {}).items():
        _REPORTS.add(fault, seconds, math.inf)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _REPORTS.seconds:
        terminalreporter.section("faults, and how soon the last survivor had reported each")
        for line in _REPORTS.table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    made = Engines(tmp_path_factory.mktemp("engines"))
    yield made
    made.end()


@pytest.fixture(scope="session")
def new_world(tmp_path_factory: pytest.TempPathFactory, shared: Engines) -> Iterator[NewWorld]:
    """Launches ranks. `engines`: those they are to feed, which outlive them; `like`: a world whose place
    they take."""
    seeds = itertools.count(20270101)
    fleets: list[Fleet] = []

    def launch(
        size: int,
        hosts: int,
        engines: Engines | None = None,
        *,
        like: World | None = None,
        kind: str = "layers",
    ) -> World:
        fleet = Fleet(
            size,
            hosts,
            tmp_path_factory.mktemp("fleet"),
            engines or shared,
            like.fleet if like is not None else None,
        )
        fleets.append(fleet)
        return World(fleet, seeds, _REPORTS, kind)

    yield launch
    for fleet in fleets:
        fleet.end()


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    """Of one test's own."""
    made = Engines(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="session")
def worlds(request: pytest.FixtureRequest, new_world: NewWorld, shared: Engines) -> Iterator[Worlds]:
    """(size, hosts) -> the one world of that shape in which no test ends a rank.

    After a test that failed all are made anew: what it has left would fail those that follow.
    """
    made: dict[tuple[int, int], World] = {}
    failed = request.session.testsfailed

    def world(size: int, hosts: int) -> World:
        nonlocal failed
        if request.session.testsfailed > failed:
            failed = request.session.testsfailed
            for each in made.values():
                each.fleet.end()
            made.clear()
            shared.end()
        if (size, hosts) not in made:
            made[size, hosts] = new_world(size, hosts)
        return made[size, hosts]

    yield world
    if request.session.testsfailed == failed:
        for each in made.values():
            each.end_well()
            each.sockets_are_swept()
