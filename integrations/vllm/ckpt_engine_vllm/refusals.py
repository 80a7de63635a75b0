"""Engines that cannot be updated in place, told before anything is touched: why, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from ckpt_engine.errors import ConfigError

_ALLOCATORS = {
    "vllm.device_allocator.cumem": "CuMemAllocator",
    "vllm.device_allocator.xpumem": "XpuMemAllocator",
}


def refuse_old_vllm() -> None:
    """Raises ConfigError for a vLLM without layer-wise reload."""
    if find_spec("vllm.model_executor.model_loader.reload") is None:
        import vllm

        raise ConfigError(f"vLLM {vllm.__version__} cannot reload layer by layer: use a newer one")


def refuse_unsupported(vllm_config: Any) -> None:  # noqa: ANN401 - vLLM's VllmConfig
    """Raises ConfigError, with a remedy, for what this version cannot update right."""
    if getattr(vllm_config.parallel_config, "enable_eplb", False):
        raise ConfigError(
            "the expert load balancer moves experts between ranks, so their places are not the "
            "checkpoint's: start the engine without --enable-eplb"
        )
    if vllm_config.lora_config is not None:
        raise ConfigError(
            "LoRA adapters stand between the layers and their weights: start the engine without --enable-lora"
        )
    offload = getattr(vllm_config, "offload_config", None)
    if offload is not None and (offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0):
        raise ConfigError(
            "weights that are offloaded to the host cannot be reloaded: start the engine without offloading"
        )


def refuse_asleep() -> None:
    """Raises ConfigError where the memory of the weights has been given back (vLLM's sleep): a write to it
    would end the worker."""
    held = (data for name, kind in _ALLOCATORS.items() for data in weights_of(name, kind))
    if any(getattr(data, "is_asleep", False) for data in held):
        raise asleep()


def weights_of(module: str, allocator: str) -> Iterator[Any]:
    """What an allocator that can sleep knows of each piece of the weights' memory."""
    # What was not imported has nothing asleep.
    found = getattr(getattr(sys.modules.get(module), allocator, None), "instance", None)
    return (data for data in getattr(found, "pointer_to_data", {}).values() if data.tag == "weights")


def asleep() -> ConfigError:
    return ConfigError(
        "the engine's weights are asleep: wake them up first (POST /wake_up?tags=weights), and its KV cache "
        "after the update (tags=kv_cache)"
    )
