"""The ring of slots: its size, and that no bucket is put where an earlier one may still be in use."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckpt_engine.errors import PlanError
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.metadata import ALIGNMENT, align_up
from ckpt_engine.planning.plan import Bucket, PlannedBucket, place
from ckpt_engine.planning.ring import RingShape, shape_ring, shape_ring_and_staging

AMPLE = 2**60
reproducible = settings(derandomize=True, print_blob=True, deadline=None, max_examples=200)
sizes = st.integers(0, 100_000)
slot_sizes = st.integers(1, 20_000)
slot_counts = st.integers(1, 8)


@reproducible
@given(slot_sizes, slot_counts, sizes, sizes, st.integers(1, 200_000))
def test_the_ring_holds_the_largest_tensor_and_keeps_to_the_budget(
    slot_nbytes: int, slot_count: int, largest: int, others: int, budget: int
) -> None:
    needed = align_up(max(1, largest))
    total = align_up(largest) + align_up(others)
    arguments = {"slot_nbytes": slot_nbytes, "slot_count": slot_count, "total": total, "budget": budget}
    if budget < needed:
        with pytest.raises(PlanError, match=f"{needed} bytes"):
            shape_ring(**arguments, largest_tensor=largest)
        return
    ring = shape_ring(**arguments, largest_tensor=largest)
    assert needed <= ring.nbytes <= budget
    assert ring.nbytes == ring.count * ring.slot_nbytes
    assert ring.slot_nbytes % ALIGNMENT == 0
    assert ring.count >= 1
    assert ring.slots_for(largest) <= ring.count


@reproducible
@given(slot_sizes, slot_counts, sizes, sizes)
def test_with_memory_to_spare_the_ring_is_the_wanted_slots_or_the_largest_tensor(
    slot_nbytes: int, slot_count: int, largest: int, others: int
) -> None:
    wanted = align_up(slot_nbytes)
    ring = shape_ring(
        slot_nbytes=slot_nbytes,
        slot_count=slot_count,
        largest_tensor=largest,
        total=slot_count * wanted + align_up(largest) + others,  # more than the ring takes
        budget=AMPLE,
    )
    assert ring.slot_nbytes == wanted
    # max(K x slot, largest tensor), in whole slots
    assert ring.nbytes == max(slot_count * wanted, -(-align_up(largest) // wanted) * wanted)


@reproducible
@given(slot_sizes, slot_counts, st.lists(sizes, min_size=1, max_size=10))
def test_a_small_checkpoint_takes_a_small_ring(slot_nbytes: int, slot_count: int, tensors: list[int]) -> None:
    total = sum(align_up(nbytes) for nbytes in tensors)
    ring = shape_ring(
        slot_nbytes=slot_nbytes,
        slot_count=slot_count,
        largest_tensor=max(tensors),
        total=total,
        budget=AMPLE,
    )
    assert ring.nbytes < max(total, 1) + max(ring.slot_nbytes, ALIGNMENT)
    assert ring.slot_nbytes <= max(total, ALIGNMENT)


@reproducible
@given(slot_sizes, st.integers(2, 8), sizes, st.integers(0, 20_000))
@example(65536, 3, 204800, 25600)  # three slots are too small for the largest tensor, four too large
def test_little_memory_takes_bytes_from_the_slots_before_it_takes_slots(
    slot_nbytes: int, slot_count: int, largest: int, spare: int
) -> None:
    needed = align_up(max(1, largest))
    ring = shape_ring(
        slot_nbytes=slot_nbytes,
        slot_count=slot_count,
        largest_tensor=largest,
        total=slot_count * align_up(slot_nbytes) + needed,
        budget=needed + spare,
    )
    # Rounding to whole slots may cost up to 256 bytes for each of them.
    slots = max(slot_count, -(-needed // align_up(slot_nbytes)))
    if spare >= ALIGNMENT * slots:
        assert ring.count >= slot_count
        assert ring.slot_nbytes <= align_up(slot_nbytes)


@reproducible
@given(slot_sizes, slot_counts, sizes, sizes, st.integers(1, 400_000))
@example(1024, 3, 1000, 0, 2047)  # one byte less than the largest tensor twice
@example(1024, 3, 1000, 0, 2048)
def test_ring_and_staging_buffer_share_the_budget(
    slot_nbytes: int, slot_count: int, largest: int, others: int, budget: int
) -> None:
    needed = align_up(max(1, largest))
    arguments = {
        "slot_nbytes": slot_nbytes,
        "slot_count": slot_count,
        "largest_tensor": largest,
        "total": align_up(largest) + align_up(others),
        "budget": budget,
    }
    if budget < needed:
        with pytest.raises(PlanError, match=f"{needed} bytes"):
            shape_ring_and_staging(**arguments)
        return
    ring, staging_nbytes = shape_ring_and_staging(**arguments)
    assert needed <= ring.nbytes
    assert ring.nbytes + staging_nbytes <= budget
    if budget >= 2 * needed:
        assert staging_nbytes >= max(needed, ring.slot_nbytes)  # it holds any bucket
    else:
        assert (ring, staging_nbytes) == (shape_ring(**arguments), 0)


def test_exactly_the_memory_of_the_largest_tensor_is_enough() -> None:
    ring = shape_ring(slot_nbytes=4096, slot_count=3, largest_tensor=9999, total=10**6, budget=10240)
    assert ring.nbytes == 10240
    with pytest.raises(PlanError, match="takes 10240 bytes, but an update may use only 10239 bytes"):
        shape_ring(slot_nbytes=4096, slot_count=3, largest_tensor=9999, total=10**6, budget=10239)


def test_the_default_ring_of_a_large_checkpoint() -> None:
    mib = 1024 * 1024
    ring = shape_ring(
        slot_nbytes=256 * mib, slot_count=3, largest_tensor=100 * mib, total=2**35, budget=2**33
    )
    assert ring == RingShape(slot_nbytes=256 * mib, count=3)
    ring = shape_ring(
        slot_nbytes=256 * mib, slot_count=3, largest_tensor=2**30 + 1, total=2**35, budget=2**33
    )
    assert ring == RingShape(slot_nbytes=256 * mib, count=5)


@pytest.mark.parametrize(("nbytes", "slots"), [(0, 1), (1, 1), (1024, 1), (1025, 2), (4096, 4), (4097, 5)])
def test_a_bucket_takes_whole_slots_and_at_least_one(nbytes: int, slots: int) -> None:
    assert RingShape(slot_nbytes=1024, count=8).slots_for(nbytes) == slots


def placed(bucket_sizes: list[int], ring: RingShape) -> tuple[PlannedBucket, ...]:
    return place(
        [
            (
                Bucket(
                    owner=0,
                    nbytes=nbytes,
                    tensors=(TensorLayout(str(number), "uint8", (nbytes,), 0, nbytes),),
                    ranges=(),
                ),
                None,
            )
            for number, nbytes in enumerate(bucket_sizes)
        ],
        ring,
    )


def slots_of(item: PlannedBucket, ring: RingShape) -> set[int]:
    first, rest = divmod(item.ring_offset, ring.slot_nbytes)
    assert rest == 0, "a bucket begins at a slot"
    return set(range(first, first + max(1, -(-item.nbytes // ring.slot_nbytes))))


@st.composite
def sequences(draw: st.DrawFn) -> tuple[RingShape, list[int]]:
    ring = RingShape(slot_nbytes=draw(st.sampled_from([256, 1024])), count=draw(slot_counts))
    return ring, draw(st.lists(st.integers(0, ring.nbytes), max_size=40))


@reproducible
@given(sequences())
def test_a_bucket_never_overlaps_one_that_it_does_not_wait_for(given: tuple[RingShape, list[int]]) -> None:
    ring, bucket_sizes = given
    plan = placed(bucket_sizes, ring)
    for item in plan:
        mine = slots_of(item, ring)
        assert mine <= set(range(ring.count))
        # A rank goes on when bucket `waits_for`, and so every one before it, has been given back.
        assert -1 <= item.waits_for < item.index
        held = [other for other in plan[: item.index] if other.index > item.waits_for]
        assert not any(mine & slots_of(other, ring) for other in held)


@reproducible
@given(sequences())
def test_a_bucket_waits_for_no_later_one_than_it_must(given: tuple[RingShape, list[int]]) -> None:
    ring, bucket_sizes = given
    plan = placed(bucket_sizes, ring)
    for item in plan:
        if item.waits_for >= 0:
            assert slots_of(item, ring) & slots_of(plan[item.waits_for], ring)


@reproducible
@given(st.integers(1, 8), st.integers(0, 30))
def test_buckets_of_one_slot_walk_round_the_ring(count: int, bucket_count: int) -> None:
    ring = RingShape(slot_nbytes=1024, count=count)
    for item in placed([1000] * bucket_count, ring):
        assert item.ring_offset == item.index % count * 1024
        assert item.waits_for == max(-1, item.index - count)


def test_a_bucket_that_does_not_fit_before_the_end_begins_at_the_start() -> None:
    ring = RingShape(slot_nbytes=1024, count=4)
    plan = placed([1024, 1024, 1024, 2048, 1024, 1024], ring)
    assert [(item.ring_offset // 1024, item.waits_for) for item in plan] == [
        (0, -1),
        (1, -1),
        (2, -1),
        (0, 1),
        (2, 2),
        (3, -1),
    ]
