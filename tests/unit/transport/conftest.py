"""Fleets for the tests of this folder, and their helper modules, whatever pytest's import mode."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fleet_for_transport_tests import Fleet, RankProcess, fleet_of
from leases_for_transport_tests import SESSION, publish, release_all

from ckpt_engine.transport.lease_server import LeaseServer


@pytest.fixture(params=[1, 2, 3])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with fleet_of(request.param) as ranks:
        yield ranks


@pytest.fixture
def pair() -> Iterator[Fleet]:
    with fleet_of(2) as ranks:
        yield ranks


@pytest.fixture
def three() -> Iterator[Fleet]:
    with fleet_of(3) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def rank_processes() -> Iterator[Callable[[int], list[RankProcess]]]:
    """So many processes that are alive and in no world: starting one takes seconds, so they are kept."""
    started: list[RankProcess] = []

    def take(count: int) -> list[RankProcess]:
        alive = [process for process in started if process.alive]
        fresh = [RankProcess() for _ in range(count - len(alive))]
        started.extend(fresh)
        return [*alive, *fresh][:count]

    yield take
    for process in started:
        process.end()


@pytest.fixture
def server() -> Iterator[LeaseServer]:
    """An owner's, of one published share."""
    made = LeaseServer("127.0.0.1", 0, SESSION, max_readers=2)
    publish(made)
    yield made
    made.close()


@pytest.fixture
def releases_leases() -> Iterator[None]:
    """At the end, those that `take` took."""
    yield
    release_all()
