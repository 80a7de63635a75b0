"""Ranks that meet: a `Control` for each, in threads here or in processes of their own."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from torch._C._distributed_c10d import TCPStore

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ErrorRecord
from ckpt_engine.settings import Settings
from ckpt_engine.transport.bootstrap import own_store
from ckpt_engine.transport.control import Control, Round

LIMIT = 60.0
"""Seconds after which something that must happen soon has not happened."""

T = TypeVar("T")


def wait_until(done: Callable[[], bool], what: str) -> None:
    deadline = Deadline.after(LIMIT)
    while not done():
        if deadline.passed:
            pytest.fail(f"waited {LIMIT} s for {what}")
        time.sleep(0.001)


def readable(fd: int, seconds: float = LIMIT) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def a_record(message: str = "boom", rank: int | None = None) -> ErrorRecord:
    return ErrorRecord(error_type="PeerLost", message=message, stage="buckets", rank=rank)


def make_control(rank: int, size: int, port: int, stall_seconds: float = LIMIT) -> Control:
    """A rank of the world whose store is at `port` of the loopback; as rank 0 at any free one for 0."""
    deadline = Deadline.after(LIMIT)
    meeting_point = own_store(rank, size, "127.0.0.1", port, Settings(), deadline)
    return Control(meeting_point, rank=rank, world_size=size, deadline=deadline, stall_seconds=stall_seconds)


def port_of(control: Control) -> int:
    assert isinstance(control.store, TCPStore)
    return control.store.port


class Fleet:
    """All ranks, or the first `here` of them, each with its own client and its own thread at a time."""

    def __init__(self, size: int, here: int | None = None, stall_seconds: float = LIMIT) -> None:
        first = make_control(0, size, 0, stall_seconds)
        self.size = size
        self.controls = [first]
        for rank in range(1, size if here is None else here):
            self.controls.append(make_control(rank, size, port_of(first), stall_seconds))
        self.rounds: list[Round] = []
        self._pool = ThreadPoolExecutor(size)

    @property
    def port(self) -> int:
        return port_of(self.controls[0])

    def open_round(self, members: Sequence[int] | None = None, purpose: str = "meet") -> list[Round]:
        """The next round on every rank that is here; the last one is left."""
        for round_ in self.rounds:
            round_.leave()
        self.rounds = [
            control.open_round(purpose, members, decides=True)
            for control in self.controls
            if members is None or control.rank in members
        ]
        return self.rounds

    def start(self, act: Callable[..., T], *arguments: Any) -> Future[T]:  # noqa: ANN401 - the act's own
        """Acts for one rank, in a thread."""
        return self._pool.submit(act, *arguments)

    def on_all(self, act: Callable[[int, Round], T]) -> list[T]:
        """What each rank's act on its round came to; raises what one of them raised."""
        futures = [self.start(act, place, round_) for place, round_ in enumerate(self.rounds)]
        return [future.result(LIMIT) for future in futures]

    def exchange(self, payloads: Sequence[bytes], *, without_lost: bool = False) -> list[dict[int, bytes]]:
        deadline = Deadline.after(LIMIT)
        return self.on_all(
            lambda place, round_: round_.exchange(payloads[place], deadline, without_lost=without_lost)
        )

    def close(self) -> None:
        for round_ in self.rounds:
            round_.leave()
        for control in reversed(self.controls):
            control.close()
        self._pool.shutdown()
        self.controls, self.rounds = [], []


@contextmanager
def fleet_of(size: int, here: int | None = None, stall_seconds: float = LIMIT) -> Iterator[Fleet]:
    fleet = Fleet(size, here, stall_seconds)
    try:
        yield fleet
    finally:
        fleet.close()


class RankProcess:
    """A rank in a process of its own, which does as it is told (`rank_process_for_transport_tests`)."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("rank_process_for_transport_tests.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def tell(self, do: str, **arguments: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:  # noqa: ANN401 - JSON
        assert self._process.stdout is not None
        assert readable(self._process.stdout.fileno()), f"a rank's process said nothing within {LIMIT} s"
        return json.loads(self._process.stdout.readline())

    def ask(self, do: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        self.tell(do, **arguments)
        return self.answer()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait(LIMIT)  # nobody must take it for alive

    def end(self) -> None:
        if self.alive:
            self._process.kill()
        self._process.communicate(timeout=LIMIT)
