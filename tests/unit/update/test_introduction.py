"""What ranks tell each other, and what follows from it alike on every rank."""

from __future__ import annotations

import msgspec
import pytest

from ckpt_engine.errors import ProtocolError
from ckpt_engine.update.introduction import Introduction, Meeting, ReadsByP2P

GIB = 2**30


def introduction(rank: int, **changes: object) -> Introduction:
    """Of a rank with a host, a device and 8 GiB of its own."""
    plain = Introduction(
        host=f"host{rank}",
        device_type="cuda",
        device_uuid=f"GPU-{rank}",
        memory_pool=f"pool{rank}",
        handle=f"ipc://{rank}",
        peer_path=f"/run/{rank}",
        free_memory=8 * GIB,
        slot_nbytes=256,
        slot_count=3,
        metas_digest="d",
        token=f"token{rank}",
        group_name="",
        p2p=ReadsByP2P(),
    )
    return msgspec.structs.replace(plain, **changes)


def meeting(*introductions: Introduction, first: int = 0) -> Meeting:
    return Meeting.of("round", {first + i: msgspec.json.encode(one) for i, one in enumerate(introductions)})


def test_every_rank_sees_the_same_meeting_whatever_came_first() -> None:
    blobs = {rank: msgspec.json.encode(introduction(rank)) for rank in (7, 0, 3)}
    one, other = Meeting.of("r", blobs), Meeting.of("r", dict(sorted(blobs.items())))
    assert one == other
    assert one.members == other.members == (0, 3, 7)
    assert one.token == "token0"
    assert one.socket_paths == [(f"GPU-{rank}", f"ipc://{rank}") for rank in (0, 3, 7)]
    assert one.hosts() == {0: "host0", 3: "host3", 7: "host7"}


def test_the_budget_is_that_of_the_rank_with_the_least() -> None:
    frees = (8 * GIB, 3 * GIB + 1, 5 * GIB)
    assert meeting(*(introduction(i, free_memory=f) for i, f in enumerate(frees))).budget == 3 * GIB + 1


def test_ranks_of_one_pool_share_what_is_free_in_it() -> None:
    """Each of three sees the same 9 GiB; the fourth has 4 GiB to itself."""
    shared = [introduction(rank, memory_pool="h/GPU", free_memory=9 * GIB + rank) for rank in range(3)]
    assert meeting(*shared).budget == 3 * GIB
    assert meeting(*shared, introduction(3, free_memory=4 * GIB)).budget == 3 * GIB
    assert meeting(*shared, introduction(3, free_memory=2 * GIB)).budget == 2 * GIB


@pytest.mark.parametrize(("pools", "shared"), [(["a"], False), (["a", "b"], False), (["a", "b", "a"], True)])
def test_devices_are_shared_when_two_ranks_have_one_pool(pools: list[str], shared: bool) -> None:
    ranks = (introduction(rank, memory_pool=pool) for rank, pool in enumerate(pools))
    assert meeting(*ranks).devices_shared == shared


def test_the_smallest_wanted_ring_counts() -> None:
    met = meeting(introduction(0, slot_nbytes=512), introduction(1, slot_count=2))
    assert (met.slot_nbytes, met.slot_count) == (256, 2)


def test_a_rank_without_a_worker_has_no_handle_to_be_asked_for() -> None:
    met = meeting(introduction(0), introduction(1, handle=""), introduction(2))
    assert met.socket_paths == [("GPU-0", "ipc://0"), ("GPU-2", "ipc://2")]
    assert met.members == (0, 1, 2)


@pytest.mark.parametrize(("device", "in_host_memory"), [("cpu", True), ("cuda", False)])
def test_where_the_rings_lie_follows_from_the_device(device: str, in_host_memory: bool) -> None:
    assert meeting(introduction(5, device_type=device), first=5).in_host_memory == in_host_memory


def test_ranks_that_gathered_different_metas_do_not_begin() -> None:
    met = meeting(introduction(0), introduction(1), introduction(2, metas_digest="other"))
    for rank in (0, 1):
        with pytest.raises(
            ProtocolError, match=f"rank {rank} and rank 2 have gathered different metas: call gather_metas"
        ):
            met.check(rank)
    with pytest.raises(ProtocolError, match="rank 2 and rank 0"):
        met.check(2)


def test_ranks_with_different_kinds_of_device_do_not_begin() -> None:
    met = meeting(introduction(0), introduction(1, device_type="cpu"))
    with pytest.raises(ProtocolError, match="rank 1 has a cpu device, rank 0 a cuda"):
        met.check(1)


def test_ranks_that_agree_begin() -> None:
    met = meeting(introduction(0), introduction(1))
    for rank in met.members:
        met.check(rank)


GOOD = msgspec.json.encode(introduction(0))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        GOOD[:-1],
        GOOD[:-1] + b',"more":1}',
        GOOD.replace(b'"slot_count":3', b'"slot_count":"3"'),
        GOOD.replace(b'"token"', b'"secret"'),
    ],
    ids=["empty", "no-fields", "not-utf-8", "deep", "cut", "a-field-more", "another-type", "another-name"],
)
def test_an_introduction_of_another_version_is_refused(blob: bytes) -> None:
    with pytest.raises(ProtocolError, match="another version"):
        Meeting.of("round", {0: GOOD, 1: blob})
