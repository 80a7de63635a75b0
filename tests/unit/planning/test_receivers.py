"""Receivers: examples worked out by hand, and the rule's properties checked without the rule's code."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_engine.errors import PlanError
from ckpt_engine.planning import assign_receiver_ranks

reproducible = settings(derandomize=True, print_blob=True, deadline=None, max_examples=300)

Topo = dict[str, set[int]]
Buckets = list[tuple[int, str]]


def test_one_round_for_each_pair_of_devices() -> None:
    """Two devices on each side, one rank each; rank 0 owns a, b, and rank 1 owns c, d.

    Groups: dev0 [a, b], dev1 [c, d]. Round-robin: a c b d. Receivers: 0 and 1 (two, and two owners' devices).
    Round 1: a -> 0, c -> 1, all receivers have one. Round 2: b -> 0, d -> 1.
    """
    assert assign_receiver_ranks(
        [(0, "a"), (0, "b"), (1, "c"), (1, "d")],
        {"x": {0}, "y": {1}},
        {"dev0": {0}, "dev1": {1}},
    ) == [(0, 0, "a"), (1, 1, "c"), (0, 0, "b"), (1, 1, "d")]


def test_owners_behind_one_device_count_as_one() -> None:
    """Owners 0 and 1 share dev0, owner 2 has dev1. Ranks 4..7 receive, two to a device.

    Groups: dev0 [a, b, c] (of owners 0, 1, 0: their order is kept), dev1 [d]. Round-robin: a d b c.
    Receivers: 4 and 6, the lowest of each device.
    Round 1: a -> 4, d -> 6. Round 2: b -> 4; c is of dev0, which is in the round: it ends.
    Round 3: c -> 4, the first receiver again.
    """
    assert assign_receiver_ranks(
        [(0, "a"), (1, "b"), (0, "c"), (2, "d")],
        {"x": {5, 4}, "y": {7, 6}},
        {"dev0": {0, 1}, "dev1": {2}},
    ) == [(4, 0, "a"), (6, 2, "d"), (4, 1, "b"), (4, 0, "c")]


def test_more_receivers_than_owners_devices() -> None:
    """Four local devices, but only one of the two owners' devices has buckets: one receiver, the first
    device's lowest rank. Every round has one bucket, and goes to it."""
    assert assign_receiver_ranks(
        [(1, "a"), (1, "b"), (1, "c")],
        {"z": {9, 8}, "y": {1}, "x": {0}, "w": {2}},
        {"dev0": {0}, "dev1": {1}},
    ) == [(8, 1, "a"), (8, 1, "b"), (8, 1, "c")]


def test_fewer_receivers_than_owners_devices() -> None:
    """Three owners' devices, two receivers. Groups: p [a, b, c], q [d], r [e]. Round-robin: a d e b c.

    Round 1: a -> 0, d -> 1, full. Round 2: e -> 0, b -> 1 (p is not in this round), full. Round 3: c -> 0.
    """
    assert assign_receiver_ranks(
        [(0, "a"), (0, "b"), (0, "c"), (1, "d"), (2, "e")],
        {"x": {0}, "y": {1}},
        {"p": {0}, "q": {1}, "r": {2}},
    ) == [(0, 0, "a"), (1, 1, "d"), (0, 2, "e"), (1, 0, "b"), (0, 0, "c")]


def test_a_round_that_ends_early_shifts_those_after_it() -> None:
    """Three receivers 0, 1, 2; groups in the order of their first buckets: q [a, b, c], p [d, e], r [f].

    Round-robin: a d f b e c. Round 1: a -> 0, d -> 1, f -> 2, full. Round 2: b -> 0, e -> 1, then c is of q,
    which b's owner is behind: the round ends. Round 3: c -> 0.
    The owners' order in remote_topo (p before q) does not count, that of their buckets does.
    """
    assert assign_receiver_ranks(
        [(1, "a"), (0, "d"), (1, "b"), (2, "f"), (1, "c"), (0, "e")],
        {"x": {0}, "y": {1}, "z": {2}},
        {"p": {0}, "q": {1}, "r": {2}},
    ) == [(0, 1, "a"), (1, 0, "d"), (2, 2, "f"), (0, 1, "b"), (1, 0, "e"), (0, 1, "c")]


def test_the_order_of_local_devices_counts_and_empty_ones_do_not() -> None:
    """Two owners' devices, so two receivers: of "late" {3}, "none" {} and "early" {0} those of the first two
    devices with ranks, in this order: 3, then 0. Round-robin a b; one round."""
    assert assign_receiver_ranks(
        [(0, "a"), (1, "b")],
        {"late": {3}, "none": set(), "early": {0}},
        {"dev0": {0}, "dev1": {1}},
    ) == [(3, 0, "a"), (0, 1, "b")]


def test_no_buckets_need_no_receivers() -> None:
    assert assign_receiver_ranks([], {}, {}) == []


@pytest.mark.parametrize(
    ("local_topo", "remote_topo", "message"),
    [
        ({}, {"dev0": {0}}, "local_topo names no rank: nobody can receive"),
        ({"x": set()}, {"dev0": {0}}, "local_topo names no rank"),
        (
            {"x": {0}},
            {},
            "rank 0 owns a bucket, but is behind none of the devices of remote_topo (it is empty)",
        ),
        ({"x": {0}}, {"dev1": {1}, "dev2": {2}}, "none of the devices of remote_topo (dev1, dev2)"),
        ({"x": {0}}, {"dev0": {0}, "dev1": {0}}, "remote_topo: rank 0 is behind dev0 and behind dev1"),
        ({"x": {1}, "y": {1}}, {"dev0": {0}}, "local_topo: rank 1 is behind x and behind y"),
    ],
)
def test_bad_topologies_are_refused(local_topo: Topo, remote_topo: Topo, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        assign_receiver_ranks([(0, "a")], local_topo, remote_topo)


@st.composite
def topologies(draw: st.DrawFn) -> Topo:
    """Ranks spread over devices, in any order, some devices without a rank."""
    ranks = draw(st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True))
    devices = draw(st.permutations([f"mlx5_{number}@h" for number in range(draw(st.integers(1, 6)))]))
    topo: Topo = {device: set() for device in devices}
    for rank in ranks:
        topo[draw(st.sampled_from(devices))].add(rank)
    return topo


@st.composite
def cases(draw: st.DrawFn) -> tuple[Buckets, Topo, Topo]:
    remote = draw(topologies())
    owners = sorted(rank for ranks in remote.values() for rank in ranks)
    buckets = [
        (owner, f"b{number}")
        for number, owner in enumerate(draw(st.lists(st.sampled_from(owners), min_size=1, max_size=30)))
    ]
    return buckets, draw(topologies()), remote


def interleaved(buckets: Sequence[tuple[int, str]], device_of: dict[int, str]) -> Buckets:
    """By brute force: again and again the first bucket left of each device, as long as there is one."""
    left = list(buckets)
    devices = list(dict.fromkeys(device_of[owner] for owner, _ in buckets))
    taken: Buckets = []
    while left:
        for device in devices:
            first = next((item for item in left if device_of[item[0]] == device), None)
            if first is not None:
                left.remove(first)
                taken.append(first)
    return taken


@reproducible
@given(cases())
def test_properties(case: tuple[Buckets, Topo, Topo]) -> None:
    buckets, local, remote = case
    assigned = assign_receiver_ranks(buckets, local, remote)
    device_of = {rank: device for device, ranks in remote.items() for rank in ranks}

    # Every bucket once, each with its own owner; devices in turn, and within a device the owners' order.
    assert [(owner, bucket) for _, owner, bucket in assigned] == interleaved(buckets, device_of)

    # Who receives: lowest ranks, of the first devices that have any, no more than there are owners' devices.
    devices_count = len({device_of[owner] for owner, _ in buckets})
    expected = [min(ranks) for ranks in local.values() if ranks][:devices_count]

    # A round begins wherever the first receiver is.
    begins = [number for number, item in enumerate(assigned) if item[0] == expected[0]]
    assert begins[0] == 0
    for begin, end in zip(begins, [*begins[1:], len(assigned)], strict=True):
        round_ = assigned[begin:end]
        assert [receiver for receiver, _, _ in round_] == expected[: len(round_)]
        devices = [device_of[owner] for _, owner, _ in round_]
        assert len(set(devices)) == len(devices)
        # As long as the rule allows: full, or the next bucket's device is in it, or there is no next one.
        assert len(round_) == len(expected) or end == len(assigned) or device_of[assigned[end][1]] in devices
