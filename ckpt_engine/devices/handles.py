"""How a ring travels to another process: plain fields, never a pickle."""

from __future__ import annotations

import msgspec


class SharedMemoryRing(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """A memfd of `nbytes` bytes, whose descriptor travels beside the message (SCM_RIGHTS)."""

    nbytes: int


class CudaRing(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """An allocation of `nbytes` bytes on a CUDA device.

    `memory`: its 64-byte IPC handle. `ready`: IPC handles of one event for each slot, which the parameter
    server records when a bucket lies there. `device`: UUID of the device itself, whatever its key is.
    """

    nbytes: int
    memory: bytes
    ready: tuple[bytes, ...]
    device: str


RingHandle = SharedMemoryRing | CudaRing
"""Every kind of ring that a worker can map."""
