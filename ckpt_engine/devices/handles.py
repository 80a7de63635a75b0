"""How a ring travels to another process: plain fields, never a pickle."""

from __future__ import annotations

import msgspec


class SharedMemoryRing(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """A memfd of `nbytes` bytes, whose descriptor travels beside the message (SCM_RIGHTS)."""

    nbytes: int


class CudaRing(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """An allocation of `nbytes` bytes on a CUDA device.

    `memory`: its 64-byte IPC handle. `event_count`: how many events the worker has to bring. `device`: UUID
    of the device itself, whatever its key is.
    """

    nbytes: int
    memory: bytes
    event_count: int
    device: str


RingHandle = SharedMemoryRing | CudaRing
"""Every kind of ring that a worker can map."""
