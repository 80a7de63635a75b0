"""The channel of a rank that takes part without a worker: it only gives others what it holds."""

from __future__ import annotations

from typing import Protocol

from ckpt_engine.devices import Ring
from ckpt_engine.ipc.messages import Begin


class Channel(Protocol):
    """A rank's way to its worker (`ipc.sender.WorkerChannel`), as an update uses it.

    `handle`: the worker's, empty without one. `done`: the last bucket given back. `announced`: the last one
    announced. `gone`: the worker has left; `died`: without a word; `heard`: knowing how the update
    ended.
    """

    handle: str
    worker_pid: int | None
    ready: bool
    done: int
    announced: int
    released: bool
    finished: bool
    gone: bool
    died: bool
    heard: bool

    @property
    def touched(self) -> bool: ...

    @property
    def connected(self) -> bool: ...

    def begin(self, begin: Begin, ring: Ring) -> None: ...

    def announce(self, index: int) -> None: ...

    def finish(self) -> None: ...

    def freed(self) -> None: ...

    def beat(self) -> None: ...

    def commit(self, version: str) -> None: ...

    def abort(self, reason: str) -> bool: ...

    def wait_until_gone(self) -> bool: ...

    def close(self) -> None: ...


class NoWorker:
    """Gives every bucket back as soon as it is announced."""

    handle = ""
    worker_pid: int | None = None
    touched = False
    connected = False
    died = False
    heard = True

    def __init__(self) -> None:
        self.ready = self.released = self.finished = self.gone = True
        self.done = self.announced = -1

    def begin(self, begin: Begin, ring: Ring) -> None: ...

    def announce(self, index: int) -> None:
        self.done = self.announced = index

    def finish(self) -> None: ...

    def freed(self) -> None: ...

    def beat(self) -> None: ...

    def commit(self, version: str) -> None: ...

    def abort(self, reason: str) -> bool:
        return True

    def wait_until_gone(self) -> bool:
        return True

    def close(self) -> None: ...
