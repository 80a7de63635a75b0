"""Update plans: every byte exactly once, in buckets of the right size, the same plan on every rank."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ckpt_engine.checkpoint.packing import TensorSpec, pack
from ckpt_engine.devices.handles import SharedMemoryRing
from ckpt_engine.errors import PlanError
from ckpt_engine.ipc.messages import Begin, check_layout, decode_server_message, encode
from ckpt_engine.metadata import (
    ALIGNMENT,
    DTYPE_NBYTES,
    HostBufferMeta,
    Metas,
    RankMetas,
    TensorMeta,
    align_up,
    metas_from_json,
    metas_to_json,
)
from ckpt_engine.planning.plan import UpdatePlan, cut_buckets, make_plan

AMPLE = 2**60
reproducible = settings(derandomize=True, print_blob=True, deadline=None, max_examples=60)

# Scalars, empty tensors, odd sizes, and now and then one that is larger than any slot drawn below.
shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    st.integers(0, 2500).map(lambda size: (size,)),
)
kinds = st.tuples(st.sampled_from(sorted(DTYPE_NBYTES)), shapes)
shares = st.lists(st.lists(kinds, max_size=12), min_size=1, max_size=4).filter(lambda ranks: any(ranks))
slot_sizes = st.integers(1, 6000)
slot_counts = st.integers(1, 5)
spares = st.one_of(st.just(AMPLE), st.integers(0, 9000))
"""Bytes of the budget beyond the largest tensor."""


def specs_of(rank: int, share: Sequence[tuple[str, tuple[int, ...]]]) -> list[TensorSpec]:
    specs = []
    for number, (dtype, shape) in enumerate(share):
        nbytes = DTYPE_NBYTES[dtype]
        for size in shape:
            nbytes *= size
        specs.append(TensorSpec(f"rank{rank}.t{number:03}", dtype, shape, nbytes))
    return specs


def rank_metas(rank: int, buffers: Sequence[HostBufferMeta]) -> RankMetas:
    return RankMetas(
        rank=rank, host="h", host_ip="", device_uuid=str(rank), epoch="e", buffers=tuple(buffers)
    )


def packed(rank: int, specs: Sequence[TensorSpec], buffer_limit: int) -> RankMetas:
    """As our own packer lays them out."""
    buffers = pack(specs, buffer_limit)
    return rank_metas(
        rank, [HostBufferMeta(address=b.start, nbytes=b.nbytes, tensors=b.tensors) for b in buffers]
    )


def scattered(rank: int, specs: Sequence[TensorSpec], draw: random.Random) -> RankMetas:
    """As no packer of ours does it: any gaps, no alignment, several buffers. The metas allow it."""
    buffers, tensors, end = [], [], 0
    for spec in specs:
        offset = end + draw.choice([0, 1, 7, 255, 256, 300, 4000])
        tensors.append(
            TensorMeta(name=spec.name, dtype=spec.dtype, shape=spec.shape, offset=offset, nbytes=spec.nbytes)
        )
        end = offset + spec.nbytes
        if draw.random() < 0.3:
            buffers.append(HostBufferMeta(address=0, nbytes=end + 3, tensors=tuple(tensors)))
            tensors, end = [], 0
    buffers.append(HostBufferMeta(address=0, nbytes=end, tensors=tuple(tensors)))
    return rank_metas(rank, buffers)


@st.composite
def fleets(draw: st.DrawFn) -> Metas:
    loose = draw(st.booleans())
    seed = draw(st.integers(0, 2**32))
    limit = draw(st.integers(1, 8000))
    return {
        rank: scattered(rank, specs_of(rank, share), random.Random(seed))
        if loose
        else packed(rank, specs_of(rank, share), limit)
        for rank, share in enumerate(draw(shares))
    }


@dataclass(frozen=True)
class Held:
    owner: int
    meta: TensorMeta
    data: bytes


def fill(metas: Metas, seed: int) -> tuple[dict[tuple[int, int], bytes], dict[str, Held]]:
    """Random bytes for every host buffer; and every tensor with its own bytes."""
    source = random.Random(seed)
    memory = {
        (rank, number): source.randbytes(buffer.nbytes)
        for rank, held in metas.items()
        for number, buffer in enumerate(held.buffers)
    }
    tensors = {
        tensor.name: Held(rank, tensor, memory[rank, number][tensor.offset : tensor.offset + tensor.nbytes])
        for rank, held in metas.items()
        for number, buffer in enumerate(held.buffers)
        for tensor in buffer.tensors
    }
    return memory, tensors


def largest_in(metas: Metas) -> int:
    return max(t.nbytes for held in metas.values() for buffer in held.buffers for t in buffer.tensors)


def any_plan_of(metas: Metas, slot_nbytes: int, slot_count: int, spare: int) -> UpdatePlan:
    return plan_of(metas, slot_nbytes, slot_count, align_up(max(1, largest_in(metas))) + spare)


def plan_of(metas: Metas, slot_nbytes: int = 1024, slot_count: int = 3, budget: int = AMPLE) -> UpdatePlan:
    return make_plan("c", metas, slot_nbytes=slot_nbytes, slot_count=slot_count, budget=budget)


@reproducible
@given(fleets(), slot_sizes, slot_counts, spares, st.integers(0, 2**32))
def test_every_byte_of_every_tensor_arrives_exactly_once(
    metas: Metas, slot_nbytes: int, slot_count: int, spare: int, seed: int
) -> None:
    plan = any_plan_of(metas, slot_nbytes, slot_count, spare)
    memory, tensors = fill(metas, seed)
    arrived = []
    for item, layout in zip(plan.buckets, plan.layouts, strict=True):
        # What was in the ring before must not shine through.
        ring = bytearray(random.Random(~seed).randbytes(plan.ring.nbytes))
        for part in item.bucket.ranges:
            assert 0 <= part.bucket_offset <= part.bucket_offset + part.nbytes <= item.nbytes
            data = memory[item.owner, part.buffer][part.offset : part.offset + part.nbytes]
            assert len(data) == part.nbytes
            start = item.ring_offset + part.bucket_offset
            ring[start : start + part.nbytes] = data
        assert len(ring) == plan.ring.nbytes
        for tensor in layout.tensors:
            held = tensors[tensor.name]
            assert item.owner == held.owner
            assert (tensor.dtype, tensor.shape, tensor.nbytes) == (
                held.meta.dtype,
                held.meta.shape,
                held.meta.nbytes,
            )
            start = layout.ring_offset + tensor.offset
            assert ring[start : start + tensor.nbytes] == held.data, tensor.name
            arrived.append(tensor.name)
    assert sorted(arrived) == sorted(tensors)  # none twice, none missing: no tensor is split
    assert plan.tensor_count == len(tensors)
    assert plan.nbytes == sum(held.meta.nbytes for held in tensors.values())


@reproducible
@given(fleets(), slot_sizes, slot_counts, spares)
def test_no_byte_is_copied_twice(metas: Metas, slot_nbytes: int, slot_count: int, spare: int) -> None:
    plan = any_plan_of(metas, slot_nbytes, slot_count, spare)
    read: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for item in plan.buckets:
        for part in item.bucket.ranges:
            read.setdefault((item.owner, part.buffer), []).append((part.offset, part.nbytes))
        written = [(part.bucket_offset, part.nbytes) for part in item.bucket.ranges]
        for (start, nbytes), (following, _) in pairwise(sorted(written)):
            assert start + nbytes <= following
    for ranges in read.values():
        for (start, nbytes), (following, _) in pairwise(sorted(ranges)):
            assert start + nbytes <= following


@reproducible
@given(fleets(), slot_sizes, slot_counts, spares)
def test_a_bucket_fits_a_slot_unless_it_is_one_larger_tensor(
    metas: Metas, slot_nbytes: int, slot_count: int, spare: int
) -> None:
    plan = any_plan_of(metas, slot_nbytes, slot_count, spare)
    # Where memory is short the ring may be one slot, of the largest tensor's size.
    limit = slot_nbytes if spare == AMPLE else max(slot_nbytes, largest_in(metas))
    assert plan.ring.slot_nbytes <= align_up(limit)
    for item in plan.buckets:
        assert item.nbytes <= plan.ring.slot_nbytes or len(item.bucket.tensors) == 1
        assert item.bucket.tensors
        assert item.nbytes == max(tensor.offset + tensor.nbytes for tensor in item.bucket.tensors)


@reproducible
@given(fleets(), slot_sizes, slot_counts, spares)
def test_a_bucket_ends_only_where_the_owners_next_tensor_does_not_fit(
    metas: Metas, slot_nbytes: int, slot_count: int, spare: int
) -> None:
    plan = any_plan_of(metas, slot_nbytes, slot_count, spare)
    for rank in metas:
        own = [item for item in plan.buckets if item.owner == rank]
        for this, following in pairwise(own):
            assert align_up(this.nbytes) + following.bucket.tensors[0].nbytes > plan.ring.slot_nbytes


@reproducible
@given(fleets(), slot_sizes, slot_counts, spares)
def test_tensors_are_aligned_and_do_not_overlap_inside_the_ring(
    metas: Metas, slot_nbytes: int, slot_count: int, spare: int
) -> None:
    plan = any_plan_of(metas, slot_nbytes, slot_count, spare)
    for layout in plan.layouts:
        assert layout.ring_offset % ALIGNMENT == 0
        assert 0 <= layout.ring_offset <= layout.ring_offset + layout.nbytes <= plan.ring.nbytes
        end = 0
        for tensor in layout.tensors:
            assert tensor.offset % ALIGNMENT == 0
            assert tensor.offset >= end
            end = tensor.offset + tensor.nbytes


@reproducible
@given(fleets(), slot_sizes, slot_counts, spares, st.randoms(use_true_random=False))
def test_the_plan_is_the_same_on_every_rank(
    metas: Metas, slot_nbytes: int, slot_count: int, spare: int, draw: random.Random
) -> None:
    """Whatever came first there; and the metas of others came as JSON."""
    ranks = list(metas)
    draw.shuffle(ranks)
    mine = any_plan_of(metas, slot_nbytes, slot_count, spare)
    received = metas_from_json(metas_to_json({rank: metas[rank] for rank in ranks}))
    other = any_plan_of(received, slot_nbytes, slot_count, spare)
    assert mine == other
    assert json.dumps(mine.to_dict()) == json.dumps(other.to_dict())


@reproducible
@given(shares, st.integers(1, 8000), slot_sizes)
def test_packed_tensors_take_one_copy_for_each_host_buffer_of_the_bucket(
    given_shares: list[list[tuple[str, tuple[int, ...]]]], buffer_limit: int, slot_nbytes: int
) -> None:
    for rank, share in enumerate(given_shares):
        held = packed(rank, specs_of(rank, share), buffer_limit)
        home = {
            tensor.name: number for number, buffer in enumerate(held.buffers) for tensor in buffer.tensors
        }
        for bucket in cut_buckets(held, align_up(slot_nbytes)):
            touched = {home[tensor.name] for tensor in bucket.tensors}
            assert [part.buffer for part in bucket.ranges] == sorted(touched)


@reproducible
@given(fleets(), slot_sizes, slot_counts)
def test_layouts_pass_the_workers_check_and_survive_the_wire(
    metas: Metas, slot_nbytes: int, slot_count: int
) -> None:
    plan = plan_of(metas, slot_nbytes, slot_count)
    begin = Begin(
        session="s",
        checkpoint="c",
        version="1",
        ring=SharedMemoryRing(nbytes=plan.ring.nbytes),
        buckets=plan.layouts,
        budget=1.0,
    )
    check_layout(begin)
    assert decode_server_message(encode(begin)) == begin


@reproducible
@given(fleets(), slot_sizes, slot_counts)
def test_the_dict_form_is_json_and_says_what_the_plan_says(
    metas: Metas, slot_nbytes: int, slot_count: int
) -> None:
    plan = plan_of(metas, slot_nbytes, slot_count)
    told = plan.to_dict()
    assert json.loads(json.dumps(told)) == told  # no tuple, no int key: nothing changes on the way
    assert (told["bytes"], told["tensors"]) == (plan.nbytes, plan.tensor_count)
    assert told["staging_bytes"] == plan.staging_nbytes == 0
    assert told["ring_bytes"] == told["slots"] * told["slot_bytes"] == plan.ring.nbytes
    assert sum(told["owners"].values()) == sum(bucket["bytes"] for bucket in told["buckets"])
    for item, bucket in zip(plan.buckets, told["buckets"], strict=True):
        assert bucket == {
            "index": item.index,
            "owner": item.owner,
            "receiver": None,
            "bytes": item.nbytes,
            "ring_offset": item.ring_offset,
            "waits_for": item.waits_for,
            "tensors": [tensor.name for tensor in item.bucket.tensors],
        }


def test_host_buffers_are_not_taken_for_one_because_their_offsets_go_on() -> None:
    tensors = [
        TensorMeta(name=n, dtype="int8", shape=(9,), offset=o, nbytes=9) for n, o in (("a", 0), ("b", 256))
    ]
    held = rank_metas(0, [HostBufferMeta(address=0, nbytes=265, tensors=(tensor,)) for tensor in tensors])
    (bucket,) = cut_buckets(held, 1024)
    assert [(part.buffer, part.offset, part.nbytes, part.bucket_offset) for part in bucket.ranges] == [
        (0, 0, 9, 0),
        (1, 256, 9, 256),
    ]


def bytes_held(rank: int, *sizes: int, prefix: str = "") -> RankMetas:
    names = [f"{prefix or rank}.{number}" for number in range(len(sizes))]
    specs = [TensorSpec(name, "uint8", (size,), size) for name, size in zip(names, sizes, strict=True)]
    return packed(rank, specs, 2**30)


def test_owners_take_turns() -> None:
    plan = plan_of({2: bytes_held(2, 1000, 1000), 0: bytes_held(0, 1000), 1: bytes_held(1, *[1000] * 4)})
    assert [item.owner for item in plan.buckets] == [0, 1, 2, 1, 2, 1, 1]
    assert [item.index for item in plan.buckets] == list(range(7))
    assert plan.owners() == {0: 1000, 1: 4000, 2: 2000}


def test_a_rank_that_holds_nothing_owns_no_bucket() -> None:
    plan = plan_of({0: rank_metas(0, []), 1: bytes_held(1, 10)})
    assert plan.owners() == {1: 10}


@pytest.mark.parametrize("sizes", [(0,), (0, 0, 0), (1024, 0), (0, 5000, 0)])
def test_empty_tensors_travel_too(sizes: tuple[int, ...]) -> None:
    plan = plan_of({0: bytes_held(0, *sizes)})
    assert sorted(name for item in plan.buckets for name in item.names()) == [
        f"0.{number}" for number in range(len(sizes))
    ]
    assert plan.nbytes == sum(sizes)
    assert plan.ring.nbytes > 0


@pytest.mark.parametrize("other_rank", [0, 3])
def test_a_tensor_held_twice_is_refused_by_name(other_rank: int) -> None:
    metas = {0: bytes_held(0, 10, 20, prefix="same")}
    if other_rank == 0:
        metas[0] = metas[0].model_copy(update={"buffers": metas[0].buffers * 2})
    else:
        metas[other_rank] = bytes_held(other_rank, 10, prefix="same")
    where = "rank 0 and twice" if other_rank == 0 else "rank 0 and by rank 3"
    with pytest.raises(PlanError, match=rf"'same\.0' is held by {where}: register every tensor on one"):
        plan_of(metas)


def test_a_checkpoint_without_tensors_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="'c' holds no tensor on any rank"):
        plan_of({0: rank_metas(0, []), 1: rank_metas(1, [])})


@reproducible
@given(fleets(), slot_sizes, slot_counts, st.integers(1, 8000))
@example({0: bytes_held(0, 800)}, 256, 3, 900)
def test_the_ring_keeps_to_the_budget_or_the_error_says_what_is_needed(
    metas: Metas, slot_nbytes: int, slot_count: int, budget: int
) -> None:
    needed = align_up(max(1, largest_in(metas)))
    if budget < needed:
        with pytest.raises(PlanError, match=rf"takes {needed} bytes, .* only {budget} bytes .* PS_MEM_FR"):
            plan_of(metas, slot_nbytes, slot_count, budget)
    else:
        assert needed <= plan_of(metas, slot_nbytes, slot_count, budget).ring.nbytes <= budget


@reproducible
@given(fleets(), slot_sizes, slot_counts, st.integers(20_000, 100_000))
def test_a_staging_buffer_holds_any_bucket_of_the_plan(
    metas: Metas, slot_nbytes: int, slot_count: int, budget: int
) -> None:
    assume(align_up(max(1, largest_in(metas))) <= budget)
    plan = make_plan("c", metas, slot_nbytes=slot_nbytes, slot_count=slot_count, budget=budget, staging=True)
    assert plan.ring.nbytes + plan.staging_nbytes <= budget
    if plan.staging_nbytes:
        assert max(item.nbytes for item in plan.buckets) <= plan.staging_nbytes
    else:
        assert budget < 2 * max(
            align_up(tensor.nbytes) for item in plan.buckets for tensor in item.bucket.tensors
        )
