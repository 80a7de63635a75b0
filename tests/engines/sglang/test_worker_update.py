"""Updates of models that no server on CPU runs: drafts, fused ones, and what is refused.

Real parameter servers and SGLang's real loading functions, on models of plain torch, behind a scheduler made
up of what is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ckpt_engine_sglang import versions
from ckpt_engine_sglang.options import MARK

from ckpt_engine import ParameterServer
from ckpt_engine.errors import UpdateError
from tests.engines.sglang.schedulers import (
    NamedTensors,
    OldScheduler,
    Plain,
    Scheduler,
    drawn,
    parameter,
    runner,
    serve,
    update,
)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def in_process(sglang_in_process: None) -> None: ...


class Fused(torch.nn.Module):
    """Joins `a` and `b` when one call gets both."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = parameter(6, 64)
        self.rest = parameter(16, 64)

    def load_weights(self, weights: NamedTensors) -> None:
        given = dict(weights)
        if "a" in given and "b" in given:
            self.fused.data.copy_(torch.cat([given["a"], given["b"]]))
        if "rest" in given:
            self.rest.data.copy_(given["rest"])


def test_a_draft_is_loaded_from_the_same_pass() -> None:
    target, draft = Plain(a=(3, 4), b=(5,)), Plain(b=(5,), c=(7,))
    scheduler = Scheduler([("target", runner(target)), ("draft", runner(draft))])
    tensors = drawn(a=(3, 4), b=(5,), c=(7,))
    success, message = update(scheduler, tensors)
    assert success, message
    for model, names in ((target, "ab"), (draft, "bc")):
        for name in names:
            assert torch.equal(getattr(model, name), tensors[name])
    assert scheduler.did == ["version new", "flush"]

    del tensors["c"]
    with pytest.raises(UpdateError, match="the update does not fill c: "):
        update(scheduler, tensors)


def test_a_draft_with_a_checkpoint_of_its_own_is_left_alone() -> None:
    target, draft = Plain(a=(3, 4)), Plain(a=(3, 4))
    scheduler = Scheduler([("target", runner(target)), ("draft", runner(draft, "/models/draft"))])
    assert update(scheduler, drawn(a=(3, 4)))[0]
    assert target.a.any()
    assert not draft.a.any()


def test_tensors_of_one_parameter_that_come_in_different_buckets() -> None:
    model = Fused()
    tensors = drawn(a=(2, 64), b=(4, 64), rest=(16, 64))
    # Named so that the third tensor, and the memory of the first one's slot, lie between them.
    assert update(Scheduler([("target", runner(model))]), tensors, slot_nbytes=1024)[0]
    assert torch.equal(model.fused, torch.cat([tensors["a"], tensors["b"]]))
    assert torch.equal(model.rest, tensors["rest"])


class Inspecting(Plain):
    """Cannot be rehearsed: looks at values."""

    def load_weights(self, weights: NamedTensors) -> None:
        given = list(weights)
        assert not any(tensor.isnan().any() for _, tensor in given)
        super().load_weights(given)


