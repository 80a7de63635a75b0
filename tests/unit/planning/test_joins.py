"""Predicted joins: times worked out by hand, who reads whom, and that no wait is for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt_engine.errors import ConfigError
from ckpt_engine.metadata import Metas
from ckpt_engine.planning.cluster import Cluster, Synthetic, load_cluster, synthetic_metas
from ckpt_engine.planning.joins import (
    PredictedJoins,
    Slots,
    owners_of,
    plan_join,
    plan_subset,
    predict_join,
    predict_joins,
    predict_subset,
)
from ckpt_engine.planning.prediction import predict

MB = 1_000_192
"""A megabyte that is a multiple of 256."""
SLOTS = Slots(slot_nbytes=MB, slot_count=3, budget=2**60)
CLUSTERS = Path(__file__).parents[3] / "examples" / "clusters"


def cluster(
    device: str = "cuda",
    ranks: int = 1,
    owners: dict[str, Any] | None = None,
    seconds: dict[str, float] | None = None,
    **p2p: Any,  # noqa: ANN401 - fields of P2P
) -> Cluster:
    """Reads take their time, one at once; nothing else does, unless `h2d` or `reload` is given."""
    rates = {name: p2p.pop(name, 1e9) for name in ("h2d", "reload", "copy", "broadcast")}
    return Cluster.model_validate(
        {
            "name": "c",
            "device": device,
            "ranks_per_host": ranks,
            "rates": rates | ({"memory": 1e9} if device == "cpu" else {}),
            "seconds": seconds or {},
            "p2p": {"nic": 1, "at_once": 1} | p2p,
            "owners": owners or {"ranks_per_host": 1},
        }
    )


def owners(one: Cluster, tensors: int) -> Metas:
    """Tensors of 1 MB, one in each bucket, owners in turn."""
    checkpoint = Synthetic(gb=tensors * MB / 1e9, tensors=tensors)
    return owners_of(synthetic_metas(checkpoint, one.joined.world_size), one)


def units(seconds: float) -> float:
    """Of 1 MB at 1 GB/s."""
    return seconds / (MB / 1e9)


def alone(one: Cluster, tensors: int) -> float:
    return units(predict_join(owners(one, tensors), one, SLOTS).prediction.stages["buckets"])


def at_once(one: Cluster, joiners: list[int], tensors: int = 10) -> list[PredictedJoins]:
    return predict_joins(owners(one, tensors), one, SLOTS, joiners)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_reads_copies_and_reloads_follow_each_other(device: str) -> None:
    """Ten reads of 1, of which the last is there at 10; then its copy, half, and its reload, a quarter."""
    assert alone(cluster(device, h2d=2, reload=4), 10) == pytest.approx(10.75)


def test_slow_reloads_hold_the_reads_up() -> None:
    """Reloads of 2 follow one another from the first read's end on: 1 + 10 * 2."""
    assert alone(cluster(reload=0.5), 10) == pytest.approx(21)


def test_a_bucket_that_is_read_has_its_own_time() -> None:
    """A thread's turn, and a look at the lease: the reads do not wait for that, what follows does."""
    assert alone(cluster(seconds={"read": 0.5 * MB / 1e9}), 10) == pytest.approx(10.5)


def test_ranks_behind_one_nic_have_one_receiver() -> None:
    """Two owners and two ranks, all with NICs of their own: 5 reads side by side. The ranks behind one NIC:
    10 one after the other."""
    both = {"ranks_per_host": 2, "nics": 2}
    assert alone(cluster(ranks=2, nics=2, owners=both), 10) == pytest.approx(5)
    shared = cluster(ranks=2, nics=1, owners=both)
    assert {item.receiver for item in plan_join(owners(shared, 10), shared, SLOTS).plan.buckets} == {0}
    assert alone(shared, 10) == pytest.approx(10)


