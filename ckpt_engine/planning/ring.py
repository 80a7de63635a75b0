"""How large the ring of slots is."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_engine.errors import PlanError
from ckpt_engine.metadata import align_up


@dataclass(kw_only=True, frozen=True, slots=True)
class RingShape:
    """`count` slots of `slot_nbytes` bytes each, in one allocation."""

    slot_nbytes: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.slot_nbytes * self.count

    def slots_for(self, nbytes: int) -> int:
        """Adjacent slots that a bucket of `nbytes` takes."""
        return max(1, -(-nbytes // self.slot_nbytes))


def shape_ring(
    *, slot_nbytes: int, slot_count: int, largest_tensor: int, total: int, budget: int
) -> RingShape:
    """The ring for one update, all sizes in bytes.

    The wanted slots are shrunk to what the checkpoint needs, and to the memory `budget`; a tensor
    larger than a slot takes adjacent slots, so the ring is at least as large as the largest tensor.

    Raises:
        PlanError: not even the largest tensor fits the budget.
    """
    largest = align_up(max(largest_tensor, 1))
    slot = min(align_up(max(slot_nbytes, 1)), max(align_up(max(total, 1)), largest))
    if largest > budget:
        raise PlanError(
            f"the largest tensor takes {largest} bytes, but an update may use only {budget} bytes on the "
            "device with the least free memory: free device memory or raise PS_MEM_FRACTION"
        )
    count = min(slot_count, max(1, -(-max(total, 1) // slot)))
    if slot * count > budget:
        # Fewer bytes a slot before fewer slots: small slots are nearly as fast, one slot is serial.
        slot = budget // count // 256 * 256
        if slot == 0:
            slot, count = largest, 1
    count = max(count, -(-largest // slot))
    if slot * count > budget:
        # The largest tensor ends inside its last slot: slots that it fills take less.
        slot = align_up(-(-largest // count))
    if slot * count > budget:
        slot, count = largest, 1
    return RingShape(slot_nbytes=slot, count=count)


def shape_ring_and_staging(
    *, slot_nbytes: int, slot_count: int, largest_tensor: int, total: int, budget: int
) -> tuple[RingShape, int]:
    """The ring, and the bytes of each owner's staging buffer beside it.

    A staging buffer holds any bucket: a slot, or the largest tensor. Where the budget does not hold the
    largest tensor twice there is none (0), and copies and broadcasts take turns.

    Raises:
        PlanError: not even the largest tensor fits the budget.
    """
    largest = align_up(max(largest_tensor, 1))
    share = budget // (slot_count + 1) // 256 * 256
    staging = max(largest, min(align_up(max(slot_nbytes, 1)), share))
    wanted = {"slot_count": slot_count, "largest_tensor": largest_tensor, "total": total}
    if budget - staging < largest:
        return shape_ring(slot_nbytes=slot_nbytes, budget=budget, **wanted), 0
    ring = shape_ring(slot_nbytes=min(slot_nbytes, staging), budget=budget - staging, **wanted)
    return ring, max(ring.slot_nbytes, largest)
