"""The update plan: which bytes go where, in which order. Data, not behaviour.

Every rank computes the same plan from the same metas. A bucket's place in the ring follows from its
place in the sequence, so a rank may use a slot as soon as the buckets it overlaps have been released:
`waits_for` names the last of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

from ckpt_engine.errors import PlanError
from ckpt_engine.ipc.messages import BucketLayout, TensorLayout
from ckpt_engine.metadata import RankMetas, align_up
from ckpt_engine.planning.layers import spans
from ckpt_engine.planning.ring import RingShape, shape_ring, shape_ring_and_staging


@dataclass(kw_only=True, frozen=True, slots=True)
class HostRange:
    """Bytes to copy from the owner's host buffer number `buffer` to `bucket_offset` in the bucket."""

    buffer: int
    offset: int
    nbytes: int
    bucket_offset: int


@dataclass(kw_only=True, frozen=True, slots=True)
class Bucket:
    """Tensors that travel together: `tensors` by their offset in the bucket, `ranges` to fill it."""

    owner: int
    nbytes: int
    tensors: tuple[TensorLayout, ...]
    ranges: tuple[HostRange, ...]


Assignment = Callable[[Sequence[tuple[int, Bucket]]], Sequence[tuple[int, int, Bucket]]]
"""From (owner, bucket) to (receiver, owner, bucket), in the order of the reads."""


@dataclass(kw_only=True, frozen=True, slots=True)
class PlannedBucket:
    """A bucket with its place in the sequence and in the ring; `waits_for` is -1 where nothing overlaps.

    `receiver`: the member that reads it by P2P from an owner outside of the update; None: the owner is one.
    """

    index: int
    bucket: Bucket
    ring_offset: int
    waits_for: int
    receiver: int | None = None

    @property
    def owner(self) -> int:
        return self.bucket.owner

    @property
    def root(self) -> int:
        """The member from which all others get it: the owner, or the receiver that reads it."""
        return self.bucket.owner if self.receiver is None else self.receiver

    @property
    def nbytes(self) -> int:
        return self.bucket.nbytes

    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.bucket.tensors)


@dataclass(kw_only=True, frozen=True, slots=True)
class Needs:
    """Of a checkpoint, in bytes: its largest tensor, and all of them with their padding."""

    largest_tensor: int
    total: int

    @classmethod
    def of(cls, checkpoint: str, held_by: Iterable[tuple[int, RankMetas]]) -> Needs:
        """Raises PlanError: a tensor held twice, or nothing held at all."""
        owners: dict[str, int] = {}
        largest = total = 0
        for rank, held in held_by:
            for buffer in held.buffers:
                for tensor in buffer.tensors:
                    if tensor.name in owners:
                        other = owners[tensor.name]
                        raise PlanError(
                            f"tensor {tensor.name!r} is held by rank {other} and "
                            + ("twice" if other == rank else f"by rank {rank}")
                            + ": register every tensor on one rank only"
                        )
                    owners[tensor.name] = rank
                    largest = max(largest, tensor.nbytes)
                    total += align_up(tensor.nbytes)
        if not owners:
            raise PlanError(f"checkpoint {checkpoint!r} holds no tensor on any rank")
        return cls(largest_tensor=largest, total=total)

    def shape(
        self, *, slot_nbytes: int, slot_count: int, budget: int, staging: bool
    ) -> tuple[RingShape, int]:
        """The ring, and the bytes of each root's staging buffer. Raises PlanError: too little memory."""
        wanted = {
            "slot_nbytes": slot_nbytes,
            "slot_count": slot_count,
            "largest_tensor": self.largest_tensor,
            "total": self.total,
            "budget": budget,
        }
        return shape_ring_and_staging(**wanted) if staging else (shape_ring(**wanted), 0)


