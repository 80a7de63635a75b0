"""Owners and receivers of reads by P2P are killed, stopped, or not what the metas say; in real processes.

A worker that is stopped in a bucket holds its update up with some buckets read and some not: what happens to
the owner then, it has not foreseen.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reports_for_fault_tests import KILLED_SECONDS, STOPPED_SECONDS

from ckpt_engine.deadline import Deadline
from tests.support.checkpoints import digests_of
from tests.support.mooncake import need_mooncake
from tests.support.steered import Answer, Engines, Fleet

need_mooncake()

SEED = 20271101
HELD_UP = {"act": "stop", "at": "bucket", "bucket": 2}

Launch = Callable[..., Fleet]


@pytest.fixture
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """(ranks, **environment) -> a fleet that can be read by P2P, with workers of its own."""
    made: list[tuple[Fleet, Engines]] = []

    def start(size: int, **environment: str) -> Fleet:
        engines = Engines(tmp_path_factory.mktemp("engines"))
        fleet = Fleet(size, 1, tmp_path_factory.mktemp("fleet"), engines, p2p=True, **environment)
        made.append((fleet, engines))
        return fleet

    yield start
    for fleet, engines in made:
        fleet.end()
        engines.end()


def everybody(fleet: Fleet) -> list[int]:
    return list(range(fleet.size))


def owners_with(launch: Launch, size: int, seed: int, **environment: str) -> tuple[Fleet, str]:
    """A fleet that holds the checkpoint, and its metas."""
    fleet = launch(size, **environment)
    register(fleet, seed)
    return fleet, metas_of(fleet)


def register(fleet: Fleet, seed: int) -> None:
    for do, arguments in (
        ("register", {"kind": "layers", "seed": seed, "parts": lambda rank: [rank], "of": fleet.size}),
        ("gather", {}),
    ):
        answers = fleet.ask(do, everybody(fleet), name="a", **arguments)
        assert {answer["message"] for answer in answers.values()} == {""}, answers


def metas_of(fleet: Fleet) -> str:
    return str(fleet.ask("metas", [0])[0]["metas"])


def load(fleet: Fleet, *metas: str) -> None:
    answers = fleet.ask("load_metas", everybody(fleet), texts=list(metas))
    assert {answer["message"] for answer in answers.values()} == {""}, answers


def hold_up(fleet: Fleet, rank: int) -> None:
    """Starts an update whose worker of `rank` stops in a bucket."""
    for one in everybody(fleet):
        fleet.worker(one).news.clear()
    fleet.tell(
        "update",
        everybody(fleet),
        name="a",
        ranks=everybody(fleet),
        worker_fault=lambda one: HELD_UP if one == rank else None,
    )
    fleet.worker(rank).happened("fault")
    stat = Path(f"/proc/{fleet.worker(rank).pid}/stat")
    deadline = Deadline.after(KILLED_SECONDS)
    while stat.read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert not deadline.passed, "the worker does not stop"


def go_on(fleet: Fleet, rank: int) -> None:
    fleet.worker(rank).signal(signal.SIGCONT)


def in_place(fleet: Fleet, seed: int, answers: dict[int, Answer] | None = None) -> dict[int, Answer]:
    """An update, this one or a new one, succeeds, and every bit is right."""
    for rank in everybody(fleet):
        fleet.worker(rank)
    if answers is None:
        answers = fleet.ask("update", everybody(fleet), name="a", ranks=everybody(fleet))
    assert {answer["message"] for answer in answers.values()} == {""}, answers
    for rank in everybody(fleet):
        report = fleet.worker(rank).answer()
        assert report["status"]["outcome"] == "committed", report["status"]
        assert report["digests"] == digests_of("layers", seed)
    return answers


def failed(fleet: Fleet, seconds: float) -> dict[str, Any]:
    """The record, the same on every rank; the workers have left."""
    answers = fleet.answers(everybody(fleet), seconds)
    records = [answer["record"] for answer in answers.values()]
    assert records == [records[0]] * len(records)
    for rank in everybody(fleet):
        assert fleet.worker(rank).answer()["status"]["outcome"] == "failed"
    return dict(records[0])


def names_the_owner(record: dict[str, Any], rank: int) -> None:
    assert (record["error_type"], record["stage"]) == ("P2PError", "buckets"), record
    assert record["bucket"] is not None
    assert record["tensors"]
    assert f"rank {rank} on host host0" in record["message"]
    assert "nobody else holds" in record["message"]


def test_an_owner_that_is_killed_is_named_and_another_fleet_can_be_joined(launch: Launch) -> None:
    owners, metas = owners_with(launch, 2, SEED)
    joiners = launch(2)
    load(joiners, metas)
    hold_up(joiners, 1)
    owners.ranks[1].signal(signal.SIGKILL)
    owners.ranks[1].wait()
    go_on(joiners, 1)
    names_the_owner(failed(joiners, KILLED_SECONDS), 1)
    _, metas = owners_with(launch, 1, SEED + 1)
    load(joiners, metas)
    in_place(joiners, SEED + 1)


def test_a_replica_takes_a_killed_owner_s_place(launch: Launch) -> None:
    owners, metas = owners_with(launch, 2, SEED)
    _, others = owners_with(launch, 3, SEED)
    # A replica says from which shares its bytes come.
    origin = {
        tensor["name"]: held["epoch"]
        for held in json.loads(metas).values()
        for buffer in held["buffers"]
        for tensor in buffer["tensors"]
    }
    document = json.loads(others)
    for held in document.values():
        held["buffers"] = [
            buffer | {"tensors": [tensor], "origin": origin[tensor["name"]]}
            for buffer in held["buffers"]
            for tensor in buffer["tensors"]
        ]
    joiners = launch(1)
    load(joiners, metas, json.dumps(document))
    for killed in range(2):
        hold_up(joiners, 0)
        if not killed:
            for rank in owners.ranks:
                rank.signal(signal.SIGKILL)
                rank.wait()
        go_on(joiners, 0)
        answers = in_place(joiners, SEED, joiners.answers([0]))
        assert answers[0]["p2p_nbytes"] == 24 * 4 * (512 + 64 * 997)


def test_a_stopped_owner_is_named_and_can_be_read_when_it_goes_on(launch: Launch) -> None:
    owners, metas = owners_with(launch, 1, SEED)
    joiners = launch(1)
    load(joiners, metas)
    hold_up(joiners, 0)
    owners.ranks[0].signal(signal.SIGSTOP)
    go_on(joiners, 0)
    names_the_owner(failed(joiners, STOPPED_SECONDS), 0)
    owners.ranks[0].signal(signal.SIGCONT)
    in_place(joiners, SEED)


def test_a_killed_receiver_ends_the_owner_s_lease(launch: Launch) -> None:
    owners, metas = owners_with(launch, 1, SEED, CKPT_ENGINE_LEASE_TIMEOUT="60")
    joiners = launch(2)
    load(joiners, metas)
    hold_up(joiners, 1)
    joiners.ranks[0].signal(signal.SIGKILL)
    joiners.ranks[0].wait()
    go_on(joiners, 1)
    answer = joiners.ranks[1].answer(KILLED_SECONDS)
    assert answer["record"]["error_type"] == "PeerLost", answer
    assert "rank 0 is gone" in answer["message"]
    # Nobody reads any more: it need not wait.
    owners.tell("unregister", [0], name="a")
    assert owners.ranks[0].answer(KILLED_SECONDS)["message"] == ""


def test_memory_stays_while_it_is_read(launch: Launch) -> None:
    """The update that reads it ends well, also the second one; only then it is freed, and refilled."""
    owners, metas = owners_with(launch, 1, SEED, CKPT_ENGINE_LEASE_TIMEOUT="60")
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
    owners, metas = owners_with(launch, 1, SEED, CKPT_ENGINE_LEASE_TIMEOUT="1")
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
    _, metas = owners_with(launch, 1, SEED)
    document = json.loads(metas)
    document["0"]["session"] = "another one"
    joiners = launch(1)
    load(joiners, json.dumps(document))
    record = joiners.ask("update", [0], name="a", ranks=[0])[0]["record"]
    assert (record["error_type"], record["stage"]) == ("P2PError", "begin")
    assert "out of date" in record["message"]
    load(joiners, metas)
    in_place(joiners, SEED)
