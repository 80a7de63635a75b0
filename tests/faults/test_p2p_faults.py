"""Owners and receivers of reads by P2P are killed, stopped, or not what the metas say; in real processes.

A worker that is stopped in a bucket holds its update up with some buckets read and some not: what happens to
the owner then, it has not foreseen.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from reports_for_fault_tests import KILLED_SECONDS, STOPPED_SECONDS

from tests.support.joins import (
    Launch,
    failed,
    go_on,
    hold_up,
    in_place,
    keep,
    launcher,
    load,
    metas_of,
    owners_with,
    register,
)
from tests.support.mooncake import need_mooncake

need_mooncake()

SEED = 20271101


@pytest.fixture
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    with launcher(tmp_path_factory) as start:
        yield start


def names_the_owner(record: dict[str, Any], rank: int) -> None:
    assert (record["error_type"], record["stage"]) == ("P2PError", "buckets"), record
    assert record["bucket"] is not None
    assert record["tensors"]
    assert f"rank {rank} on host host0" in record["message"]
    assert "nobody else holds" in record["message"]


def test_an_owner_that_is_killed_is_named_and_another_fleet_can_be_joined(launch: Launch) -> None:
    owners, metas = owners_with(launch, 2, seed=SEED)
    joiners = launch(2)
    load(joiners, metas)
    hold_up(joiners, 1)
    owners.ranks[1].signal(signal.SIGKILL)
    owners.ranks[1].wait()
    go_on(joiners, 1)
    names_the_owner(failed(joiners, KILLED_SECONDS), 1)
    _, metas = owners_with(launch, 1, seed=SEED + 1)
    load(joiners, metas)
    in_place(joiners, SEED + 1)


def test_a_replica_takes_a_killed_owner_s_place(launch: Launch) -> None:
    owners, metas = owners_with(launch, 2, seed=SEED)
    replica = launch(1)
    load(replica, metas)
    keep(replica, seed=SEED)  # its metas are its own from here on
    joiners = launch(1)
    load(joiners, metas, metas_of(replica))
    for killed in range(2):
        hold_up(joiners, 0)
        if not killed:
            for rank in owners.ranks:
                rank.signal(signal.SIGKILL)
                rank.wait()
        go_on(joiners, 0)
        answers = in_place(joiners, SEED, joiners.answers([0]))
        assert answers[0]["p2p_nbytes"] == 24 * 4 * (512 + 64 * 997)


def test_the_owner_takes_the_place_of_a_killed_replica(launch: Launch) -> None:
    """That had announced itself: the next one reads it, and goes on without it."""
    _, metas = owners_with(launch, 1, seed=SEED)
    replica, joiners = launch(1), launch(1)
    for fleet in (replica, joiners):
        load(fleet, metas)
    keep(replica, seed=SEED)
    hold_up(joiners, 0)
    replica.ranks[0].signal(signal.SIGKILL)
    replica.ranks[0].wait()
    go_on(joiners, 0)
    answers = in_place(joiners, SEED, joiners.answers([0]))
    (lost,) = answers[0]["lost_sources"]
    assert "rank 0 on host host0" in lost
    # Its announcement has ended with it.
    assert in_place(joiners, SEED)[0]["lost_sources"] == []


def test_who_reads_a_joiner_whose_update_fails_goes_on_with_the_owner(launch: Launch) -> None:
    _, metas = owners_with(launch, 1, seed=SEED)
    first, second = launch(1), launch(1)
    for fleet in (first, second):
        load(fleet, metas)
    hold_up(first, 0, keep=True)
    hold_up(second, 0)
    first.worker(0).signal(signal.SIGKILL)
    answer = first.ranks[0].answer(KILLED_SECONDS)
    # Whoever notices first: the rank, or the engine that asks its worker.
    assert answer["record"]["error_type"] in ("PeerLost", "RuntimeError"), answer
    state = first.ask("state", [0])[0]
    assert state["names"] == []
    go_on(second, 0)
    in_place(second, SEED, second.answers([0]))
    # Nothing is left of it, and it can try again.
    keep(first, seed=SEED)


def test_a_stopped_owner_is_named_and_can_be_read_when_it_goes_on(launch: Launch) -> None:
    owners, metas = owners_with(launch, 1, seed=SEED)
    joiners = launch(1)
    load(joiners, metas)
    hold_up(joiners, 0)
    owners.ranks[0].signal(signal.SIGSTOP)
    go_on(joiners, 0)
    names_the_owner(failed(joiners, STOPPED_SECONDS), 0)
    owners.ranks[0].signal(signal.SIGCONT)
    in_place(joiners, SEED)


def test_a_killed_receiver_ends_the_owner_s_lease(launch: Launch) -> None:
    owners, metas = owners_with(launch, 1, seed=SEED, CKPT_ENGINE_LEASE_TIMEOUT="60")
    joiners = launch(2)
    load(joiners, metas)
    hold_up(joiners, 1)
    joiners.ranks[0].signal(signal.SIGKILL)
    joiners.ranks[0].wait()
    go_on(joiners, 1)
    answer = joiners.ranks[1].answer(KILLED_SECONDS)
    assert answer["record"]["error_type"] == "PeerLost", answer
    # Its link, or the control plane that it served: whichever end is read first.
    assert re.search("rank 0(, which serves the control plane,)? is gone", answer["message"])
    # Nobody reads any more: it need not wait.
    owners.tell("unregister", [0], name="a")
    assert owners.ranks[0].answer(KILLED_SECONDS)["message"] == ""


def test_memory_stays_while_it_is_read(launch: Launch) -> None:
    """The update that reads it ends well, also the second one; only then it is freed, and refilled."""
    owners, metas = owners_with(launch, 1, seed=SEED, CKPT_ENGINE_LEASE_TIMEOUT="60")
    joiners = launch(1)
    load(joiners, metas)
    in_place(joiners, SEED)
    hold_up(joiners, 0)
    owners.tell("unregister", [0], name="a")
    owners.ranks[0].happened("started")
    go_on(joiners, 0)
    in_place(joiners, SEED, joiners.answers([0]))
    assert owners.ranks[0].answer(KILLED_SECONDS)["message"] == ""
    register(owners, SEED + 1)
    answer = joiners.ask("update", [0], name="a", ranks=[0])[0]
    assert "out of date" in answer["message"] or "anew" in answer["message"], answer
    load(joiners, metas_of(owners))
    in_place(joiners, SEED + 1)


def test_memory_that_is_read_too_long_is_not_freed_unless_by_force(launch: Launch) -> None:
    owners, metas = owners_with(launch, 1, seed=SEED, CKPT_ENGINE_LEASE_TIMEOUT="1")
    joiners = launch(1)
    load(joiners, metas)
    hold_up(joiners, 0)
    answer = owners.ask("unregister", [0], name="a")[0]
    assert answer["error"] == "CheckpointError"
    assert "is still being read by P2P" in answer["message"]
    assert owners.ask("state", [0])[0]["names"] == ["a"]
    assert owners.ask("unregister", [0], name="a", force=True)[0]["message"] == ""
    go_on(joiners, 0)
    names_the_owner(failed(joiners, KILLED_SECONDS), 0)
    register(owners, SEED + 1)
    load(joiners, metas_of(owners))
    in_place(joiners, SEED + 1)


def test_metas_of_an_owner_that_was_restarted_are_refused(launch: Launch) -> None:
    _, metas = owners_with(launch, 1, seed=SEED)
    document = json.loads(metas)
    document["0"]["session"] = "another one"
    joiners = launch(1)
    load(joiners, json.dumps(document))
    record = joiners.ask("update", [0], name="a", ranks=[0])[0]["record"]
    assert (record["error_type"], record["stage"]) == ("P2PError", "begin")
    assert "out of date" in record["message"]
    load(joiners, metas)
    in_place(joiners, SEED)
