"""`on_failure="restore"`: after a failed update the workers have the version before again, with every bit.

Ranks and workers are real processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


@pytest.mark.parametrize("fault", [{"act": "interrupt", "at": "restore"}, {"act": "unknown", "at": "decide"}])
def test_who_does_not_come_to_the_restore_keeps_nobody_waiting(
    world: World, versions: Versions, fault: Fault
) -> None:
    """Interrupted between the update and the restore, or in the dark about how the update was decided."""
    victim, other = world.last, world.alive[0]
    versions.fail(faults={victim: fault}, worker_faults={other: IN_A_BUCKET})
    when = world.fleet.ranks[victim].happened("fault")
    name = f"not there for a restore ({fault['act']})"
    answers = world.reported(name, when, MISTAKE_SECONDS, world.alive)
    expected = "KeyboardInterrupt" if fault["act"] == "interrupt" else "OutcomeUnknown"
    assert answers[victim]["error"] == expected
    assert answers[other]["error"] == "RestoreError"
    assert answers[other]["record"]["error_type"] == expected
    assert answers[other]["record"]["rank"] == victim
    assert set(versions.weights().values()) == {("incomplete", None)}


def refused(world: World, fault: str, on: list[int]) -> dict[int, Any]:
    """What ranks say of an update that did not begin to move."""
    answers = world.fleet.answers(on)
    seconds = max(answer["ended"] for answer in answers.values()) - world.started()
    world.reports.add(f"{fault}: {world.name}", seconds, MISTAKE_SECONDS)
    for answer in answers.values():
        assert answer["error"] is not None, answers
        assert not answer["asked"]
        assert not answer.get("touched")
        assert "on_failure='restore'" in answer["message"]
    return answers


def test_workers_with_different_versions_are_refused_by_name(world: World, versions: Versions) -> None:
    world.put_in_place(versions.old, [1], name="before", version="by rank 1 alone")
    versions.fail()
    for answer in refused(world, "different versions before", world.alive).values():
        assert f"rank 0's has 'before' (version {VERSION!r})" in answer["message"]
        assert "rank 1 'before' (version 'by rank 1 alone')" in answer["message"]
    assert versions.weights() == {0: ("serving", VERSION), 1: ("serving", "by rank 1 alone")}


def test_a_rank_that_could_not_restore_tells_the_others(world: World, versions: Versions) -> None:
    world.fleet.ask("unregister", [1], name="before")
    versions.fail()
    answers = refused(world, "one cannot restore", world.alive)
    assert answers[1]["error"] == "CheckpointError"
    assert (answers[0]["record"]["error_type"], answers[0]["record"]["rank"]) == ("CheckpointError", 1)
    assert set(versions.weights().values()) == {("serving", VERSION)}


def test_who_only_gives_must_have_what_would_be_put_back(world: World, versions: Versions) -> None:
    world.fleet.ask("unregister", [1], name="before")
    versions.fail(ranks=[0])
    for answer in refused(world, "a giver cannot restore", world.alive).values():
        assert "rank 1 has not" in answer["message"]
        assert "'before'" in answer["message"]


def test_who_holds_what_would_be_put_back_must_take_part(world: World, versions: Versions) -> None:
    world.ask("register", name="c", kind=world.kind, seed=5, parts=lambda rank: [] if rank else [0, 1], of=2)
    world.gather("c")
    world.fleet.tell("update", [0], name="c", ranks=[0], on_failure="restore")
    answers = world.fleet.answers([0])
    assert answers[0]["error"] == "CheckpointError"
    assert "Ranks [1] hold a part of it that cannot be read by P2P" in answers[0]["message"]
    assert "ranks=[0, 1]" in answers[0]["message"]
    assert not answers[0]["asked"]
    world.ask("unregister", name="c")


def test_what_has_no_digests_cannot_be_restored_verified(world: World, versions: Versions) -> None:
    versions.new = world.new_checkpoint(digests=True)
    versions.fail(verify="transport")
    for answer in refused(world, "no digests to restore with", world.alive).values():
        assert "'before'" in answer["message"]
        assert "registered without a digest" in answer["message"]
    assert set(versions.weights().values()) == {("serving", VERSION)}


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