def test_the_assignment_that_is_taken_is_the_faster_one() -> None:
    """One owner behind four NICs, four ranks behind one each: in rounds only one of them reads."""
    one = cluster(ranks=4, nics=4, owners={"ranks_per_host": 1, "nics": 4})
    found = predict_join(owners(one, 40), one, SLOTS)
    assert units(found.assigned["rounds"]) == pytest.approx(40)
    assert units(found.assigned["balanced"]) == pytest.approx(10)
    assert found.by == "balanced"
    assert found.prediction.seconds == found.assigned["balanced"]
    assert found.prediction.bottleneck == "P2P, who is read"
    alike = cluster(ranks=2, nics=2, owners={"ranks_per_host": 2})
    assert predict_join(owners(alike, 8), alike, SLOTS).by == "rounds"


def test_each_joiner_is_late_by_a_bucket_and_the_owner_sends_each_byte_once() -> None:
    one = cluster()
    for row in at_once(one, [1, 2, 4, 64]):
        assert units(row.first) == pytest.approx(10)
        assert units(row.last) == pytest.approx(10 + row.joiners - 1)
        assert row.owner_nbytes == 10 * MB


def test_joiners_come_one_after_the_other() -> None:
    """Each announces itself after 3: the third has all at 10 + 2 * 3."""
    one = cluster(seconds={"announce": 3 * MB / 1e9})
    assert units(at_once(one, [3])[0].last) == pytest.approx(16)


def test_without_keep_owners_admit_some_at_a_time_who_share_what_they_send() -> None:
    """Two at a time at half the rate each, 20; then the next two, or one alone, 10."""
    one = cluster(readers=2)
    found = {row.joiners: units(row.from_owners) for row in at_once(one, [1, 2, 3, 4, 6])}
    assert found == pytest.approx({1: 10, 2: 20, 3: 30, 4: 40, 6: 60})


