"""Device memory of updates: the ring, and an owner's staging buffer. Freed after each, or kept."""

from __future__ import annotations

from ckpt_engine.devices import Device, Ring, Staging


class Buffers:
    """What one rank has on its device. A kept ring is used again if its size fits the next plan."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._ring: Ring | None = None
        self._event_count = 0
        self._staging: Staging | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are taken now."""
        return (self._ring.nbytes if self._ring else 0) + (self._staging.nbytes if self._staging else 0)

    def ring(self, nbytes: int, event_count: int) -> Ring:
        """A ring of just this size; raises what `Device.allocate_ring` raises."""
        kept = self._ring
        if kept is not None and (kept.nbytes, self._event_count) == (nbytes, event_count):
            return kept
        self.free()
        self._ring, self._event_count = self._device.allocate_ring(nbytes, event_count), event_count
        return self._ring

    def staging(self, nbytes: int) -> Staging | None:
        """A staging buffer of just this size; None for 0 bytes."""
        kept, self._staging = self._staging, None
        if kept is not None and kept.nbytes != nbytes:
            kept.close()
            kept = None
        self._staging = kept or (self._device.allocate_staging(nbytes) if nbytes else None)
        return self._staging

    def free(self) -> None:
        """Gives everything back. Idempotent."""
        ring, staging = self._ring, self._staging
        self._ring = self._staging = None
        if staging is not None:
            staging.close()
        if ring is not None:
            ring.close()
        self._device.collect()

    def abandon(self) -> int:
        """Forgets everything without freeing it: somebody may still read it. The bytes that stay taken."""
        nbytes = self.nbytes
        _ABANDONED.append((self._ring, self._staging))
        self._ring = self._staging = None
        return nbytes


_ABANDONED: list[tuple[Ring | None, Staging | None]] = []
"""Kept for the life of the process: nothing may free these."""
