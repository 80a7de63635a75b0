"""A worker is killed or stopped, at every step of an update. Ranks and workers are real processes.

Whoever is left reports it, by name, in seconds; then an update of the others works, and one of all works
when the engine has a worker again.
"""

from __future__ import annotations

import signal

import pytest
from reports_for_fault_tests import KILLED_SECONDS, STOPPED_SECONDS
from world_for_fault_tests import World, Worlds, failed_alike

BUCKET = 9


@pytest.fixture(params=[(2, 1), (4, 2)], ids=["2 ranks", "4 ranks on 2 hosts"])
def world(request: pytest.FixtureRequest, worlds: Worlds) -> World:
    return worlds(*request.param)


def recovers(world: World, seed: int, victim: int) -> None:
    """Without the victim's worker, whose rank gives what it holds; and with a new one in its place."""
    world.put_in_place(seed, ranks=world.but(victim))
    world.put_in_place(seed)
    world.nothing_is_left()


@pytest.mark.parametrize(
    ("at", "stage", "wait", "place"),
    [
        ("hello", "handshake", False, 0),
        ("map", "handshake", False, 1),
        ("bucket", "buckets", False, 2),
        ("bucket", "buckets", True, 3),
        ("post_hook", "post_hook", False, 0),
    ],
)
def test_a_killed_worker_is_named_by_all(world: World, at: str, stage: str, wait: bool, place: int) -> None:
    """`wait`: the engine answers when its worker has ended; its own report may be the first one then.
    `place`: of the rank whose worker it is, in turn."""
    seed, victim = world.new_checkpoint(), place % world.fleet.size
    fault = {"act": "kill", "at": at} | ({"bucket": BUCKET} if at == "bucket" else {})
    worker = world.fleet.worker(victim)
    world.start(worker_faults={victim: fault}, wait=wait)
    answers = world.reported(
        f"worker killed ({at})" + ", the engine says so too" * wait,
        worker.happened("fault"),
        KILLED_SECONDS,
        world.alive,
    )
    record = failed_alike(answers)
    assert (record["rank"], record["device"]) == (victim, world.fleet.device(victim))
    worker.wait()
    if wait and record["stage"] == "request":
        assert "the engine lost its worker" in record["message"]
    else:
        assert record["stage"] == stage
        assert f"(pid {worker.pid}) died" in record["message"]
        if at == "bucket":
            # What its messages' thread had not sent when it was killed, nobody can know.
            assert record["bucket"] is not None
            assert record["bucket"] <= BUCKET
            assert len(record["tensors"]) == 2
            assert all(name in answers[0]["message"] for name in record["tensors"])
    recovers(world, seed, victim)


@pytest.mark.parametrize("wait", [False, True], ids=["the engine says nothing", "the engine says so"])
def test_a_worker_that_died_before_it_connected_is_missed(worlds: Worlds, wait: bool) -> None:
    """Only the engine knows: if it says nothing, the handshake's deadline tells."""
    world = worlds(2, 1)
    seed, victim = world.new_checkpoint(), world.last
    worker = world.fleet.worker(victim)
    world.start(worker_faults={victim: {"act": "kill", "at": "begin"}}, wait=wait)
    answers = world.reported(
        "worker killed before it connects, the engine says " + ("so" if wait else "nothing"),
        worker.happened("fault"),
        KILLED_SECONDS,
        world.alive,
    )
    record = failed_alike(answers)
    assert (record["rank"], record["device"]) == (victim, world.fleet.device(victim))
    if wait:
        assert record["stage"] == "request"
        assert "the engine lost its worker" in record["message"]
    else:
        assert record["stage"] == "handshake"
        assert f"the worker of device {world.fleet.device(victim)} has not connected" in record["message"]
    worker.wait()
    recovers(world, seed, victim)


def test_of_a_worker_that_did_not_hear_the_commit_nobody_says_that_it_serves(worlds: Worlds) -> None:
    """It is stopped before it acts on it: the update commits, and nobody knows what it will make of that."""
    world = worlds(2, 1)
    seed, victim, other = world.new_checkpoint(), world.last, world.alive[0]
    worker = world.fleet.worker(victim)
    world.start(worker_faults={victim: {"act": "stop", "at": "commit"}}, wait=False, version="new")
    answers = world.fleet.answers(world.alive, STOPPED_SECONDS)
    assert {answer["version"] for answer in answers.values()} == {"new"}, answers
    world.has(other, seed, "new")
    weights = {rank: answer["weights"] for rank, answer in world.answers_to("state").items()}
    assert (weights[other]["state"], weights[other]["version"]) == ("serving", "new")
    assert (weights[victim]["state"], weights[victim]["version"]) == ("unknown", None)
    assert "version 'new' was committed, but" in weights[victim]["reason"]
    worker.signal(signal.SIGKILL)
    worker.wait()
    recovers(world, seed, victim)


def test_a_stopped_worker_is_given_up_after_its_deadline(worlds: Worlds) -> None:
    world = worlds(4, 2)
    seed, victim = world.new_checkpoint(), world.last
    others = world.but(victim)
    worker = world.fleet.worker(victim)
    world.start(worker_faults={victim: {"act": "stop", "at": "bucket", "bucket": BUCKET}})
    when = worker.happened("fault")
    answers = world.reported("worker stopped in a bucket, the others", when, KILLED_SECONDS, others)
    answers |= world.reported("worker stopped in a bucket, its own rank", when, STOPPED_SECONDS, [victim])
    record = failed_alike(answers)
    assert (record["rank"], record["device"]) == (victim, world.fleet.device(victim))
    assert (record["stage"], record["bucket"]) == ("buckets", BUCKET)
    assert len(record["tensors"]) == 2
    assert f"the worker (pid {worker.pid}) has not given back bucket {BUCKET}" in record["message"]
    assert "the engine needs a restart" in record["message"]
    # The others do not mind that it is still there.
    world.put_in_place(seed, ranks=others)
    worker.signal(signal.SIGCONT)
    (late,) = world.left([victim], KILLED_SECONDS)
    assert late["status"]["touched"] is True
    world.put_in_place(seed)
    world.nothing_is_left()
