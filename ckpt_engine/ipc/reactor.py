"""One thread's waits: every socket of an update is watched in one place, against one deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import zmq

from ckpt_engine.deadline import Deadline

Source = zmq.Socket[bytes] | int
"""A ZeroMQ socket, or a file descriptor."""


class Reactor:
    """Calls back when a source is readable. Callbacks run in the thread that waits and may raise."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._callbacks: dict[Any, Callable[[], None]] = {}
        self._tick: Callable[[], None] | None = None
        self._ticked = time.monotonic()

    def every_second(self, callback: Callable[[], None]) -> None:
        """Calls back about once a second from now on, from turns."""
        self._tick = callback

    def add(self, source: Source, callback: Callable[[], None]) -> None:
        """Watches `source`; `callback` must take all that can be read, or be called again."""
        self._callbacks[source] = callback
        self._poller.register(source, zmq.POLLIN)

    def remove(self, source: Source) -> None:
        """Stops watching; unknown sources are ignored."""
        if self._callbacks.pop(source, None) is not None:
            self._poller.unregister(source)

    def turn(self, seconds: float) -> None:
        """Waits at most `seconds` for any source, and calls back for those that are readable."""
        for source, _ in self._poller.poll(max(0, int(seconds * 1000))):
            # An earlier callback of this turn may have removed it.
            callback = self._callbacks.get(source)
            if callback is not None:
                callback()
        if self._tick is not None and time.monotonic() - self._ticked >= 1.0:
            self._ticked = time.monotonic()
            self._tick()

    def wait(self, done: Callable[[], bool], deadline: Deadline, slice_seconds: float = 1.0) -> bool:
        """Turns until `done()` is true. Returns False when the deadline passed first."""
        while not done():
            if deadline.passed:
                return False
            # Rounded up: a poll of 0 ms just before the deadline would spin.
            self.turn(min(slice_seconds, deadline.remaining + 0.001))
        return True
