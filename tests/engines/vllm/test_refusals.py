"""Engines that cannot be updated right are refused by name, before anything is touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ckpt_engine_vllm.refusals import refuse_unsupported

from ckpt_engine.errors import ConfigError, UpdateError
from tests.engines.vllm.engines import Checkpoints, OfflineEngine
from tests.engines.vllm.parameter_servers import update_from


def config(**different: Any) -> SimpleNamespace:  # noqa: ANN401 - a field of vLLM's
    fields = {
        "parallel_config": SimpleNamespace(enable_eplb=different.pop("eplb", False)),
        "lora_config": None,
        "offload_config": SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=different.pop("offload", 0)),
            prefetch=SimpleNamespace(offload_group_size=different.pop("prefetch", 0)),
        ),
    }
    return SimpleNamespace(**fields)


def test_an_ordinary_engine_is_not_refused() -> None:
    refuse_unsupported(config())


@pytest.mark.parametrize(
    ("different", "remedy"),
    [
        ({"eplb": True}, "--enable-eplb"),
        ({"offload": 1}, "without offloading"),
        ({"prefetch": 2}, "without offloading"),
    ],
)
def test_what_stands_in_the_way_is_named_with_a_remedy(different: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        refuse_unsupported(config(**different))


def test_an_engine_with_adapters_is_refused_and_goes_on(
    offline: OfflineEngine, checkpoints: Checkpoints
) -> None:
    offline.start(checkpoints("qwen3", "a"), enable_lora=True, max_lora_rank=8)
    before = offline.answers()
    with pytest.raises(UpdateError, match=r"ConfigError: LoRA adapters .* without --enable-lora") as caught:
        update_from(offline, checkpoints("qwen3", "b"))
    assert caught.value.touched is False
    assert offline.answers() == before


def test_a_reload_that_moves_a_parameter_fails_for_good(
    offline: OfflineEngine, checkpoints: Checkpoints
) -> None:
    """Graphs know parameters by their addresses: what a quantisation's post-processing puts elsewhere
    they would never see."""
    name = "model.layers.1.input_layernorm.weight"
    offline.start(checkpoints("qwen3", "a"))
    offline.rpc("test_move", name)
    with pytest.raises(UpdateError, match=rf"Moved: the reload moved {name}, .*restart the engine") as caught:
        update_from(offline, checkpoints("qwen3", "b"))
    assert caught.value.touched is True
    assert offline.rpc("ckpt_engine_status")[0]["weights"] == "incomplete"
    for options in ({}, {"partial": True}):
        with pytest.raises(
            UpdateError, match=rf"failed for good: the reload moved {name}.*restart the engine"
        ):
            update_from(offline, checkpoints("qwen3", "b"), **options)
    assert offline.rpc("ckpt_engine_status")[0]["weights"] == "incomplete"
