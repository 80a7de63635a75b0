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


class NpuRing(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """A tensor of `nbytes` bytes on an NPU, as torch_npu exports it.

    `memory`: the handle of the allocation, in which the tensor's storage of `storage_nbytes` begins at
    `storage_offset`. `counter`, `counter_offset`: where its readers are counted. `event`, `event_sync`: what
    a reader waits for first, if anything.
    """

    nbytes: int
    memory: bytes
    storage_nbytes: int
    storage_offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_sync: bool


RingHandle = SharedMemoryRing | CudaRing | NpuRing
"""Every kind of ring that a worker can map."""
