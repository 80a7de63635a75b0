"""Which bytes of an update come from whom, when other fleets hold them."""

from __future__ import annotations

import pytest

from ckpt_engine.errors import CheckpointError, PlanError
from ckpt_engine.metadata import HostBufferMeta, RankMetas, TensorMeta, content_digest
from ckpt_engine.planning.plan import UpdatePlan, make_plan
from ckpt_engine.planning.sources import Extent, Sources, check_fleets


def held_by(
    rank: int, names: str, *, address: int = 4096, origin: str = "o", room: int = 256, **changes: object
) -> RankMetas:
    """`names`: a letter for each tensor, of 100 bytes, `room` bytes apart."""
    tensors = tuple(
        TensorMeta(name=name, dtype="uint8", shape=(100,), offset=place * room, nbytes=100)
        for place, name in enumerate(names)
    )
    fields = {
        "rank": rank,
        "host": f"h{rank}",
        "host_ip": "10.0.0.1",
        "device_uuid": f"d{rank}",
        "epoch": f"e{rank}",
        "checkpoint": "c",
        "session": f"s{rank}",
        "p2p_address": f"10.0.0.1:{rank}",
        "p2p_transport": "tcp",
        "lease_address": f"10.0.0.1:{rank}",
        "buffers": (
            HostBufferMeta(address=address, nbytes=len(names) * room, tensors=tensors, origin=origin),
        ),
    }
    return RankMetas.model_validate(fields | changes)


def plan(sources: Sources, slot_nbytes: int = 1024) -> UpdatePlan:
    return make_plan(
        "c",
        {},
        slot_nbytes=slot_nbytes,
        slot_count=2,
        budget=2**20,
        outside=sources.planned,
        assign=lambda buckets: [(7, owner, bucket) for owner, bucket in buckets],
    )


def test_neighbours_come_with_one_read() -> None:
    sources = Sources.of_fleets([{0: held_by(0, "abcd")}])
    (item,) = plan(sources).buckets
    assert sources.reads_of(item.bucket) == {0: (Extent(buffer=0, address=4096, offset=0, nbytes=868),)}
    assert (item.owner, item.receiver, item.root) == (0, 7, 7)


def test_neighbours_that_lie_further_apart_come_one_by_one() -> None:
    sources = Sources.of_fleets([{0: held_by(0, "ab", room=512)}])
    (item,) = plan(sources).buckets
    assert sources.reads_of(item.bucket) == {
        0: (
            Extent(buffer=0, address=4096, offset=0, nbytes=100),
            Extent(buffer=0, address=4608, offset=256, nbytes=100),
        )
    }


def test_each_tensor_is_planned_once_from_the_first_fleet_that_has_it() -> None:
    one = {0: held_by(0, "ab"), 1: held_by(1, "")}
    other = {0: held_by(0, "bc", session="other"), 1: held_by(1, "da", session="other")}
    planned = Sources.of_fleets([one, other]).planned
    names = {
        number: "".join(tensor.name for buffer in held.buffers for tensor in buffer.tensors)
        for number, held in planned.items()
    }
    assert names == {0: "ab", 1: "c", 2: "d"}
    assert Sources.of_fleets([one, other], first=1).by_number[0].session == "other"


def test_what_was_lost_is_read_from_several_others() -> None:
    one = {0: held_by(0, "abc")}
    other = {0: held_by(0, "cx", address=8192), 1: held_by(1, "ba", address=16384)}
    sources = Sources.of_fleets([one, other])
    item = plan(sources).buckets[0]
    assert sources.reads_of(item.bucket, {0}) == {
        2: (
            Extent(buffer=0, address=16384 + 256, offset=0, nbytes=100),
            Extent(buffer=0, address=16384, offset=256, nbytes=100),
        ),
        1: (Extent(buffer=0, address=8192, offset=512, nbytes=100),),
    }
    with pytest.raises(PlanError, match="nobody else holds 'a'"):
        sources.reads_of(item.bucket, {0, 2})


def test_fleets_with_other_weights_are_refused() -> None:
    one, other = {0: held_by(0, "ab")}, {0: held_by(0, "b", origin="another share")}
    with pytest.raises(CheckpointError, match="hold different weights as 'b'"):
        check_fleets([one, other])


def test_metas_of_two_checkpoints_or_of_none_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\['c', 'd'\]"):
        check_fleets([{0: held_by(0, "a")}, {0: held_by(0, "a", checkpoint="d")}])
    for nothing in ({0: held_by(0, "")}, {0: held_by(0, "a", checkpoint="")}):
        with pytest.raises(CheckpointError, match="metas of one checkpoint are needed"):
            check_fleets([nothing])


def test_a_tensor_that_nobody_can_read_is_named_with_its_holder() -> None:
    closed = {0: held_by(0, "ab", p2p_address=None)}
    with pytest.raises(CheckpointError, match=r"2 tensors \('a' first\).*rank 0 on host h0"):
        check_fleets([closed])
    assert check_fleets([closed, {3: held_by(3, "ba")}]) == "c"
    assert [held.rank for held in Sources.of_fleets([closed, {3: held_by(3, "ba")}]).by_number.values()] == [
        3
    ]


def test_a_replica_has_the_digest_of_what_it_was_made_from() -> None:
    first = [held_by(0, "ab", origin=""), held_by(1, "c", origin="")]
    replica = [held_by(0, "ba", origin="e0"), held_by(1, "", origin=""), held_by(2, "c", origin="e1")]
    assert content_digest(first) == content_digest(replica)
    assert content_digest(first) != content_digest([held_by(0, "ab", origin=""), held_by(1, "c", origin="x")])


def test_what_is_read_keeps_the_order_of_the_assignment_between_the_members_own() -> None:
    own = {0: held_by(0, "abcd", p2p_address=None)}
    sources = Sources({5: held_by(5, "efghi")})
    order = [(2, 5), (1, 5), (2, 5), (2, 5), (1, 5)]
    planned = make_plan(
        "c",
        own,
        slot_nbytes=256,
        slot_count=2,
        budget=2**20,
        outside=sources.planned,
        assign=lambda buckets: [
            (receiver, owner, bucket)
            for (receiver, _), (owner, bucket) in zip(order, reversed(buckets), strict=True)
        ],
    )
    walked = [(item.root, "".join(item.names())) for item in planned.buckets]
    assert walked == [
        (0, "a"),
        (2, "i"),
        (1, "h"),
        (0, "b"),
        (2, "g"),
        (2, "f"),
        (0, "c"),
        (1, "e"),
        (0, "d"),
    ]
    assert [item.index for item in planned.read_by(2)] == [1, 4, 5]
