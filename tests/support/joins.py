"""What fleets do that others join: they hold a checkpoint, give their metas, read, and verify every bit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.checkpoints import LAYERS, digests_of
from tests.support.steered import Answer, Engines, Fleet, nothing
from tests.support.stopped import wait_until_stopped

HELD_UP = {"act": "stop", "at": "bucket", "bucket": 2}

Launch = Callable[..., Fleet]
"""(ranks, ...) -> a fleet that can be read by P2P, with workers of its own."""


@contextmanager
def launcher(
    factory: pytest.TempPathFactory, prefix: Callable[[int], Sequence[str]] = nothing
) -> Iterator[Launch]:
    """Launches fleets that can be read by P2P, each with workers of its own; ends them all.

    Args:
        prefix: what runs a command on a host.
    """
    made: list[tuple[Fleet, Engines]] = []

    def start(size: int, hosts: int = 1, **options: Any) -> Fleet:  # noqa: ANN401 - as of `Fleet`
        engines = Engines(factory.mktemp("engines"), prefix)
        fleet = Fleet(size, hosts, factory.mktemp("fleet"), engines, p2p=True, **options)
        made.append((fleet, engines))
        return fleet

    yield start
    for fleet, engines in made:
        fleet.end()
        engines.end()


def everybody(fleet: Fleet) -> list[int]:
    return list(range(fleet.size))


def owners_with(launch: Launch, *place: int, seed: int, **environment: str) -> tuple[Fleet, str]:
    """A fleet that holds the checkpoint, and its metas."""
    fleet = launch(*place, **environment)
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


def hold_up(fleet: Fleet, rank: int, *, keep: bool = False) -> None:
    """Starts an update whose worker of `rank` stops in a bucket."""
    for one in everybody(fleet):
        fleet.worker(one).news.clear()
    fleet.tell(
        "update",
        everybody(fleet),
        name="a",
        ranks=everybody(fleet),
        worker_fault=lambda one: HELD_UP if one == rank else None,
        keep=keep,
    )
    fleet.worker(rank).happened("fault")
    wait_until_stopped(fleet.worker(rank).pid)


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


def keep(*fleets: Fleet, seed: int) -> list[dict[int, Answer]]:
    """They join at the same time, and keep what they read; every bit is right."""
    for fleet in fleets:
        for rank in everybody(fleet):
            fleet.worker(rank)
    for fleet in fleets:
        fleet.tell("update", everybody(fleet), name="a", ranks=everybody(fleet), keep=True)
    return [in_place(fleet, seed, fleet.answers(everybody(fleet))) for fleet in fleets]


def failed(fleet: Fleet, seconds: float) -> dict[str, Any]:
    """The record, the same on every rank; the workers have left."""
    answers = fleet.answers(everybody(fleet), seconds)
    records = [answer["record"] for answer in answers.values()]
    assert records == [records[0]] * len(records)
    for rank in everybody(fleet):
        assert fleet.worker(rank).answer()["status"]["outcome"] == "failed"
    return dict(records[0])


def verifies(owners: Fleet, joiners: Fleet, seed: int, seconds: float) -> None:
    """Joiners, which have the owners' metas, compare what comes with its digests (all of them have
    CKPT_ENGINE_VERIFY): all of it is right; a bit that flips in an owner's memory is found by all, and its
    tensor named; once it has flipped back all is right again."""
    answers = joiners.ask("update", everybody(joiners), name="a", ranks=everybody(joiners))
    assert {answer["message"] for answer in answers.values()} == {""}, answers
    assert sum(answer["p2p_nbytes"] for answer in answers.values()) > 0
    for rank in everybody(joiners):
        report = joiners.worker(rank).answer()
        assert report["status"]["verified"]["arrived"] == 2 * LAYERS, report["status"]
        assert report["digests"] == digests_of("layers", seed)
    last = owners.size - 1
    flip: dict[str, Any] = {"name": "a", "buffer": 0, "number": 3, "byte": 17}
    tensor = owners.ask("flip", [last], **flip)[last]["tensor"]
    joiners.tell("update", everybody(joiners), name="a", ranks=everybody(joiners))
    record = failed(joiners, seconds)
    assert record["error_type"] == "CorruptionError", record
    assert tensor in record["tensors"], record
    assert f"tensor {tensor!r}" in record["message"]
    assert "arrived with other bytes" in record["message"]
    owners.ask("flip", [last], **flip)
    in_place(joiners, seed)
