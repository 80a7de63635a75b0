"""Update after update with faults drawn at random: one outcome each time, and nothing grows.

    SOAK_UPDATES=500 SOAK_SEED=1 make test-faults ARGS='-s -k soak'

50 updates by default, and the seed is printed. Two ranks and their engines' workers live through all of it,
but for workers that are killed. Faults that cost a rank its place for good have tests of their own.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reports_for_fault_tests import STOPPED_SECONDS, Reports
from safetensors.torch import save_file
from world_for_fault_tests import NewWorld, World, failed_alike

from benchmarks.soak import growth, is_flat
from tests.support.steered import Engines, Steered

UPDATES = int(os.environ.get("SOAK_UPDATES", "50"))
SEED = int(os.environ.get("SOAK_SEED", str(time.time_ns() % 10**6)))
MOMENTS = 10
"""How often it is looked at what the processes hold; not before a tenth of the updates."""
SECONDS_EACH = 30
FAULTS: dict[str, int] = {
    "none": 8,
    "worker raises": 5,
    "rank raises": 4,
    "rank interrupted": 3,
    "message twice": 5,
    "message late": 3,
    "message lost": 1,
    "connection closed": 4,
    "disk fails": 4,
    "flip": 5,
    "clock jumps": 3,
    "worker killed": 2,
}
"""And how likely each is: those that wait for a deadline, or for a new process, are rare."""
WORKER = ("Ready", "BucketDone", "Released", "Finished")
SERVER = ("Begin", "BucketReady", "Finish", "Freed")


class Soak:
    """Draws faults and makes updates with them."""

    def __init__(self, world: World, directory: Path, seed: int) -> None:
        self.world = world
        world.reports = Reports()  # its table has a line for each fault that has a test
        self.rng = random.Random(seed)
        self.met: Counter[str] = Counter()
        self.committed = 0
        self._file = directory / "model.safetensors"

    def update(self) -> None:
        (fault,) = self.rng.choices(list(FAULTS), list(FAULTS.values()))
        self.met[fault] += 1
        victim = self.rng.choice(self.world.alive)
        if fault == "disk fails":
            self._disk_fails(victim)
            return
        seed = self.world.new_checkpoint(digests=fault == "flip")
        verify, of_rank, of_worker = self._drawn(fault)
        ranks = {} if of_rank is None else {victim: of_rank}
        workers = {} if of_worker is None else {victim: of_worker}
        process: Steered | None = None
        if ranks or workers:
            process = self.world.fleet.ranks[victim] if ranks else self.world.fleet.worker(victim)
        # An engine that waits for its worker's answer may tell of a death, too, and in its own words.
        self.world.start(ranks, workers, verify=verify, wait=fault != "worker killed")
        if fault == "none":
            answers = self.world.fleet.answers(self.world.alive)
            for rank in self.world.alive:
                self.world.has(rank, seed, answers[rank]["version"])
            self.committed += 1
            return
        self.committed += self.world.one_outcome(f"soak, {fault}", process, STOPPED_SECONDS)
        if fault == "worker killed":
            assert process is not None
            process.wait()

    def _drawn(self, fault: str) -> tuple[str, dict[str, Any] | None, dict[str, Any] | None]:
        """What is verified, and what the rank and its worker meet with."""
        draw, bucket = self.rng.choice, self.rng.randrange(24)
        acts = {"message twice": "twice", "message late": "late", "message lost": "lose"}
        if fault in acts or fault == "connection closed":
            act = acts.get(fault, "close")
            kind = draw(WORKER + SERVER)
            message = {"act": act, "message": kind}
            return ("off", message, None) if kind in SERVER else ("off", None, message)
        in_bucket = {"at": "bucket", "bucket": bucket}
        if fault == "worker raises":
            return "off", None, {"act": "raise"} | draw([in_bucket, {"at": "post_hook"}])
        if fault == "worker killed":
            places = [in_bucket, {"at": "hello"}, {"at": "map"}, {"at": "post_hook"}]
            return "off", None, {"act": "kill"} | draw(places)
        if fault == "flip":
            at = draw(["slot", "bucket"])
            return "full", None, {"act": "flip", "at": at, "bucket": bucket}
        if fault == "clock jumps":
            by = draw([3600.0, -3600.0])
            return "off", *draw(
                [
                    ({"act": "clock", "at": "buckets", "by": by}, None),
                    (None, {"act": "clock", "by": by} | in_bucket),
                ]
            )
        if fault == "none":
            return "off", None, None
        act = {"rank raises": "raise", "rank interrupted": "interrupt"}[fault]
        at = draw(["request", "buckets"]) if act == "raise" else "buckets"
        return "off", {"act": act, "at": at}, None

    def _disk_fails(self, victim: int) -> None:
        """While one rank reads its files: nothing of them stays registered anywhere."""
        world = self.world
        # Between two updates no rank may hold more than its share.
        save_file({f"w{number}": torch.ones(1 << 18) for number in range(4)}, self._file)
        reading = self.rng.choice(["cut", "io"])
        answers = world.answers_to(
            "register_files",
            name="from a disk",
            files=lambda rank: [str(self._file)] if rank == victim else [],
            reading=lambda rank: reading if rank == victim else "",
        )
        assert [rank for rank in world.alive if answers[rank]["error"]] == [victim], answers
        world.fleet.tell("gather", world.alive, name="from a disk")
        assert failed_alike(world.fleet.answers(world.alive))["rank"] == victim
        world.ask("unregister", name="from a disk")

    def figures(self) -> list[dict[str, Any]]:
        """Of each rank and its worker, once a good update has gone through."""
        self.world.put_in_place(self.world.new_checkpoint())
        self.world.nothing_is_left()
        fleet = self.world.fleet
        return [
            {"server": fleet.ranks[rank].figures(), "worker": fleet.worker(rank).figures()}
            for rank in self.world.alive
        ]


@pytest.fixture
def soaked(new_world: NewWorld, tmp_path: Path, engines: Engines) -> Iterator[Callable[[int], Soak]]:
    worlds: list[World] = []

    def make(seed: int) -> Soak:
        worlds.append(new_world(2, 1, engines))
        return Soak(worlds[0], tmp_path, seed)

    yield make
    for world in worlds:
        world.end_well()


@pytest.mark.timeout(120 + UPDATES * SECONDS_EACH)
def test_soak_with_random_faults(soaked: Callable[[int], Soak], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\nSOAK_SEED={SEED} SOAK_UPDATES={UPDATES}\n")
    soak, began = soaked(SEED), time.monotonic()
    moments = []
    for number in range(1, UPDATES + 1):
        soak.update()
        if number % max(1, UPDATES // MOMENTS) == 0:
            moments.append(soak.figures())
    grown = growth([list(of_rank) for of_rank in zip(*moments, strict=True)])
    slowest = max(soak.world.reports.seconds.items(), key=lambda item: item[1], default=("no fault", 0.0))
    with capsys.disabled():
        summary = {
            "updates": UPDATES,
            "seed": SEED,
            "seconds": round(time.monotonic() - began, 1),
            "committed": soak.committed,
            "faults": dict(soak.met.most_common()),
            "slowest": [slowest[0], round(slowest[1], 2)],
            "growth": grown,
            "flat": is_flat(grown),
        }
        sys.stdout.write(json.dumps(summary) + "\n")
    assert is_flat(grown), grown
