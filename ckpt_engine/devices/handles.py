"""How a ring travels to another process: plain fields, never a pickle."""

from __future__ import annotations

import msgspec


class SharedMemoryRing(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A memfd of `nbytes` bytes, whose descriptor travels beside the message (SCM_RIGHTS)."""

    nbytes: int


RingHandle = SharedMemoryRing
"""Every kind of ring a worker can map (a union once there is a second kind)."""
