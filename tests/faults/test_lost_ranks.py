"""A rank is killed or stopped in the middle of an update, on two hosts. Ranks and workers are real processes.

Whoever is left reports it, by name, in seconds. When it was rank 0, they end, and a relaunch works; when it
was a plain rank, the others go on once its share is registered again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import pytest
from reports_for_fault_tests import KILLED_SECONDS, STOPPED_SECONDS
from world_for_fault_tests import NewWorld, World, failed_alike

PAST = {"kill": "killed", "stop": "stopped"}
WHEN_RESUMED = ("PeerLost", "UpdateTimeout")
"""What a rank that was stopped finds first: that the others went on, or that its worker gave it up."""


class Launches:
    """One launch after the other, on the same ports and in the same directories."""

    def __init__(self, new_world: NewWorld) -> None:
        self._new_world = new_world
        self._now: World | None = None
        self._kept: World | None = None

    def with_ranks(self, *needed: int) -> World:
        """The world that the last test kept if these are alive in it, else that of a relaunch."""
        kept, self._kept = self._kept, None
        return kept if kept is not None and set(needed) <= set(kept.alive) else self.relaunch()

    def keep(self, world: World) -> None:
        """It is as good as new, but for the ranks that it lost."""
        self._kept = world

    def relaunch(self) -> World:
        """Every worker gets new weights, whatever happened to it in the launch before."""
        if self._now is not None:
            self._now.fleet.end_ranks()
        self._now = self._new_world(4, 2, like=self._now)
        return self._now


@pytest.fixture(scope="module")
def launches(new_world: NewWorld) -> Launches:
    return Launches(new_world)


@pytest.mark.parametrize("act", ["kill", "stop"])
def test_when_rank_0_is_lost_all_report_it_and_a_relaunch_works(launches: Launches, act: str) -> None:
    """First in this file: the relaunch serves the next test."""
    world = launches.with_ranks(0, 1, 2, 3)
    world.new_checkpoint()
    process = world.fleet.ranks[0]
    world.start({0: {"act": act, "at": "buckets"}})
    when = process.happened("fault")
    survivors = world.but(0)
    limit = STOPPED_SECONDS if act == "stop" else KILLED_SECONDS
    answers = world.reported(f"rank 0 {PAST[act]} (buckets)", when, limit, survivors, [0])
    for rank, answer in answers.items():
        # Each of them decides by itself: rank 0 served what they had in common.
        assert answer["error"] == "PeerLost", answer
        # A host's first rank may see the end of a broadcast before that of the control plane.
        assert "rank 0" in answer["message"] or "a broadcast broke" in answer["message"]
        record = answer["record"]
        assert (record["rank"], record["device"]) == (rank, world.fleet.device(rank))
        assert record["stage"] in ("begin", "handshake", "buckets")
        assert (record["bucket"] is not None) == bool(record["tensors"]) == (record["stage"] == "buckets")
    world.lose(0)
    for rank in survivors:
        world.fleet.ranks[rank].tell("end")
    if act == "stop":
        # A group's end waits for what a stopped member has not taken: rank 2, its host's first, ends later.
        world.ended([1, 3], 1)
        process.signal(signal.SIGCONT)
        assert process.answer(STOPPED_SECONDS)["error"] in WHEN_RESUMED
        process.tell("end")
    world.ended(survivors, 1)
    assert process.wait(KILLED_SECONDS) == (1 if act == "stop" else -signal.SIGKILL)
    again = launches.relaunch()
    # What the killed one could not remove is gone.
    assert len(os.listdir(again.fleet.socket_dir)) == again.fleet.size
    again.nothing_is_left()
    launches.keep(again)


@pytest.mark.parametrize(
    ("victim", "act", "at"),
    [(3, "kill", "buckets"), (1, "kill", "request"), (2, "stop", "buckets")],
    ids=["a plain rank killed", "killed when its engine is to be asked", "a host's first rank stopped"],
)
def test_the_others_go_on_without_a_lost_rank(launches: Launches, victim: int, act: str, at: str) -> None:
    world = launches.with_ranks(0, victim)
    world.new_checkpoint()
    process = world.fleet.ranks[victim]
    world.start({victim: {"act": act, "at": at}})
    when = process.happened("fault")
    survivors = world.but(victim)
    limit = STOPPED_SECONDS if act == "stop" else KILLED_SECONDS
    # Its engine's worker was loading, and leaves its loop, too.
    workers = [victim] if at == "buckets" else []
    answers = world.reported(f"rank {victim} {PAST[act]} ({at})", when, limit, survivors, workers)
    record = failed_alike(answers, lost=victim)
    if at == "buckets" and act == "kill":
        assert any(answer["record"]["bucket"] is not None for answer in answers.values()), answers
    assert answers[0]["error"] == "PeerLost"
    assert f"rank {victim}" in record["message"]
    world.lose(victim)
    goes_on(world, survivors, victim)
    if act == "stop":
        # When it goes on it finds that the others did, says so, and ends.
        process.signal(signal.SIGCONT)
        assert process.answer(STOPPED_SECONDS)["error"] in WHEN_RESUMED
        process.tell("end")
    assert process.wait(KILLED_SECONDS) == (1 if act == "stop" else -signal.SIGKILL)
    # Not before: a group's end waits for what a stopped member has not taken.
    world.nothing_is_left()
    launches.keep(world)


def goes_on(world: World, survivors: Sequence[int], victim: int) -> None:
    """Its tensors are missed until the survivors have registered them; then they are updated without it."""
    for answer in world.answers_to("gather", name="a").values():
        assert answer["error"] == "CheckpointError"
        assert f"rank {victim}" in answer["message"]
        assert "register them on the ranks that are left" in answer["message"]
        assert "'layers." in answer["message"]
    seed = world.new_checkpoint()
    world.put_in_place(seed, ranks=survivors)
