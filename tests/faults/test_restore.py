"""`on_failure="restore"`: after a failed update the workers have the version before again, with every bit.

Ranks and workers are real processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from reports_for_fault_tests import KILLED_SECONDS, MISTAKE_SECONDS
from world_for_fault_tests import Fault, NewWorld, World, Worlds, failed_alike

from tests.support.steered import Engines

IN_A_BUCKET: Fault = {"act": "raise", "at": "bucket", "bucket": 9}
VERSION = "step 1"


@pytest.fixture
def world(worlds: Worlds) -> World:
    return worlds(2, 1)


class Versions:
    """`old` is in the workers as VERSION, from checkpoint "before"; checkpoint "a" is to follow. Seeds."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.new = world.new_checkpoint()
        self.old = next(world._seeds)
        world.register("before", self.old)
        world.gather("before")
        world.put_in_place(self.old, name="before", version=VERSION)

    def fail(self, **faults: object) -> None:
        self.world.start(on_failure="restore", version="step 2", **faults)  # type: ignore[arg-type]

    def weights(self) -> dict[int, tuple[str, str | None]]:
        states = self.world.answers_to("state")
        return {rank: (each["weights"]["state"], each["weights"]["version"]) for rank, each in states.items()}

    def forget(self) -> None:
        self.world.ask("unregister", name="before")


@pytest.fixture
def versions(world: World) -> Iterator[Versions]:
    made = Versions(world)
    yield made
    made.forget()
    world.put_in_place(made.new)
    world.nothing_is_left()


@pytest.mark.parametrize("fault", [IN_A_BUCKET, {"act": "raise", "at": "post_hook"}], ids=lambda it: it["at"])
def test_after_an_exception_in_an_engine_all_workers_have_the_version_before(
    world: World, versions: Versions, fault: Fault
) -> None:
    victim = world.last
    worker = world.fleet.worker(victim)
    versions.fail(worker_faults={victim: fault})
    answers = world.reported("restored", worker.happened("fault"), MISTAKE_SECONDS, world.alive)
    record = failed_alike(answers)
    assert (record["rank"], record["error_type"]) == (victim, "RuntimeError")
    for rank, answer in answers.items():
        assert (answer["restored"], answer["touched"]) == (VERSION, False)
        assert f"version {VERSION!r} was put back" in answer["message"]
        world.has(rank, versions.old, VERSION)
    assert set(versions.weights().values()) == {("serving", VERSION)}


def test_the_others_are_restored_when_a_worker_died(world: World, versions: Versions) -> None:
    victim, survivor = world.last, world.alive[0]
    worker = world.fleet.worker(victim)
    versions.fail(worker_faults={victim: {"act": "kill", "at": "bucket", "bucket": 9}}, wait=False)
    answers = world.reported(
        "restored (a worker died)", worker.happened("fault"), KILLED_SECONDS, world.alive
    )
    assert failed_alike(answers)["error_type"] == "PeerLost"
    assert (answers[survivor]["restored"], answers[survivor]["touched"]) == (VERSION, False)
    assert (answers[victim]["restored"], answers[victim]["touched"]) == (None, True)
    world.has(survivor, versions.old, VERSION)
    assert versions.weights() == {survivor: ("serving", VERSION), victim: ("incomplete", None)}


def test_a_restore_that_fails_is_reported_with_both_failures(world: World, versions: Versions) -> None:
    victim = world.last
    worker = world.fleet.worker(victim)
    versions.fail(worker_faults={victim: IN_A_BUCKET}, always=True)
    answers = world.reported("a restore fails", worker.happened("fault"), MISTAKE_SECONDS, world.alive)
    assert {answer["error"] for answer in answers.values()} == {"RestoreError"}
    for answer in answers.values():
        assert answer["record"]["bucket"] == 9
        assert "could not be put back" in answer["message"]
        assert answer["message"].count("injected in bucket") >= 2
        assert (answer["restored"], answer["touched"]) == (None, True)
    world.left(world.alive, MISTAKE_SECONDS)
    assert set(versions.weights().values()) == {("incomplete", None)}


def test_what_touches_nothing_needs_no_restore(world: World, versions: Versions) -> None:
    world.fleet.tell(
        "update", world.alive, name="a", on_failure="restore", version=lambda rank: f"by rank {rank}"
    )
    answers = world.reported("versions differ", world.started(), MISTAKE_SECONDS, world.alive)
    for answer in answers.values():
        assert "ranks are not doing the same" in answer["message"]
        assert "version='by rank 0'" in answer["message"]
        assert (answer["restored"], answer["touched"]) == (None, False)
    assert set(versions.weights().values()) == {("serving", VERSION)}


def test_ranks_that_disagree_about_restoring_do_not_begin(world: World, versions: Versions) -> None:
    world.fleet.tell("update", world.alive, name="a", on_failure=lambda rank: "restore" if rank else "raise")
    answers = world.reported("only one restores", world.started(), MISTAKE_SECONDS, world.alive)
    assert all("on_failure='restore'" in answer["message"] for answer in answers.values())
    assert set(versions.weights().values()) == {("serving", VERSION)}


def test_an_interrupted_rank_keeps_nobody_waiting_for_its_part_of_a_restore(
    world: World, versions: Versions
) -> None:
    victim, other = world.last, world.alive[0]
    versions.fail(faults={victim: {"act": "interrupt", "at": "buckets"}})
    when = world.fleet.ranks[victim].happened("fault")
    answers = world.reported("interrupted", when, MISTAKE_SECONDS, world.alive)
    assert answers[victim]["error"] == "KeyboardInterrupt"
    assert answers[other]["error"] == "RestoreError"
    assert answers[other]["record"]["error_type"] == "KeyboardInterrupt"
    assert set(versions.weights().values()) == {("incomplete", None)}


def test_what_could_not_be_restored_is_refused_before_a_byte_moves(world: World, versions: Versions) -> None:
    world.ask("unregister", name="before")
    versions.fail()
    answers = world.reported("nothing to restore", world.started(), MISTAKE_SECONDS, world.alive)
    for answer in answers.values():
        assert answer["error"] == "CheckpointError"
        assert "'before'" in answer["message"]
        assert "bytes of host memory" in answer["message"]
        assert not answer["asked"]
    world.register("before", versions.old)
    world.gather("before")
    versions.fail()
    answers = world.reported("registered anew", world.started(), MISTAKE_SECONDS, world.alive)
    assert all("registered or gathered anew" in answer["message"] for answer in answers.values())


def test_what_a_lost_rank_held_cannot_be_restored(new_world: NewWorld, engines: Engines) -> None:
    world = new_world(2, 1, engines)
    made = Versions(world)
    victim, survivor = 1, 0
    made.fail(faults={victim: {"act": "kill", "at": "buckets"}})
    when = world.fleet.ranks[victim].happened("fault")
    world.lose(victim)
    answer = world.reported("a rank died, no restore", when, KILLED_SECONDS, [survivor], [victim])[survivor]
    assert (answer["error"], answer["record"]["error_type"]) == ("RestoreError", "PeerLost")
    assert answer["touched"] is True
    assert made.weights() == {survivor: ("incomplete", None)}
    world.end_well()
