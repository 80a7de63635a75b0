"""A rank's device for the simulation: streams, events, a ring and a staging buffer, whose use is watched.

A stream is a queue of operations, as a device's is. What is legal is what devices/base.py promises: the order
inside a stream, and an event's waits, which mean what was recorded when they were enqueued. A device in host
memory is one whose caller waits for each copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from schedule_for_update_tests import Walk

Operation = Iterator[Callable[[], bool] | None]
"""Yields where others may come in between; what it yields says when it can go on."""


class Use:
    """Somebody reads or writes bytes. Two at once, one of whom writes, is an error."""

    def __init__(self, among: list[Use], memory: torch.Tensor, who: str, *, writes: bool) -> None:
        self._start, self._end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        self._who, self._writes, self._among = who, writes, among
        for other in among:
            if other._start < self._end and self._start < other._end and (writes or other._writes):
                raise AssertionError(f"{who} disturbs {other._who}")
        among.append(self)

    def end(self) -> None:
        self._among.remove(self)


class Stream:
    """A daemon: does its operations in order, any time after they were enqueued."""

    def __init__(self) -> None:
        self._operations: deque[Operation] = deque()
        self._able: Callable[[], bool] | None = None

    def enqueue(self, operation: Operation) -> None:
        self._operations.append(operation)

    def do(self, action: Callable[[], object]) -> None:
        """Enqueues something short."""

        def operation() -> Operation:
            action()
            return
            yield

        self.enqueue(operation())

    @property
    def idle(self) -> bool:
        return not self._operations

    def ready(self) -> bool:
        return bool(self._operations) and (self._able is None or self._able())

    def step(self) -> None:
        try:
            self._able = next(self._operations[0])
        except StopIteration:
            self._able = None
            self._operations.popleft()


class Event:
    """Has happened when what was last recorded has been reached, or nothing was ever recorded."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._last = {"reached": True}

    def record(self, stream: Stream) -> None:
        mine = self._last = {"reached": False}

        def reach() -> None:
            mine["reached"] = True
            self._device.reached += 1

        stream.do(reach)

    def wait(self, stream: Stream) -> None:
        awaited = self._last

        def operation() -> Operation:
            yield lambda: awaited["reached"]

        stream.enqueue(operation())

    def query(self) -> bool:
        return self._last["reached"]


class SimulatedRing:
    """Both sides of a ring."""

    def __init__(self, device: SimulatedDevice, nbytes: int, event_count: int) -> None:
        self.bytes = torch.full((nbytes,), 0xEE, dtype=torch.uint8)
        self._device = device
        self._ready = [Event(device) for _ in range(event_count)]
        self._given_back: list[Event] = []

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        assert 0 <= offset <= offset + nbytes <= self.bytes.numel()
        return self.bytes[offset : offset + nbytes]

    def accept_events(self) -> None:
        """A worker has come, with events of its own."""
        self._given_back = [Event(self._device) for _ in self._ready]

    def mark_ready(self, bucket: int) -> None:
        self._ready[bucket % len(self._ready)].record(self._device.current)

    def is_ready(self, bucket: int) -> bool:
        return self._device.in_host_memory or self._device.look(self._ready[bucket % len(self._ready)])

    def mark_given_back(self, bucket: int, stream: Stream) -> None:
        self._given_back[bucket % len(self._given_back)].record(stream)

    def is_given_back(self, bucket: int) -> bool:
        return self._device.look(self._given_back[bucket % len(self._given_back)])


class SimulatedStaging:
    """As `devices.cuda.CudaStaging`."""

    def __init__(self, device: SimulatedDevice, nbytes: int) -> None:
        self.bytes = torch.full((nbytes,), 0xEE, dtype=torch.uint8)
        self._device = device
        self._filled, self._emptied = Event(device), Event(device)

    def fill(self) -> torch.Tensor:
        assert self._device.current is self._device.copies
        self._emptied.wait(self._device.current)
        return self.bytes

    def mark_filled(self) -> None:
        self._filled.record(self._device.current)

    def empty(self) -> torch.Tensor:
        assert self._device.current is self._device.broadcasts
        self._filled.wait(self._device.current)
        return self.bytes

    def mark_emptied(self) -> None:
        self._emptied.record(self._device.current)


class SimulatedDevice:
    """A rank's device, with the streams of its parameter server; `uses` is of all ranks together.

    `walk` is its rank's, and waits where the device makes its host wait; `has_mail`: whether something has
    arrived there. `reached`: events so far; `seen`: as many as at the first look since the last turn.
    """

    def __init__(self, rank: int, uses: list[Use], *, in_host_memory: bool) -> None:
        self.rank = rank
        self.uses = uses
        self.in_host_memory = in_host_memory
        self.enqueues = not in_host_memory
        self.copies, self.broadcasts = Stream(), Stream()
        self.current = self.copies
        self.reached = 0
        self.seen: int | None = None
        self.walk: Walk
        self.has_mail: Callable[[], bool]

    def use(self, memory: torch.Tensor, what: str, *, writes: bool) -> Use:
        return Use(self.uses, memory, f"rank {self.rank}: {what}", writes=writes)

    def look(self, event: Event) -> bool:
        """The host asks; the device goes on between two looks."""
        self.walk.pause("a look at its device")
        if self.seen is None:
            self.seen = self.reached
        return event.query()

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def use_copy_stream(self) -> object:
        return self._on(self.copies)

    def use_broadcast_stream(self) -> object:
        return self._on(self.broadcasts)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        stream = self.current
        stream.enqueue(self.operation(target, source, "a copy"))
        self.walk.pause("a copy", lambda: stream.idle or not self.in_host_memory)

    def operation(self, target: torch.Tensor, source: torch.Tensor, what: str) -> Operation:
        """A copy in two halves, between which others may come."""
        uses = [self.use(target, what, writes=True), self.use(source, what, writes=False)]
        middle = target.numel() // 2
        for half in (slice(middle), slice(middle, None)):
            target[half].copy_(source[half])
            yield None
        for use in uses:
            use.end()
