"""Streams whose work is done late: when somebody waits for it, or looks at an event behind it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Task = Callable[[], bool]
"""Does its work and says whether it has done it all; asked again if not. Raises what the device reports."""

_LOCAL = threading.local()
_LOCK = threading.RLock()


class Stream:
    def __init__(self, device: object = None, priority: int = 0, **kwargs: object) -> None:
        self._tasks: deque[Task] = deque()

    def enqueue(self, task: Task) -> None:
        with _LOCK:
            self._tasks.append(task)

    def step(self) -> bool:
        """Goes on with the oldest task; whether any is left."""
        with _LOCK:
            if self._tasks:
                task = self._tasks[0]
                try:
                    done = task()
                except Exception:
                    self._tasks.clear()
                    raise
                if done:
                    self._tasks.popleft()
            return bool(self._tasks)

    def query(self) -> bool:
        with _LOCK:
            return not self._tasks

    def synchronize(self) -> None:
        while self.step():
            time.sleep(0)

    def wait_event(self, event: Event) -> None:
        event.wait(self)


class Event:
    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self._stream: Stream | None = None
        self._recorded = self._happened = 0
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or current_stream()
        self._recorded += 1
        number = self._recorded

        def happen() -> bool:
            self._happened = max(self._happened, number)
            self._time = time.monotonic()
            return True

        self._stream.enqueue(happen)

    def query(self) -> bool:
        """As long as it has not happened, every look at it sees its stream go on by one task."""
        if self._happened == self._recorded:
            return True
        assert self._stream is not None
        self._stream.step()
        return False

    def synchronize(self) -> None:
        while not self.query():
            time.sleep(0)

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds."""
        return 1e3 * (end_event._time - self._time)

    def wait(self, stream: Stream | None = None) -> None:
        number = self._recorded

        def passed() -> bool:
            if self._happened < number and self._stream is not None:
                self._stream.step()
            return self._happened >= number

        (stream or current_stream()).enqueue(passed)

    def ipc_handle(self) -> bytes:
        raise RuntimeError("this driver has no inter-process events")


_DEFAULT = Stream()
_STREAMS: list[Stream] = [_DEFAULT]


def current_stream(device: object = None) -> Stream:
    return getattr(_LOCAL, "stream", _DEFAULT)


@contextmanager
def stream(stream: Stream) -> Iterator[Stream]:
    before = current_stream()
    _LOCAL.stream = stream
    if stream not in _STREAMS:
        _STREAMS.append(stream)
    try:
        yield stream
    finally:
        _LOCAL.stream = before


def synchronize(device: object = None) -> None:
    while any([one.step() for one in _STREAMS]):  # all of them go on, not one after the other
        time.sleep(0)
