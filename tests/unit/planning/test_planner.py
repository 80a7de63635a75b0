"""A plan is made once for a layout, and again when anything of it has changed."""

from __future__ import annotations

import pytest

from ckpt_engine.errors import PlanError
from ckpt_engine.metadata import HostBufferMeta, Metas, RankMetas, TensorMeta
from ckpt_engine.planning.plan import UpdatePlan, make_plan
from ckpt_engine.planning.planner import Planner

MEMORY = 2**30


def metas(count: int = 20) -> Metas:
    tensors = tuple(
        TensorMeta(name=f"t{i}", dtype="uint8", shape=(1000,), nbytes=1000, offset=1024 * i)
        for i in range(count)
    )
    buffers = (HostBufferMeta(address=0, nbytes=1024 * count, tensors=tensors),)
    return {
        0: RankMetas(rank=0, host="h", host_ip="", device_uuid="d", epoch="e", buffers=buffers),
    }


def plan(planner: Planner, checkpoint: str, layout: str, count: int = 20, **changed: int) -> UpdatePlan:
    wanted = {"slot_nbytes": 4096, "slot_count": 3, "budget": MEMORY} | changed
    made = planner.plan(checkpoint, metas(count), layout, **wanted, staging=False, outside={}, assign=None)
    assert made == make_plan(checkpoint, metas(count), **wanted)
    return made


def test_the_plan_of_a_layout_is_used_again_under_another_name() -> None:
    planner = Planner()
    first = plan(planner, "step-1", "L")
    layouts, nbytes = first.layouts, first.nbytes
    second = plan(planner, "step-2", "L", budget=MEMORY - 12345)
    assert planner.made == 1
    assert (first.checkpoint, second.checkpoint) == ("step-1", "step-2")
    assert second.buckets is first.buckets
    assert second.__dict__["layouts"] is layouts, "what was derived is kept as well"
    assert second.nbytes == nbytes


@pytest.mark.parametrize("changed", [{"slot_nbytes": 8192}, {"slot_count": 2}, {"budget": 5000}])
def test_another_ring_needs_another_plan(changed: dict[str, int]) -> None:
    planner = Planner()
    plan(planner, "c", "L")
    plan(planner, "c", "L", **changed)
    assert planner.made == 2


def test_another_layout_needs_another_plan_and_none_is_never_kept() -> None:
    planner = Planner()
    plan(planner, "c", "L")
    plan(planner, "c", "M", count=21)
    plan(planner, "c", "", count=22)
    plan(planner, "c", "", count=23)
    assert planner.made == 4


def test_too_little_memory_is_told_also_for_a_plan_that_was_made() -> None:
    planner = Planner()
    plan(planner, "c", "L")
    with pytest.raises(PlanError, match="the largest tensor takes 1024 bytes"):
        plan(planner, "c", "L", budget=100)
    plan(planner, "c", "L")
    assert planner.made == 1
