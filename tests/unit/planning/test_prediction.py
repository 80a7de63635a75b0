"""Predictions: times worked out by hand on small plans, clusters that are refused, and size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import model
from ckpt_engine.errors import ConfigError
from ckpt_engine.planning.cluster import Cluster, Synthetic, load_cluster, synthetic_metas
from ckpt_engine.planning.plan import UpdatePlan, make_plan
from ckpt_engine.planning.prediction import Prediction, predict

CLUSTERS = Path(__file__).parents[3] / "examples" / "clusters"
MB = 1_000_192
"""A megabyte that is a multiple of 256."""


def cluster(device: str = "cuda", ranks: int = 1, hosts: int = 1, **rates: float) -> Cluster:
    fields: dict[str, Any] = {"name": "c", "device": device, "ranks_per_host": ranks, "hosts": hosts}
    return Cluster.model_validate(fields | {"rates": {"h2d": 1e9, "reload": 1e9} | rates})


def plan_of(one: Cluster, tensors: int, slots: int = 3, slot_nbytes: int = MB) -> UpdatePlan:
    """Tensors of 1 MB, one in each bucket, owners in turn."""
    return make_plan(
        "c",
        synthetic_metas(Synthetic(gb=tensors * MB / 1e9, tensors=tensors), one.world_size),
        slot_nbytes=slot_nbytes,
        slot_count=slots,
        budget=2**60,
        staging=one.world_size > 1 and one.device != "cpu",
    )


def buckets_of(one: Cluster, tensors: int, slots: int = 3) -> float:
    """Predicted seconds of the stage of buckets, in units of 1 MB at 1 GB/s."""
    return predict(plan_of(one, tensors, slots), one).stages["buckets"] / (MB / 1e9)


def test_a_lone_rank_is_as_fast_as_its_copies() -> None:
    """Ten buckets at 1 GB/s, each reload half as long: the last one ends half a unit after its copy."""
    assert buckets_of(cluster(h2d=1, reload=2), 10) == pytest.approx(10.5)


def test_slow_reloads_hold_the_copies_up() -> None:
    """Reloads of two units follow one another from the first copy's end on: 1 + 10 * 2."""
    assert buckets_of(cluster(h2d=1, reload=0.5), 10) == pytest.approx(21)


def test_one_slot_is_serial() -> None:
    """Copy, then reload, then the next copy."""
    assert buckets_of(cluster(h2d=1, reload=2), 10, slots=1) == pytest.approx(15)


def test_owners_copy_side_by_side() -> None:
    """Four owners, two buckets each, H2D 1, broadcasts at 4: the first four copies end at 1, and broadcasts
    take a quarter each. An owner's second copy begins when its first bucket leaves the staging buffer:
    owner 3's at 1.75, and it is there at 2.75; its broadcast ends at 3."""
    fast = cluster(ranks=4, h2d=1, broadcast=4, copy=1e9)
    assert buckets_of(fast, 8) == pytest.approx(3)


def test_a_host_shares_its_memory_among_its_owners() -> None:
    """All four copies together at 2 GB/s: 2 units for a megabyte each, then four broadcasts of a quarter."""
    assert buckets_of(cluster(ranks=4, h2d=1, h2d_host=2, broadcast=4, copy=1e9), 4) == pytest.approx(3)


def test_hosts_broadcast_at_the_slower_rate() -> None:
    """From the first copy's end on 4 broadcasts at 2 GB/s between hosts."""
    one = cluster(ranks=2, hosts=2, h2d=1, broadcast=4, between_hosts=2, copy=1e9)
    assert buckets_of(one, 4) == pytest.approx(1 + 4 / 2)


def test_ranks_in_host_memory_copy_each_others_buckets() -> None:
    """Two ranks on one host, a bucket each, 1 GB/s a process, reloads free. Both stage at once, 1; each
    copies the other's, 1."""
    assert buckets_of(cluster("cpu", ranks=2, h2d=1), 2) == pytest.approx(2)


def test_a_hosts_memory_is_shared_by_all_copies() -> None:
    """The same with 1 GB/s for all together: both buckets staged, copied by the other rank, and loaded by
    two workers: 2 + 2 + 4."""
    assert buckets_of(cluster("cpu", ranks=2, h2d=1, memory=1), 2) == pytest.approx(8)


def test_hosts_on_cpu_get_a_bucket_through_their_leader() -> None:
    """Two hosts of two ranks, one bucket of rank 0: staged, 1; rank 1 copies it, 1, and rank 2 gets it
    through the network at 0.5, 2; then rank 3 copies, 1."""
    one = cluster("cpu", ranks=2, hosts=2, h2d=1, between_hosts=0.5)
    assert buckets_of(one, 1) == pytest.approx(4)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_wait_is_for_ever(device: str, ranks: int, slots: int) -> None:
    """Tensors of one to three slots."""
    one = cluster(device, ranks=ranks, hosts=2, h2d=1, reload=1, broadcast=1)
    metas = synthetic_metas(Synthetic(gb=11 * MB / 1e9, tensors=11), one.world_size)
    plan = make_plan(
        "c", metas, slot_nbytes=MB // 2, slot_count=slots, budget=2**60, staging=device == "cuda"
    )
    assert predict(plan, one).seconds > 0


def test_what_is_not_bytes_is_added() -> None:
    one = cluster().model_copy(
        update={"seconds": cluster().seconds.model_copy(update={"begin": 2.0, "bucket": 1.0, "tensor": 0.5})}
    )
    found: Prediction = predict(plan_of(one, 4), one)
    assert found.stages["begin"] == 2
    assert found.stages["buckets"] == pytest.approx(4 * 1.5, rel=1e-3)
    assert found.seconds == pytest.approx(8, rel=1e-3)


def test_the_bottleneck_is_named() -> None:
    slow = cluster(ranks=2, h2d=50, broadcast=1)
    found = predict(plan_of(slow, 8), slow)
    assert found.bottleneck == "broadcast"
    use = next(use for use in found.links if use.kind == "broadcast")
    assert (use.rate, use.capacity) == (pytest.approx(1), 1)


def test_4096_ranks_take_seconds() -> None:
    one = load_cluster(CLUSTERS / "4096.toml")
    begin = time.process_time()
    assert one.checkpoint is not None
    metas = synthetic_metas(one.checkpoint, one.world_size)
    plan = make_plan("c", metas, slot_nbytes=2**28, slot_count=3, budget=2**60, staging=True)
    found = predict(plan, one)
    assert time.process_time() - begin < 20
    assert found.seconds == pytest.approx(plan.nbytes / 90e9, rel=0.2)


def test_the_model_is_near_what_was_measured() -> None:
    one = load_cluster(CLUSTERS / "h100.toml")
    for row in model.OURS:
        assert model.ours(row, one) == pytest.approx(row.measured, rel=0.15), row.what
    for published in model.PUBLISHED:
        assert model.reference(published) == pytest.approx(published.measured, rel=0.15), published.what


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is neither TOML nor JSON"),
        ('{"name": "x"}', "ranks_per_host: Field required; rates: Field required"),
        ('{"name": "x", "ranks_per_host": 1, "rates": {"h2d": 0, "reload": 1}}', "rates.h2d"),
        ('{"name": "x", "ranks_per_host": 1, "rates": {"h2d": 1, "reload": 1}, "nics": 8}', "nics: Extra"),
    ],
)
def test_what_is_no_cluster_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_cluster(file)
    assert message in str(raised.value)
    assert "c.json" in str(raised.value)
