"""The balanced assignment, the model of reads, and the choice between the two assignments."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_engine.errors import PlanError
from ckpt_engine.planning.reads import ReadRates, choose_receivers, predict_reads
from ckpt_engine.planning.receivers import assign_receiver_ranks, balance_receiver_ranks, nic_count

reproducible = settings(derandomize=True, print_blob=True, deadline=None, max_examples=200)
GB = 10**9


@dataclass(frozen=True)
class Bytes:
    """A bucket, as far as receivers are concerned."""

    number: int
    nbytes: int


Topo = dict[str, set[int]]
Buckets = list[tuple[int, Bytes]]


def buckets_of(counts: dict[int, int], nbytes: int = GB) -> Buckets:
    """So many equal buckets of each owner."""
    owners = [owner for owner, count in counts.items() for _ in range(count)]
    return [(owner, Bytes(number, nbytes)) for number, owner in enumerate(owners)]


def test_names_joined_by_commas_count() -> None:
    assert [nic_count(name) for name in ("mlx5_0@h", "mlx5_0,mlx5_1@h,2", "tcp@h", "a,b,c")] == [1, 2, 1, 3]


def test_a_read_is_as_fast_as_its_slowest_part() -> None:
    """1 GB at 10 GB/s through both NICs, 20 GB/s to the device, 50 GB/s to all: 0.1 + 0.05 + 0.02."""
    rates = ReadRates(nic=10e9, h2d=20e9, broadcast=50e9, places=1)
    assigned = [(0, 0, Bytes(0, GB))]
    assert predict_reads(assigned, {"x": {0}}, {"o": {0}}, rates) == pytest.approx(0.17)


def test_reads_go_on_during_broadcasts() -> None:
    """Three such buckets. With one place the next read begins when the copy to the device is done, every
    0.15 s, since 0.02 s of broadcast hide in the 0.1 s of the next read: 3 * 0.15 + 0.02. With two places
    the first two share the NIC and are there after 0.2 s. The third begins when the first has left its place
    at 0.25, has the NIC alone, and is there at 0.35; then 0.05 + 0.02."""
    rates = ReadRates(nic=10e9, h2d=20e9, broadcast=50e9, places=1)
    assigned = [(0, 0, Bytes(number, GB)) for number in range(3)]
    local, remote = {"x": {0}}, {"o": {0}}
    assert predict_reads(assigned, local, remote, rates) == pytest.approx(0.47)
    rates = ReadRates(nic=10e9, h2d=20e9, broadcast=50e9, places=2)
    assert predict_reads(assigned, local, remote, rates) == pytest.approx(0.42)


def test_owners_share_their_nic() -> None:
    """Owners 0 and 1 behind one device, two receivers with one each: 20 GB/s in, but only 10 GB/s out."""
    rates = ReadRates(nic=10e9, h2d=1e18, broadcast=1e18)
    assigned = [(0, 0, Bytes(0, GB)), (1, 1, Bytes(1, GB))]
    local: Topo = {"x": {0}, "y": {1}}
    assert predict_reads(assigned, local, {"o": {0, 1}}, rates) == pytest.approx(0.2)
    assert predict_reads(assigned, local, {"o": {0}, "p": {1}}, rates) == pytest.approx(0.1)


def test_balanced_takes_more_receivers_where_an_owner_has_more_nics() -> None:
    """One owner behind four NICs, four receivers behind one each: in rounds only one of them receives."""
    buckets = buckets_of({0: 40})
    local: Topo = {f"mlx5_{number}@new": {number} for number in range(4)}
    remote: Topo = {"mlx5_0,mlx5_1,mlx5_2,mlx5_3@old": {0}}
    rates = ReadRates(nic=10e9, h2d=1e18, broadcast=1e18)
    chosen = choose_receivers(buckets, local, remote, rates)
    assert chosen.by == "balanced"
    assert chosen.seconds["rounds"] == pytest.approx(40 / 10)
    assert chosen.seconds["balanced"] == pytest.approx(40 / 40)
    assert chosen.assigned == balance_receiver_ranks(buckets, local, remote)
    assert [receiver for receiver, _, _ in chosen.assigned[:5]] == [0, 1, 2, 3, 0]


def test_balanced_spreads_what_is_left_of_the_largest_share() -> None:
    """Owners 0 and 3 share two NICs and have 8 of 12 buckets, owners 1 and 2, behind one each, 2; three
    receivers behind one each. In rounds the small shares are gone early, and what is left of the large one
    goes to the first receiver alone, at 10 GB/s."""
    buckets = buckets_of({0: 4, 3: 4, 1: 2, 2: 2})
    local: Topo = {"x": {0}, "y": {1}, "z": {2}}
    remote: Topo = {"a,b@old": {0, 3}, "c@old": {1}, "d@old": {2}}
    rates = ReadRates(nic=10e9, h2d=1e18, broadcast=1e18)
    seconds = choose_receivers(buckets, local, remote, rates).seconds
    assert seconds["balanced"] == pytest.approx(0.4)  # 12 GB into 3 NICs: nothing is faster
    assert seconds["rounds"] > 1.5 * seconds["balanced"]


def test_a_receiver_gets_bytes_by_its_nics() -> None:
    """Receivers behind two NICs and one: 8 of 12 buckets go to the first."""
    assigned = balance_receiver_ranks(
        buckets_of({0: 6, 1: 6}), {"a,b@new": {0}, "c@new": {1}}, {"a@old": {0}, "b@old": {1}}
    )
    assert [receiver for receiver, _, _ in assigned].count(0) == 8


def test_rounds_are_kept_where_balancing_gains_nothing() -> None:
    sides: tuple[Topo, Topo] = ({"x": {0}, "y": {1}}, {"o": {0}, "p": {1}})
    chosen = choose_receivers(buckets_of({0: 5, 1: 5}), *sides)
    assert (chosen.by, list(chosen.seconds)) == ("rounds", ["rounds"])
    assert choose_receivers([], {}, {}).assigned == []


@st.composite
def cases(draw: st.DrawFn) -> tuple[Buckets, Topo, Topo]:
    def topo(side: str, largest: int) -> Topo:
        names = [
            ",".join(f"m{number}.{nic}" for nic in range(draw(st.integers(1, 3)))) + f"@{side}"
            for number in range(draw(st.integers(1, largest)))
        ]
        ranks = iter(range(100))
        return {name: {next(ranks) for _ in range(draw(st.integers(1, 2)))} for name in names}

    local, remote = topo("new", 5), topo("old", 4)
    owners = sorted(rank for ranks in remote.values() for rank in ranks)
    sizes = draw(st.lists(st.tuples(st.sampled_from(owners), st.integers(0, 9)), min_size=1, max_size=24))
    return [(owner, Bytes(number, size * GB)) for number, (owner, size) in enumerate(sizes)], local, remote


@reproducible
@given(cases())
def test_properties_of_both(case: tuple[Buckets, Topo, Topo]) -> None:
    buckets, local, remote = case
    device_of = {rank: device for device, ranks in remote.items() for rank in ranks}
    rates = ReadRates(nic=10e9, h2d=40e9, broadcast=30e9)
    chosen = choose_receivers(buckets, local, remote, rates)
    balanced = balance_receiver_ranks(buckets, local, remote)
    # Every bucket once, with its owner; one device's in their order; received by lowest ranks.
    assert sorted((owner, bucket.number) for _, owner, bucket in balanced) == sorted(
        (owner, bucket.number) for owner, bucket in buckets
    )
    for device in remote:
        mine = [bucket for _, owner, bucket in balanced if device_of[owner] == device]
        assert mine == [bucket for owner, bucket in buckets if device_of[owner] == device]
    assert {receiver for receiver, _, _ in balanced} <= {min(ranks) for ranks in local.values()}
    # The choice is the faster one, and no model beats what the wires can carry.
    rounds = assign_receiver_ranks(buckets, local, remote)
    times = [predict_reads(assigned, local, remote, rates) for assigned in (rounds, balanced)]
    assert chosen.seconds[chosen.by] == min(times)
    assert chosen.assigned == (rounds if chosen.by == "rounds" else balanced)
    total = sum(bucket.nbytes for _, bucket in buckets)
    floors = [total / 30e9, total / 10e9 / sum(map(nic_count, local))]
    for device in remote:
        share = sum(bucket.nbytes for owner, bucket in buckets if device_of[owner] == device)
        floors.append(share / 10e9 / nic_count(device))
    assert min(times) >= max(floors) * (1 - 1e-9)


@pytest.mark.parametrize("assign", [assign_receiver_ranks, balance_receiver_ranks, choose_receivers])
def test_all_refuse_the_same(assign: object) -> None:
    assert callable(assign)
    with pytest.raises(PlanError, match="rank 7 owns a bucket"):
        assign(buckets_of({7: 1}), {"x": {0}}, {"o": {0}})
