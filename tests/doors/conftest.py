"""Updates that are held in a bucket while somebody tries every door."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support.checkpoints import digests_of
from tests.support.steered import Engines, Fleet, SteeredWorker
from tests.support.stopped import wait_until_stopped

BUCKET = 5
KIND = "layers"
LIMIT = 120.0


class HeldWorld:
    """Ranks, and a checkpoint whose update can be held."""

    def __init__(self, fleet: Fleet, control_port: int = 0) -> None:
        self.fleet = fleet
        self.control_port = control_port
        self.ranks = list(range(fleet.size))
        self._seeds = iter(range(20281101, 20291101))

    def workers(self) -> list[SteeredWorker]:
        return [self.fleet.worker(rank) for rank in self.ranks]

    def pids(self) -> list[int]:
        return [process.pid for process in [*self.fleet.ranks, *self.workers()]]

    def update(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Updates all workers, and verifies every bit; `meanwhile` is called while rank 0's worker, and so
        all of them, wait in the middle."""
        seed = next(self._seeds)
        size = self.fleet.size
        workers = self.workers()
        self.ask("unregister", name="a")
        self.ask("register", name="a", kind=KIND, seed=seed, parts=lambda rank: [rank], of=size)
        self.ask("gather", name="a")
        workers[0].news.clear()
        stop = {"act": "stop", "at": "bucket", "bucket": BUCKET}
        self.fleet.tell(
            "update", self.ranks, name="a", worker_fault=lambda rank: stop if meanwhile and not rank else None
        )
        if meanwhile is not None:
            workers[0].happened("fault", LIMIT)
            wait_until_stopped(workers[0].pid)
            try:
                meanwhile()
            finally:
                workers[0].signal(signal.SIGCONT)
        answers = self.fleet.answers(self.ranks, LIMIT)
        assert {answer["message"] for answer in answers.values()} == {""}, answers
        expected = digests_of(KIND, seed)
        for worker in workers:
            report = worker.answer(LIMIT)
            assert report["status"]["outcome"] == "committed", report["status"]
            assert report["digests"] == expected, f"seed {seed}"

    def ask(self, do: str, **arguments: object) -> None:
        answers = self.fleet.ask(do, self.ranks, **arguments)
        assert {answer["message"] for answer in answers.values()} == {""}, f"{do}: {answers}"

    def threads(self) -> list[list[str]]:
        return [answer["threads"] for answer in self.fleet.ask("state", self.ranks).values()]


@pytest.fixture
def new_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., HeldWorld]]:
    """(size, hosts, environment of the ranks) -> a world."""
    with worlds(tmp_path_factory) as make:
        yield make


@contextmanager
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., HeldWorld]]:
    # Held, or under attack on a loaded machine, nobody must be given up for its silence.
    patient = ("env", "CKPT_ENGINE_STALL_TIMEOUT=60")
    engines = Engines(tmp_path_factory.mktemp("engines"), lambda host: patient)
    fleets: list[Fleet] = []

    def make(size: int, hosts: int, **environment: str) -> HeldWorld:
        patience = {"CKPT_ENGINE_REPLY_TIMEOUT": "90", "CKPT_ENGINE_STALL_TIMEOUT": "60"}
        directory = tmp_path_factory.mktemp("fleet")
        fleets.append(Fleet(size, hosts, directory, engines, **patience | environment))
        return HeldWorld(fleets[-1], int(environment.get("CKPT_ENGINE_CONTROL_PORT", 0)))

    try:
        yield make
    finally:
        for fleet in fleets:
            fleet.end()
        engines.end()
