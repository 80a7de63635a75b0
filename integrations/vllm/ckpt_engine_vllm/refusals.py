"""Engines that cannot be updated in place, told before anything is touched: why, and what to do."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ckpt_engine.errors import ConfigError


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
