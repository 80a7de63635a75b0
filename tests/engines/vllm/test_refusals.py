"""Engines that cannot be updated right are refused by name, before anything is touched."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ckpt_engine_vllm import refusals
from ckpt_engine_vllm.quantisation import refuse_unproven
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


def test_a_vllm_without_layer_wise_reload_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vLLM \d.* cannot reload layer by layer: use a newer one"):
        refusals.refuse_old_vllm()


def test_an_engine_with_adapters_is_refused_and_goes_on(
    offline: OfflineEngine, checkpoints: Checkpoints
) -> None:
    offline.start(checkpoints("qwen3", "a"), enable_lora=True, max_lora_rank=8)
    before = offline.answers()
    with pytest.raises(UpdateError, match=r"ConfigError: LoRA adapters .* without --enable-lora") as caught:
        update_from(offline, checkpoints("qwen3", "b"))
    assert caught.value.touched is False
    assert offline.answers() == before


def test_an_engine_that_moves_experts_is_refused_and_goes_on(
    offline: OfflineEngine, checkpoints: Checkpoints
) -> None:
    offline.start(checkpoints("moe", "a"))
    before = offline.answers()
    offline.rpc("test_balances_experts", True)
    with pytest.raises(
        UpdateError, match=r"ConfigError: the expert load balancer .*without --enable-eplb"
    ) as caught:
        update_from(offline, checkpoints("moe", "b"))
    assert caught.value.touched is False
    offline.rpc("test_balances_experts", False)  # with a pretended one the engine itself would not answer
    assert offline.answers() == before
    update_from(offline, checkpoints("moe", "b"))
    assert offline.answers() == offline.from_disk(checkpoints("moe", "b"))


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


def test_padded_experts_are_refused_by_name(offline: OfflineEngine, checkpoints: Checkpoints) -> None:
    """vLLM pads them once, when it starts, and a reload has no place for the padding."""
    offline.start(checkpoints("moe-padded", "a"))
    before = offline.answers()
    message = r"ConfigError: .*experts.*: its experts' intermediate size of 48 on each rank is padded to 64"
    with pytest.raises(UpdateError, match=message) as caught:
        update_from(offline, checkpoints("moe-padded", "b"))
    assert caught.value.touched is False
    assert offline.answers() == before


FP8, PER_CHANNEL = "fp8.Fp8LinearMethod", "online.fp8.Fp8PtpcOnlineLinearMethod"
TORCH_KERNEL = "pytorch.ChannelWiseTorchFP8ScaledMMLinearKernel"
fp8_of_vllm = pytest.mark.filterwarnings("ignore::DeprecationWarning")
"""What is imported for it warns."""


def quantised(method: str, kernel: str, device: str) -> torch.nn.Module:
    """A layer as vLLM leaves one that it quantised: with its own classes, whose devices need not be here."""
    layer = torch.nn.Linear(2, 2, device=device)
    layer.quant_method = _of_vllm(f"layers.quantization.{method}")
    layer.quant_method.fp8_linear = _of_vllm(f"kernels.linear.scaled_mm.{kernel}")
    return torch.nn.Sequential(layer)


def _of_vllm(path: str) -> Any:  # noqa: ANN401 - vLLM has no types here
    module, _, name = path.rpartition(".")
    return object.__new__(getattr(import_module(f"vllm.model_executor.{module}"), name))


@fp8_of_vllm
@pytest.mark.parametrize(
    ("method", "kernel", "device"),
    [
        (FP8, "cutlass.CutlassFP8ScaledMMLinearKernel", "cpu"),
        (FP8, "cutlass.CutlassFp8BlockScaledMMKernel", "cpu"),
        # It runs on CPU and on CUDA. The meta device stands for any other than a CPU.
        (PER_CHANNEL, TORCH_KERNEL, "meta"),
    ],
)
def test_fp8_on_cuda_is_refused_by_name(method: str, kernel: str, device: str) -> None:
    names = [path.rpartition(".")[2] for path in (method, kernel)]
    message = rf"^0: updating fp8 weights of vLLM's {names[0]} with {names[1]} on {device} is not in this"
    with pytest.raises(ConfigError, match=message):
        refuse_unproven(quantised(method, kernel, device), "fp8")


@fp8_of_vllm
@pytest.mark.parametrize(
    ("method", "kernel"), [(FP8, "cpu.CPUFp8BlockScaledMMKernel"), (PER_CHANNEL, TORCH_KERNEL)]
)
def test_fp8_that_was_compared_on_cpu_is_not_refused(method: str, kernel: str) -> None:
    refuse_unproven(quantised(method, kernel, "cpu"), "fp8")
