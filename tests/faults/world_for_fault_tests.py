"""A launch of ranks with its engines, what faults do to it, and what must be true afterwards."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from reports_for_fault_tests import Reports

from ckpt_engine.ipc.sockets import SocketDirectory
from tests.support.checkpoints import digests_of
from tests.support.steered import Answer, Fleet, Memory, Steered

THREADS = {"MainThread", "ckpt-engine-control", "ckpt-engine-control-server"}
SURELY_SECONDS = 15.0
"""For what goes by itself, as sockets that ZeroMQ closes in its thread do."""
DESCRIPTOR_SLACK = 3
"""Of such sockets, and of a group's connections."""
RESIDENT_SLACK = 24 * 1024 * 1024
"""What an allocator may keep. A checkpoint that stayed after each fault would soon be more."""
END_SECONDS = 30.0

Fault = dict[str, Any]


class World:
    """`fleet`, the ranks of it that are `alive`, and what their processes held before any fault.

    `kind`: of its checkpoints (`tests.support.checkpoints`). `registered`: whether there is a checkpoint "a",
    which the next one takes the place of.
    """

    def __init__(self, fleet: Fleet, seeds: Iterator[int], reports: Reports, kind: str = "layers") -> None:
        self.fleet = fleet
        self.kind = kind
        self.reports = reports
        self.alive = list(range(fleet.size))
        self._seeds = seeds
        self.registered = False
        self._doomed: set[int] = set()
        self._shm = set(os.listdir("/dev/shm"))
        self._descriptors: dict[str, int] = {}
        self._memory: dict[str, Memory] = {}
        # Twice: groups, threads and the allocator's pools are there then.
        for _ in range(2):
            self.put_in_place(self.new_checkpoint())
        for name, process in self._processes().items():
            self._descriptors[name] = len(process.descriptors())
            self._memory[name] = process.memory()

    @property
    def name(self) -> str:
        fleet = self.fleet
        return f"{fleet.size} ranks on {fleet.hosts} host{'s' * (fleet.hosts > 1)}"

    @property
    def last(self) -> int:
        return self.alive[-1]

    def but(self, *ranks: int) -> list[int]:
        return [rank for rank in self.alive if rank not in ranks]

    def ask(self, do: str, **arguments: Any) -> None:  # noqa: ANN401
        """All that are alive do it, without an error."""
        errors = {rank: answer["message"] for rank, answer in self.answers_to(do, **arguments).items()}
        assert set(errors.values()) == {""}, f"{do}: {errors}"

    def answers_to(self, do: str, **arguments: Any) -> dict[int, Answer]:  # noqa: ANN401
        return self.fleet.ask(do, self.alive, **arguments)

    # Updates

    def new_checkpoint(self, *, digests: bool = False) -> int:
        """Shares out other weights than the workers have, as checkpoint "a"; their seed."""
        if self.registered:
            self.ask("unregister", name="a")
        seed = next(self._seeds)
        self.register("a", seed, digests=digests)
        self.registered = True
        self.gather("a")
        return seed

    def register(self, name: str, seed: int, *, digests: bool = False) -> None:
        self.ask(
            "register",
            name=name,
            kind=self.kind,
            seed=seed,
            parts=lambda rank: [self.part(rank)],
            of=len(self.alive),
            digests=digests,
        )

    def part(self, rank: int) -> int:
        """Which share of a checkpoint this rank holds, of as many as ranks are alive."""
        return self.alive.index(rank)

    def gather(self, name: str) -> None:
        lost = len(self.alive) < self.fleet.size
        self.ask("gather", name=name, ranks=self.alive if lost else None)

    def put_in_place(
        self,
        seed: int,
        ranks: Sequence[int] | None = None,
        name: str = "a",
        **arguments: Any,  # noqa: ANN401
    ) -> None:
        """Updates the workers of `ranks` with checkpoint `name` of this seed, and verifies every bit.

        All that are alive take part: they hold a share.
        """
        if ranks is None and len(self.alive) < self.fleet.size:
            ranks = self.alive
        updated = self.alive if ranks is None else ranks
        for rank in updated:
            self.fleet.worker(rank)
        answers = self.answers_to("update", name=name, ranks=ranks, **arguments)
        assert {answer["message"] for answer in answers.values()} == {""}, answers
        assert len({answer["version"] for answer in answers.values()}) == 1, answers
        for rank in updated:
            self.has(rank, seed, answers[rank]["version"])

    def has(self, rank: int, seed: int, version: str) -> Answer:
        """What the rank's worker says next: it committed this version, with every bit of this seed."""
        report = self.fleet.worker(rank).answer()
        assert report["status"]["outcome"] == "committed", report["status"]
        assert report["status"]["version"] == version
        expected = digests_of(self.kind, seed)
        wrong = [name for name, digest in expected.items() if report["digests"].get(name) != digest]
        assert not wrong, f"rank {rank} has other bits than those of seed {seed}: {wrong}"
        status: Answer = report["status"]
        return status

    def start(
        self,
        faults: Mapping[int, Fault] | None = None,
        worker_faults: Mapping[int, Fault] | None = None,
        name: str = "a",
        **arguments: Any,  # noqa: ANN401
    ) -> None:
        """Starts an update during which ranks, and workers of ranks, meet with faults."""
        self._doomed = {
            rank for rank, fault in (worker_faults or {}).items() if fault["act"] in ("kill", "stop")
        }
        for rank in self.alive:
            self.fleet.worker(rank).news.clear()
        if len(self.alive) < self.fleet.size:
            arguments.setdefault("ranks", self.alive)
        self.fleet.tell(
            "update",
            self.alive,
            name=name,
            fault=lambda rank: (faults or {}).get(rank),
            worker_fault=lambda rank: (worker_faults or {}).get(rank),
            **arguments,
        )

    # Reports

    def started(self) -> float:
        """When the last rank began with what it was told."""
        return max(self.fleet.ranks[rank].happened("started") for rank in self.alive)

    def reported(
        self, fault: str, when: float, limit: float, on: Sequence[int], workers: Sequence[int] = ()
    ) -> dict[int, Answer]:
        """The answers of ranks `on`, none of which committed.

        Their engines' workers, if they were asked to receive, and those of `workers` have left their loops.
        """
        answers = self.fleet.answers(on, limit + 10)
        asked = [rank for rank, answer in answers.items() if answer["asked"] and rank not in self._doomed]
        ended = self.left([*asked, *workers], limit)
        seconds = max(report["ended"] for report in [*answers.values(), *ended]) - when
        self.reports.add(f"{fault}: {self.name}", seconds, limit)
        for rank, answer in answers.items():
            assert answer["error"] is not None, f"rank {rank} committed, others did not: {answers}"
        return answers

    def one_outcome(self, fault: str, victim: Steered | None, limit: float) -> bool:
        """Whether what was started is committed, which all ranks and workers say alike, or why it is not.

        Args:
            victim: the process that meets with the fault; None: there is none.
        """
        answers: dict[int, Answer] = self.fleet.answers(self.alive, limit)
        asked = [rank for rank in self.alive if answers[rank]["asked"] and rank not in self._doomed]
        reports = {rank: self.fleet.worker(rank).answer(limit) for rank in asked}
        if victim is not None:
            last = max(one["ended"] for one in [*answers.values(), *reports.values()])
            seconds = max(0.0, last - victim.happened("fault"))
            self.reports.add(f"{fault}: {self.name}", seconds, limit)
        # A rank whose worker could not be told of the commit says so, and that it was one.
        errors = {answer["error"] for answer in answers.values()} - {"PublishError"}
        if errors == {None}:
            assert len({answer["version"] for answer in answers.values() if not answer["error"]}) == 1, (
                answers
            )
            for report in reports.values():
                # A worker that could not learn of the commit does not say that it has the version.
                assert report["status"]["outcome"] in ("committed", "failed", "unknown"), report["status"]
            return True
        assert None not in errors, answers
        failed_alike({rank: each for rank, each in answers.items() if each["error"] != "KeyboardInterrupt"})
        for report in reports.values():
            assert report["status"]["outcome"] != "committed", report["status"]
        return False

    def left(self, ranks: Sequence[int], limit: float) -> list[Answer]:
        """What their workers say, which have left their loops without a new version."""
        ended = [self.fleet.worker(rank).answer(limit + 10) for rank in ranks]
        for report in ended:
            assert report["status"]["outcome"] == "failed", report["status"]
            assert report["status"]["touched"] == (report["buckets"] > 0), report["status"]
        return ended

    # What is left

    def nothing_is_left(self) -> None:
        """No thread, socket, ring, child, descriptor or memory of the fault, on any survivor; soon."""
        deadline, pause = time.monotonic() + SURELY_SECONDS, threading.Event()
        while left := self._left():
            if time.monotonic() > deadline:
                pytest.fail(f"{self.name}: left behind: {left}")
            pause.wait(0.05)

    def _left(self) -> list[str]:
        left = []
        for rank, answer in self.answers_to("state").items():
            left += [f"rank {rank}: thread {name}" for name in answer["threads"] if name not in THREADS]
            if not {*answer["sockets"]} <= {"lock", "control"}:
                left.append(f"rank {rank}: {answer['sockets']}")
        pids = set()
        for name, process in self._processes().items():
            pids.add(str(process.pid))
            left += [f"{name}: {what}" for what in [*process.rings(), *process.children()]]
            descriptors, memory = len(process.descriptors()), process.memory()
            if descriptors > self._descriptors[name] + DESCRIPTOR_SLACK:
                left.append(f"{name}: {descriptors} descriptors after {self._descriptors[name]}")
            if memory.resident > self._memory[name].resident + RESIDENT_SLACK:
                left.append(f"{name}: {memory} after {self._memory[name]}")
            if memory.locked > self._memory[name].locked:
                left.append(f"{name}: {memory} after {self._memory[name]}")
        # Other programs of the host come and go there: names with a pid, as torch's, are told apart.
        new = set(os.listdir("/dev/shm")) - self._shm
        return left + [f"/dev/shm/{name}" for name in new if pids & set(re.findall(r"\d+", name))]

    def _processes(self) -> dict[str, Steered]:
        ranks: dict[str, Steered] = {f"rank {rank}": self.fleet.ranks[rank] for rank in self.alive}
        return ranks | {f"the worker of rank {rank}": self.fleet.worker(rank) for rank in self.alive}

    # Ending

    def lose(self, rank: int) -> None:
        self.alive.remove(rank)

    def end_well(self, status: int = 0) -> None:
        """Every rank that is alive ends with this status, soon, and no process of its own survives it."""
        for rank in self.alive:
            self.fleet.ranks[rank].tell("end")
        self.ended(self.alive, status)

    def ended(self, ranks: Sequence[int], status: int) -> None:
        for rank in ranks:
            assert self.fleet.ranks[rank].wait(END_SECONDS) == status, self.fleet.ranks[rank].log()

    def sockets_are_swept(self) -> None:
        """Only what killed ranks could not remove is there, and that until a parameter server comes."""
        base = self.fleet.socket_dir
        directories = [path for path in base.iterdir() if not path.is_symlink()]
        assert len(directories) == self.fleet.size - len(self.alive)
        SocketDirectory(base).close()
        assert os.listdir(base) == []


PLACE = ("stage", "bucket", "tensors", "left_out")


def failed_alike(answers: Mapping[int, Answer], *, lost: int | None = None) -> dict[str, Any]:
    """The record of an update's failure, which is the same on every rank; when rank `lost` was, each says how
    far it had come itself."""
    first = next(iter(answers.values()))
    own = PLACE if lost is not None else ()
    for answer in answers.values():
        assert "record" in answer, answers
        record: dict[str, Any] = answer["record"]
        same = {key: value for key, value in record.items() if key not in own}
        assert answer["error"] == first["error"], answers
        assert same == {key: first["record"][key] for key in same}, answers
        if lost is not None:
            assert record["rank"] == lost, answers
            assert record["stage"] in ("begin", "handshake", "buckets"), answers
            assert (record["bucket"] is not None) == bool(record["tensors"]), answers
            assert record["bucket"] is None or record["stage"] == "buckets", answers
    return dict(first["record"])


NewWorld = Callable[..., World]
"""Launches ranks; see the fixture `new_world`."""
Worlds = Callable[[int, int], World]
"""(size, hosts) -> the one that tests share; see the fixture `worlds`."""
