"""A flipped bit is found and named by verified updates, wherever it came about. Ranks and workers are real
processes."""

from __future__ import annotations

from typing import Any

import pytest
from reports_for_fault_tests import MISTAKE_SECONDS
from world_for_fault_tests import World, Worlds, failed_alike


@pytest.fixture
def world(worlds: Worlds) -> World:
    return worlds(2, 1)


@pytest.mark.parametrize("verify", ["transport", "full"])
def test_good_bytes_pass_and_are_counted(world: World, verify: str) -> None:
    seed = world.new_checkpoint(digests=True)
    for rank in world.alive:
        world.fleet.worker(rank)
    answers = world.answers_to("update", name="a", verify=verify, version="good")
    assert {answer["message"] for answer in answers.values()} == {""}
    for rank in world.alive:
        verified = world.has(rank, seed, "good")["verified"]
        assert verified["arrived"] > 0
        assert verified["loaded"] == (verified["arrived"] if verify == "full" else 0)


@pytest.mark.parametrize("owner", [0, 1])
def test_a_bit_that_flips_after_registering_is_found_by_all_and_named(world: World, owner: int) -> None:
    seed = world.new_checkpoint(digests=True)
    flip: dict[str, Any] = {"name": "a", "buffer": 0, "number": 3, "byte": 17}
    name = world.fleet.ranks[owner].ask("flip", **flip)["tensor"]
    world.start(verify="transport")
    answers = world.reported("a bit flips in host memory", world.started(), MISTAKE_SECONDS, world.alive)
    record = failed_alike(answers)
    assert record["error_type"] == "CorruptionError"
    assert name in record["tensors"]
    assert f"tensor {name!r}" in record["message"]
    assert "arrived with other bytes" in record["message"]
    world.fleet.ranks[owner].ask("flip", **flip)
    world.put_in_place(seed, verify="full")
    world.nothing_is_left()


def test_a_bit_that_flips_while_it_is_loaded_is_found_in_full(world: World) -> None:
    world.new_checkpoint(digests=True)
    victim = world.last
    worker = world.fleet.worker(victim)
    fault = {"act": "flip", "at": "bucket", "bucket": 4}
    world.start(worker_faults={victim: fault}, verify="full")
    answers = world.reported("a load goes wrong", worker.happened("fault"), MISTAKE_SECONDS, world.alive)
    record = failed_alike(answers)
    assert (record["error_type"], record["rank"], record["stage"]) == ("CorruptionError", victim, "post_hook")
    assert "(bucket 4) was loaded as other bytes" in record["message"]
    assert record["bucket"] == 4
    assert record["tensors"]
    world.put_in_place(world.new_checkpoint(digests=True), verify="full")


def test_what_has_no_digests_is_not_verified(world: World) -> None:
    seed = world.new_checkpoint()
    world.start(verify="transport")
    answers = world.reported("no digests", world.started(), MISTAKE_SECONDS, world.alive)
    for answer in answers.values():
        assert "registered without a digest" in answer["message"]
        assert answer["touched"] is False
    world.put_in_place(seed)
