"""What an update needs of a device: an identity, its free memory, and rings that another process maps.

On a device with streams, copies into a ring and reloads out of it are enqueued, not awaited, and each ring
has two events for each slot: *ready* (the bucket is in its slot) and *given back* (the reload has read it).
Bucket number i uses events i mod `event_count`; the plan's credits keep two buckets from sharing one. Hosts
look at the events and pass on what they see; no stream ever waits for an event of another process, for a
process that died would leave it waiting for ever. On CPU everything is done when it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from ckpt_engine.devices.handles import RingHandle
from ckpt_engine.host_memory import HostMemoryPinner


class RingMemory(Protocol):
    """One allocation on the device, cut into slots, mapped by a parameter server and its worker."""

    nbytes: int

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """1-D uint8 tensor over `nbytes` bytes from `offset`."""
        ...

    def close(self) -> None:
        """Drops this process's map, or the memory. Idempotent."""
        ...


class Ring(RingMemory, Protocol):
    """The parameter server's side: it made the ring."""

    def handle(self) -> RingHandle:
        """The plain fields from which another process maps the ring."""
        ...

    def descriptors(self) -> list[int]:
        """File descriptors that must travel with the handle (SCM_RIGHTS); still owned by the ring."""
        ...

    def accept_events(self, given_back: Sequence[bytes]) -> None:
        """Takes the IPC handles of the worker's events. Raises ProtocolError when they do not fit."""
        ...

    def is_given_back(self, bucket: int) -> bool:
        """Whether the worker, which said that its reload of `bucket` is enqueued, has done it."""
        ...

    def mark_ready(self, bucket: int) -> None:
        """`bucket` is ready once the current stream has done what was enqueued so far."""
        ...

    def is_ready(self, bucket: int) -> bool:
        """Whether `bucket`, which was marked, lies in its slot."""
        ...


class MappedRing(RingMemory, Protocol):
    """The worker's side."""

    def own_events(self) -> tuple[bytes, ...]:
        """IPC handles of this side's events, for `accept_events`."""
        ...

    def mark_given_back(self, bucket: int) -> None:
        """`bucket` is given back once the current stream has done what was enqueued so far."""
        ...

    def check(self) -> None:
        """Raises what the device has reported as failed by now. Waits for nothing."""
        ...

    def synchronize(self) -> None:
        """Waits for the current stream. Raises what the device reports as failed."""
        ...


class Device(Protocol):
    """A rank's device."""

    type: str
    index: int
    """Its number in this process."""
    collectives: str
    """What broadcasts among ranks that have such a device each: a kind of `transport.collectives`."""
    enqueues: bool
    """Whether `copy` returns before the bytes are there."""
    pinner: HostMemoryPinner | None
    """Pins host arenas for fast copies; None where that means nothing."""

    def uuid(self) -> str:
        """The key that the parameter server and the engine's worker compute alike."""
        ...

    def memory_pool(self) -> str:
        """Names the memory behind the device: ranks with the same name share it."""
        ...

    def make_current(self) -> None:
        """For this thread, which is a new one: what it calls may look for the device that is current. Nothing
        where no such call is made."""
        ...

    def free_memory(self) -> int:
        """Bytes of device memory that are free now."""
        ...

    def allocate_ring(self, nbytes: int, event_count: int) -> Ring:
        """Raises DeviceError or HostMemoryError: it does not fit."""
        ...

    def allocate_staging(self, nbytes: int) -> Staging:
        """A buffer of this process's own, into which an owner copies its next bucket ahead of its turn."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues a copy of bytes (both 1-D uint8, same length) on the current stream."""
        ...

    def use_copy_stream(self) -> AbstractContextManager[object]:
        """Makes the device's H2D stream the current one."""
        ...

    def use_broadcast_stream(self) -> AbstractContextManager[object]:
        """Makes the stream of broadcasts the current one."""
        ...

    def synchronize(self) -> None:
        """Waits for both streams. Raises what the device reports as failed."""
        ...

    def collect(self) -> None:
        """Frees memory that other processes have dropped their IPC maps of."""
        ...


class Staging(Protocol):
    """An owner's staging buffer. Filled on the copy stream, emptied on the broadcast stream."""

    nbytes: int

    def fill(self) -> torch.Tensor:
        """All its bytes, to write on the copy stream (current) once they have been emptied."""
        ...

    def mark_filled(self) -> None: ...

    def empty(self) -> torch.Tensor:
        """All its bytes, to read on the broadcast stream (current) once they have been filled."""
        ...

    def mark_emptied(self) -> None: ...

    def close(self) -> None:
        """Frees it. Idempotent."""
        ...