def test_what_is_kept_is_read_as_it_lies_there() -> None:
    """Two owners, a joiner of two ranks, and one that reads it: all tensors again, from both, and in time."""
    one = cluster(ranks=2, nics=2, owners={"ranks_per_host": 2})
    first = plan_join(owners(one, 7), one, SLOTS)
    second = plan_join(first.kept, one, SLOTS)
    names = sorted(f"t{number}" for number in range(7))
    for join in (first, second):
        held = [t.name for rank in join.kept.values() for buffer in rank.buffers for t in buffer.tensors]
        assert sorted(held) == names
        assert sum(part.nbytes for parts in join.parts.values() for part in parts) == 7 * MB
    assert {part.rank for parts in second.parts.values() for part in parts} == {0, 1}
    assert plan_join(second.kept, one, SLOTS).kept == second.kept


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_wait_is_for_ever(device: str, ranks: int, slots: int) -> None:
    """Tensors of one to three slots, more receivers than owners and fewer."""
    one = cluster(device, ranks=ranks, h2d=1, reload=1, owners={"ranks_per_host": 2}).model_copy(
        update={"hosts": 2}
    )
    shape = Slots(slot_nbytes=MB // 2, slot_count=slots, budget=2**60)
    rows = predict_joins(owners(one, 11), one, shape, [1, 3])
    assert rows[0].last >= 11 * MB / 1e9 / 2
    assert rows[1].last >= rows[0].last


def fleet(one: Cluster, tensors: int) -> Metas:
    """What its own ranks hold: tensors of 1 MB, in turn."""
    return synthetic_metas(Synthetic(gb=tensors * MB / 1e9, tensors=tensors), one.world_size)


@pytest.mark.parametrize(("device", "last"), [("cuda", 0.5), ("cpu", 0)])
def test_a_subset_reads_what_the_others_hold(device: str, last: float) -> None:
    """Four ranks on two hosts hold 2 each. The first alone reads 6, one after the other, and copies its own
    beside them; both of a host read 4, through a NIC each: 2. On devices the last copy takes 0.5 more (in
    host memory, where every rank copies all, copies take no time here)."""
    one = cluster(device, ranks=2, nics=2, h2d=1 / last if last else 1e9)
    one = one.model_copy(update={"hosts": 2})
    metas = fleet(one, 8)
    taken = {}
    for ranks in ([0], [0, 1], [2, 3]):
        plan = plan_subset(metas, ranks, one, SLOTS).plan
        read = [item for item in plan.buckets if item.receiver is not None]
        own = [item for item in plan.buckets if item.receiver is None]
        assert sum(item.nbytes for item in read) == (8 - 2 * len(ranks)) * MB
        assert {item.owner for item in read} == {0, 1, 2, 3} - set(ranks)
        assert {item.receiver for item in read} == set(ranks) == {item.owner for item in own}
        taken[tuple(ranks)] = units(predict_subset(metas, ranks, one, SLOTS).prediction.stages["buckets"])
    assert taken == pytest.approx({(0,): 6 + last, (0, 1): 2 + last, (2, 3): 2 + last})


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_all_ranks_as_a_subset_are_an_update(device: str) -> None:
    one = cluster(device, ranks=2, nics=2, h2d=2, reload=4, broadcast=3).model_copy(update={"hosts": 2})
    metas = fleet(one, 9)
    plan = plan_subset(metas, range(4), one, SLOTS).plan
    found = predict_subset(metas, range(4), one, SLOTS)
    assert {item.receiver for item in plan.buckets} == {None}
    assert found.prediction.seconds == predict(plan, one).seconds


def test_a_subset_behind_one_nic_has_one_receiver() -> None:
    """Both ranks of a host hold 2 and read 4: the first of them all 4."""
    one = cluster(ranks=2, nics=1).model_copy(update={"hosts": 2})
    metas = fleet(one, 8)
    found = predict_subset(metas, [0, 1], one, SLOTS)
    assert units(found.prediction.stages["buckets"]) == pytest.approx(4)
    assert found.prediction.bottleneck.startswith("P2P")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("ranks", [[0], [1, 2], [0, 3, 5], [0, 1, 2, 3, 4]])
def test_no_wait_of_a_subset_is_for_ever(device: str, ranks: list[int]) -> None:
    one = cluster(device, ranks=3, h2d=1, reload=1).model_copy(update={"hosts": 2})
    metas = fleet(one, 11)
    for count in (1, 2, 3):
        shape = Slots(slot_nbytes=MB // 2, slot_count=count, budget=2**60)
        found = predict_subset(metas, ranks, one, shape)
        assert units(found.prediction.stages["buckets"]) >= 11


def test_a_subset_is_of_ranks_that_there_are() -> None:
    one = cluster(ranks=2)
    with pytest.raises(ConfigError, match="rank 2 is none of the cluster's: it has 0 to 1"):
        predict_subset(fleet(one, 4), [0, 2], one, SLOTS)
    with pytest.raises(ConfigError, match="no rank to update"):
        predict_subset(fleet(one, 4), [], one, SLOTS)


def test_the_example_fans_out_to_64() -> None:
    one = load_cluster(CLUSTERS / "joins.toml")
    assert one.checkpoint is not None
    held = owners_of(synthetic_metas(Synthetic(gb=14, tensors=200), one.joined.world_size), one)
    slots = Slots(slot_nbytes=2**28, slot_count=3, budget=2**60)
    found = predict_join(held, one, slots)
    assert found.assigned["balanced"] < found.assigned["rounds"]
    rows = predict_joins(held, one, slots, [1, 64])
    assert rows[1].from_owners > 10 * rows[0].from_owners
    assert rows[1].last < rows[1].from_owners / 2
    assert rows[1].owner_nbytes == rows[0].owner_nbytes


def test_how_ranks_read_must_be_described() -> None:
    one = cluster().model_copy(update={"p2p": None})
    with pytest.raises(ConfigError, match=r"a \[p2p\] table must say how ranks read"):
        owners(one, 1)
    with pytest.raises(ConfigError, match="cannot be shared out equally"):
        plan_join(owners(cluster(), 1), cluster(ranks=2, nics=3), SLOTS)
