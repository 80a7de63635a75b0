"""Ctrl-C, and a launcher's SIGTERM, in the middle of an update: it ends on all ranks, and nothing is left.

Ranks and workers are real processes.
"""

from __future__ import annotations

import signal

import pytest
from reports_for_fault_tests import MISTAKE_SECONDS
from world_for_fault_tests import NewWorld, World, Worlds, failed_alike

from tests.support.steered import Engines


@pytest.fixture
def world(worlds: Worlds) -> World:
    return worlds(2, 1)


@pytest.mark.parametrize("victim", [0, 1])
def test_an_interrupted_update_ends_on_all_ranks_and_the_next_one_works(world: World, victim: int) -> None:
    seed = world.new_checkpoint()
    world.start({victim: {"act": "interrupt", "at": "buckets"}})
    when = world.fleet.ranks[victim].happened("fault")
    answers = world.reported("Ctrl-C in an update", when, MISTAKE_SECONDS, world.alive)
    assert answers.pop(victim)["error"] == "KeyboardInterrupt"
    record = failed_alike(answers)
    assert (record["rank"], record["error_type"]) == (victim, "KeyboardInterrupt")
    world.put_in_place(seed)
    world.nothing_is_left()


def test_a_terminated_rank_ends_the_update_first(new_world: NewWorld, engines: Engines) -> None:
    world = new_world(2, 1, engines)
    world.new_checkpoint()
    world.start({1: {"act": "terminate", "at": "buckets"}})
    when = world.fleet.ranks[1].happened("fault")
    answers = world.reported("SIGTERM in an update", when, MISTAKE_SECONDS, [0], [1])
    assert failed_alike(answers)["error_type"] == "SystemExit"
    assert world.fleet.ranks[1].wait() == 128 + signal.SIGTERM
    world.lose(1)
    world.end_well(1)
    # A rank that is told to end removes what it had, itself.
    assert list(world.fleet.socket_dir.iterdir()) == []
