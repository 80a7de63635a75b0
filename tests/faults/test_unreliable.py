"""Disks that fail while they are read, a slot that changes, clocks that jump, and messages that are lost,
come twice or late, or end their connection. Ranks and workers are real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reports_for_fault_tests import MISTAKE_SECONDS, STOPPED_SECONDS
from safetensors.torch import save_file
from world_for_fault_tests import World, Worlds, failed_alike

HOUR = 3600.0
BUCKET = 9


@pytest.fixture
def world(worlds: Worlds) -> World:
    return worlds(2, 1)


def works(world: World, seed: int, **arguments: Any) -> None:  # noqa: ANN401
    world.put_in_place(seed, **arguments)
    world.nothing_is_left()


# Disks


@pytest.mark.parametrize(
    ("reading", "error", "text"),
    [
        ("cut", "CheckpointFormatError", "truncated while reading tensor 'w"),
        ("io", "CheckpointError", "cannot be read at byte"),
    ],
)
def test_a_file_that_fails_while_it_is_read_is_known_to_all(
    world: World, tmp_path: Path, reading: str, error: str, text: str
) -> None:
    """One rank's, cut by another process, or on a disk with a bad sector; nothing of it stays registered."""
    seed = world.new_checkpoint()
    file = str(tmp_path / "model.safetensors")
    save_file({f"w{number}": torch.ones(1 << 20) for number in range(8)}, file)
    answers = world.answers_to(
        "register_files",
        name="b",
        files=lambda rank: [file] if rank == 1 else [],
        reading=lambda rank: reading if rank == 1 else "",
    )
    assert (answers[0]["error"], answers[1]["error"]) == (None, error), answers
    assert file in answers[1]["message"]
    assert text in answers[1]["message"]
    world.fleet.tell("gather", world.alive, name="b")
    fault = f"a disk fails while it is read ({reading})"
    record = failed_alike(world.reported(fault, world.started(), MISTAKE_SECONDS, world.alive))
    assert (record["rank"], record["stage"], record["error_type"]) == (1, "register", error)
    world.ask("unregister", name="b")
    works(world, seed)


# Memory


@pytest.mark.parametrize("victim", [0, 1])
def test_a_bit_that_flips_in_a_slot_is_found_by_all_and_named(world: World, victim: int) -> None:
    """Between the copy into the ring and the worker's look at it; the memory that it came from is right."""
    seed = world.new_checkpoint(digests=True)
    worker = world.fleet.worker(victim)
    fault = {"act": "flip", "at": "slot", "bucket": BUCKET}
    world.start(worker_faults={victim: fault}, verify="transport")
    record = failed_alike(
        world.reported("a slot is corrupted", worker.happened("fault"), MISTAKE_SECONDS, world.alive)
    )
    assert (record["error_type"], record["rank"]) == ("CorruptionError", victim)
    assert record["bucket"] == BUCKET
    assert any(f"tensor {name!r}" in record["message"] for name in record["tensors"]), record
    assert "arrived with other bytes" in record["message"]
    works(world, seed, verify="full")


# Clocks


@pytest.mark.parametrize("by", [HOUR, -HOUR], ids=["forwards", "backwards"])
def test_a_clock_that_jumps_changes_nothing(world: World, by: float) -> None:
    """On a rank and on the other one's worker, in the midst of an update: deadlines are on another clock."""
    seed = world.new_checkpoint()
    workers = [world.fleet.worker(rank) for rank in world.alive]
    world.start(
        {0: {"act": "clock", "at": "buckets", "by": by}},
        {1: {"act": "clock", "at": "bucket", "bucket": 2, "by": by}},
    )
    answers = world.fleet.answers(world.alive)
    assert {answer["message"] for answer in answers.values()} == {""}, answers
    for rank in world.alive:
        world.has(rank, seed, answers[rank]["version"])
    seconds = max(answer["ended"] for answer in answers.values()) - workers[1].happened("fault")
    world.reports.add(f"a clock jumps by {by / HOUR:+g} h: {world.name}", seconds, MISTAKE_SECONDS)
    works(world, world.new_checkpoint())


# Messages

WORKER = ("Hello", "Ready", "BucketDone", "Released", "Finished", "Goodbye")
SERVER = ("Begin", "BucketReady", "Finish", "Freed", "Commit")
ACTS = ("lose", "twice", "late", "close")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", WORKER)
def test_what_a_worker_says(world: World, act: str, kind: str) -> None:
    one_outcome(world, {}, {1: {"act": act, "message": kind}}, f"{kind} of a worker: {act}")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", SERVER)
def test_what_a_worker_is_told(world: World, act: str, kind: str) -> None:
    one_outcome(world, {1: {"act": act, "message": kind}}, {}, f"{kind} to a worker: {act}")


def one_outcome(world: World, ranks: dict[int, Any], workers: dict[int, Any], fault: str) -> None:
    """Within its bound all ranks say the same: it is committed, or why it is not, and the next one works."""
    seed = world.new_checkpoint()
    victims = [world.fleet.ranks[rank] for rank in ranks] + [world.fleet.worker(rank) for rank in workers]
    world.start(ranks, workers)
    committed = world.one_outcome(fault, victims[0], STOPPED_SECONDS)
    works(world, world.new_checkpoint() if committed else seed)