@pytest.mark.parametrize("kind", [Plain, Inspecting])
def test_what_is_loaded_is_compared_in_full_and_the_rest_is_named(
    kind: type[Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tensors = kind(a=(3, 4), b=(64,), c=(5,)), drawn(a=(3, 4), b=(64,), c=(5,))
    tensors["c"] = tensors["c"].bfloat16()
    scheduler = Scheduler([("target", runner(model))])
    success, message = update(scheduler, tensors, slot_nbytes=256, verify="full")
    assert success, message
    assert "Verified: 3 as they arrived, 2 as they were loaded; not as loaded: c" in message
    real = versions.post_process

    def flipping(of: torch.nn.Module, device: torch.device) -> None:
        real(of, device)
        model.b.data.view(torch.uint8)[5] ^= 1

    with monkeypatch.context() as patch:
        patch.setattr(versions, "post_process", flipping)
        with pytest.raises(UpdateError, match=r"tensor 'b' \(bucket \d\) was loaded as other bytes"):
            update(scheduler, tensors, slot_nbytes=256, verify="full")
    assert update(scheduler, tensors, slot_nbytes=256, verify="full")[0]


def test_nothing_is_touched_under_requests_that_run() -> None:
    model = Plain(a=(3,))
    scheduler = Scheduler([("target", runner(model))], idle=False)
    with pytest.raises(UpdateError, match="requests are running or queued"):
        update(scheduler, drawn(a=(3,)))
    assert not model.a.any()
    assert scheduler.did == ["version None", "flush"]


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"offload_tags": {"kv_cache", "weights"}}, "resume_memory_occupation"),
        ({"_session": object()}, "end_weight_update"),
        ({"attention_dp": 2}, "data parallel in 2 groups"),
    ],
)
def test_nothing_is_touched_where_weights_cannot_be_written(state: dict[str, object], told: str) -> None:
    model = Plain(a=(3,))
    scheduler = Scheduler([("target", runner(model))])
    vars(scheduler).update(state)
    with pytest.raises(UpdateError, match=told) as caught:
        update(scheduler, drawn(a=(3,)))
    assert caught.value.touched is False
    assert not model.a.any()
    assert scheduler.did == ["version None", "flush"]
    vars(scheduler).update(offload_tags={"kv_cache"}, _session=None, attention_dp=1)
    assert update(scheduler, drawn(a=(3,)))[0]


def test_the_flush_of_an_older_sglang() -> None:
    model = Plain(a=(3,))
    scheduler = OldScheduler([("target", runner(model))])
    assert update(scheduler, drawn(a=(3,)))[0]
    assert scheduler.did == ["version new", "flush"]
    with pytest.raises(UpdateError, match="has no place for b"):
        update(scheduler, drawn(a=(3,), b=(1,)))
    assert scheduler.did == ["version new", "flush", "version None", "flush"]


def cached(_: str) -> None:
    raise RuntimeError("the weight cache is active")


def packed(model: Plain) -> Any:  # noqa: ANN401
    model.use_intel_amx_backend = True
    return runner(model)


def in_a_cache(model: Plain) -> Any:  # noqa: ANN401
    made = runner(model)
    made.weight_updater._assert_weight_cache_inactive = cached
    return made


def as_flash_rl(model: Plain) -> Any:  # noqa: ANN401
    model.flash_rl_initial_load_complete = True
    return runner(model)


def on_another_device(model: Plain) -> Any:  # noqa: ANN401
    made = runner(model)
    made.device = "xpu"
    return made


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (packed, "packed for AMX"),
        (in_a_cache, "the weight cache is active"),
        (on_another_device, "not on 'xpu'"),
        (as_flash_rl, "loaded as flash_rl"),
    ],
)
def test_what_cannot_be_updated_is_refused_before_a_byte_moves(
    make: Callable[[Plain], Any], told: str
) -> None:
    model = Plain(a=(3,))
    scheduler = Scheduler([("target", make(model))])
    with pytest.raises(UpdateError, match=told) as caught:
        update(scheduler, drawn(a=(3,)))
    assert caught.value.touched is False
    assert not model.a.any()
    assert scheduler.did == ["version None", "flush"]


@pytest.mark.parametrize("options", ["no JSON", "[]", '{"ignored": 3}'])
def test_options_that_are_none(options: str) -> None:
    scheduler = Scheduler([("target", runner(Plain(a=(3,))))])
    answer: list[tuple[bool, str]] = []

    def ask(paths: list[tuple[str, str]]) -> None:
        answer.append(serve(scheduler, {uuid: handle + MARK + options for uuid, handle in paths}))

    with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
        ps.register_checkpoint("new", named_tensors=drawn(a=(3,)))
        ps.gather_metas("new")
        with pytest.raises(UpdateError, match="ckpt_engine_options="):
            ps.update("new", ask, timeout=60)
    assert answer[0][0] is False
