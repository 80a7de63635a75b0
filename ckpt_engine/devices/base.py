"""What an update needs of a device: an identity, its free memory, and rings that another process maps."""

from __future__ import annotations

from typing import Protocol

import torch

from ckpt_engine.devices.handles import RingHandle


class Ring(Protocol):
    """One allocation on the device, cut into slots, mapped by a parameter server and its worker."""

    nbytes: int

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """1-D uint8 tensor over `nbytes` bytes from `offset`."""
        ...

    def handle(self) -> RingHandle:
        """The plain fields from which another process maps the ring."""
        ...

    def descriptors(self) -> list[int]:
        """File descriptors that must travel with the handle (SCM_RIGHTS); still owned by the ring."""
        ...

    def close(self) -> None:
        """Drops this process's map. Idempotent."""
        ...


class Device(Protocol):
    """A rank's device."""

    type: str

    def uuid(self) -> str:
        """The key that the parameter server and the engine's worker compute alike."""
        ...

    def free_memory(self) -> int:
        """Bytes of device memory that are free now."""
        ...

    def allocate_ring(self, nbytes: int) -> Ring: ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes (both 1-D uint8, same length) into a ring; returns when they are there."""
        ...