@dataclass(kw_only=True, frozen=True)
class UpdatePlan:
    """One update of one checkpoint. `staging_nbytes`: of each root's staging buffer, 0 for none."""

    checkpoint: str
    ring: RingShape
    buckets: tuple[PlannedBucket, ...]
    staging_nbytes: int = 0
    needs: Needs

    def named(self, checkpoint: str) -> UpdatePlan:
        """The same for another checkpoint of this layout, with what was derived from it."""
        other = copy.copy(self)
        object.__setattr__(other, "checkpoint", checkpoint)
        return other

    @cached_property
    def layouts(self) -> tuple[BucketLayout, ...]:
        """What a worker needs to know of the buckets."""
        return tuple(
            BucketLayout(item.ring_offset, item.nbytes, item.bucket.tensors) for item in self.buckets
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.nbytes for item in self.buckets for tensor in item.bucket.tensors)

    @cached_property
    def tensor_count(self) -> int:
        return sum(len(item.bucket.tensors) for item in self.buckets)

    def owners(self) -> dict[int, int]:
        """Owner rank -> bytes it sends."""
        sent: dict[int, int] = {}
        for item in self.buckets:
            sent[item.owner] = sent.get(item.owner, 0) + item.nbytes
        return dict(sorted(sent.items()))

    def read_by(self, rank: int) -> tuple[PlannedBucket, ...]:
        """The buckets that a rank reads by P2P, in sequence."""
        return tuple(item for item in self.buckets if item.receiver == rank)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data, for `ckpt-engine plan --json`."""
        return {
            "checkpoint": self.checkpoint,
            "tensors": self.tensor_count,
            "bytes": self.nbytes,
            "slots": self.ring.count,
            "slot_bytes": self.ring.slot_nbytes,
            "ring_bytes": self.ring.nbytes,
            "staging_bytes": self.staging_nbytes,
            "owners": {str(rank): nbytes for rank, nbytes in self.owners().items()},
            "buckets": [
                {
                    "index": item.index,
                    "owner": item.owner,
                    "receiver": item.receiver,
                    "bytes": item.nbytes,
                    "ring_offset": item.ring_offset,
                    "waits_for": item.waits_for,
                    "tensors": list(item.names()),
                }
                for item in self.buckets
            ],
        }


def cut_buckets(held: RankMetas, bucket_nbytes: int, owner: int | None = None) -> Iterator[Bucket]:
    """Cuts what one rank holds into buckets of at most `bucket_nbytes` (a larger tensor stands alone).

    `owner`: the number that the rank has in the plan; None: its own.

    A tensor is never split, and begins at a multiple of 256 in its bucket. Tensors that are packed like
    that in their host buffer too need one copy for all of them. A layer of the engine that fits into a bucket
    is not split either, so that the engine need not keep a part of it. Where layers do not interleave, two
    adjacent buckets still hold more than `bucket_nbytes`.
    """
    owner = held.rank if owner is None else owner
    rooms = spans(tensor for buffer in held.buffers for tensor in buffer.tensors)
    tensors: list[TensorLayout] = []
    ranges: list[list[int]] = []  # as HostRange
    end = 0
    for number, buffer in enumerate(held.buffers):
        for tensor in buffer.tensors:
            start = align_up(end)
            layer_nbytes = rooms.get(tensor.name, 0)
            needed = layer_nbytes if layer_nbytes <= bucket_nbytes else 0
            if tensors and start + max(needed, tensor.nbytes) > bucket_nbytes:
                yield _bucket(owner, end, tensors, ranges)
                tensors, ranges, start = [], [], 0
            last = ranges[-1] if ranges else [-1, 0, 0, 0]
            if last[0] == number and start - last[3] == tensor.offset - last[1]:
                # As far apart in the bucket as in the host buffer: one copy brings both.
                last[2] = tensor.offset + tensor.nbytes - last[1]
            else:
                ranges.append([number, tensor.offset, tensor.nbytes, start])
            tensors.append(TensorLayout(tensor.name, tensor.dtype, tensor.shape, start, tensor.nbytes))
            end = start + tensor.nbytes
    if tensors:
        yield _bucket(owner, end, tensors, ranges)


def _bucket(owner: int, nbytes: int, tensors: list[TensorLayout], ranges: list[list[int]]) -> Bucket:
    return Bucket(
        owner=owner,
        nbytes=nbytes,
        tensors=tuple(tensors),
        ranges=tuple(
            HostRange(buffer=buffer, offset=offset, nbytes=length, bucket_offset=start)
            for buffer, offset, length, start in ranges
        ),
    )


def place(buckets: Sequence[tuple[Bucket, int | None]], ring: RingShape) -> tuple[PlannedBucket, ...]:
    """Gives each (bucket, receiver) of the sequence adjacent slots, the ring walked round."""
    planned: list[PlannedBucket] = []
    last_user = [-1] * ring.count
    cursor = 0
    for index, (bucket, receiver) in enumerate(buckets):
        taken = ring.slots_for(bucket.nbytes)
        if cursor + taken > ring.count:
            cursor = 0
        waits_for = max(last_user[cursor : cursor + taken])
        last_user[cursor : cursor + taken] = [index] * taken
        planned.append(
            PlannedBucket(
                index=index,
                bucket=bucket,
                ring_offset=cursor * ring.slot_nbytes,
                waits_for=waits_for,
                receiver=receiver,
            )
        )
        cursor = (cursor + taken) % ring.count
    return tuple(planned)


def make_plan(
    checkpoint: str,
    metas: Mapping[int, RankMetas],
    *,
    slot_nbytes: int,
    slot_count: int,
    budget: int,
    staging: bool = False,
    outside: Mapping[int, RankMetas] | None = None,
    assign: Assignment | None = None,
) -> UpdatePlan:
    """The plan of an update.

    Args:
        metas: what the members hold, by rank.
        slot_nbytes, slot_count: the wanted ring.
        budget: bytes of device memory that the ring, and the staging buffer, may take on every rank.
        staging: whether roots copy ahead into staging buffers, if the budget allows.
        outside: what is read by P2P, by the numbers of its owners.
        assign: says who reads it, and in which order; needed where anything is.

    Raises:
        PlanError: a tensor held twice, nothing held at all, or too little memory.
    """
    outside = outside or {}
    needs = Needs.of(checkpoint, [*sorted(metas.items()), *sorted(outside.items())])
    ring, staging_nbytes = needs.shape(
        slot_nbytes=slot_nbytes, slot_count=slot_count, budget=budget, staging=staging
    )
    sequence = _sequence(metas, outside, ring.slot_nbytes, assign)
    return UpdatePlan(
        checkpoint=checkpoint,
        ring=ring,
        buckets=place(sequence, ring),
        staging_nbytes=staging_nbytes,
        needs=needs,
    )


def _sequence(
    metas: Mapping[int, RankMetas],
    outside: Mapping[int, RankMetas],
    slot_nbytes: int,
    assign: Assignment | None,
) -> list[tuple[Bucket, int | None]]:
    """Every (bucket, receiver): roots in turn, so that their copies to the device, and their reads, run at
    the same time; what is read, in the order of the assignment."""
    columns: list[list[tuple[Bucket, int | None]]] = [
        [(bucket, None) for bucket in cut_buckets(held, slot_nbytes)] for _, held in sorted(metas.items())
    ]
    to_read = [
        (number, bucket)
        for number, held in sorted(outside.items())
        for bucket in cut_buckets(held, slot_nbytes, number)
    ]
    if to_read:
        assert assign is not None
        reads: list[tuple[Bucket, int | None]] = [
            (bucket, receiver) for receiver, _, bucket in assign(to_read)
        ]
        receivers = len({receiver for _, receiver in reads})
        columns += [reads[start::receivers] for start in range(receivers)]
    return [bucket for turn in zip_longest(*columns) for bucket in turn if bucket is not None]
