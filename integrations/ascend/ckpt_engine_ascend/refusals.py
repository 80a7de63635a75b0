"""Engines whose weights cannot be replaced in place, told before anything is touched: why, and what to do."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from ckpt_engine_vllm.refusals import asleep, weights_of

from ckpt_engine.errors import ConfigError
from ckpt_engine_ascend.reload import has_layerwise_reload

FRACTAL_NZ = 29
"""CANN's number of the blocked format in which matrices are multiplied fastest."""

_NZ_REMEDY = (
    "set weight_nz_mode to 0 (`--additional-config '{\"weight_nz_mode\": 0}'`, in older versions "
    "VLLM_ASCEND_ENABLE_NZ=0) and restart the engine"
)


def refuse_unsupported(model: torch.nn.Module, vllm_config: Any) -> None:  # noqa: ANN401 - vLLM's VllmConfig
    """Raises ConfigError, with a remedy, for what this version cannot update right."""
    quantization = vllm_config.model_config.quantization
    config = ascend_config()
    # A configuration of its own; up to 0.13 the setting is in the main one.
    if getattr(getattr(config, "eplb_config", config), "dynamic_eplb", False):
        raise ConfigError(
            "vllm-ascend's expert load balancer moves experts between ranks, so their places are not the "
            "checkpoint's: start the engine without dynamic_eplb"
        )
    mode = nz_mode()
    if mode == 2 or (mode and quantization is not None):
        raise ConfigError(
            f"vllm-ascend keeps weights in the FRACTAL_NZ format (weight_nz_mode={mode}), into which no "
            f"checkpoint's tensor can be copied: {_NZ_REMEDY}"
        )
    blocked = [name for name, parameter in model.named_parameters() if _is_blocked(parameter)]
    if blocked:
        raise ConfigError(
            f"{len(blocked)} parameters are in the FRACTAL_NZ format, {blocked[0]} among them (310P always "
            f"does that, fused MC2 to experts): {_NZ_REMEDY}, without enable_fused_mc2"
        )
    if has_layerwise_reload():
        _refuse_disposed(model)
        return
    what = "quantised weights" if quantization is not None else ""
    if any(name.endswith(("w13_weight", "w2_weight")) for name, _ in model.named_parameters()):
        what = "experts"
    if what:
        raise ConfigError(
            f"post-processing transposes and packs {what}, and this vLLM cannot give its layers fresh "
            "tensors: use one with vllm.model_executor.model_loader.reload"
        )


def _refuse_disposed(model: torch.nn.Module) -> None:
    """What a layer threw away once it had made something else of it has no place that a reload could fill."""
    layerwise = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")
    for path, module in model.named_modules():
        parameters, _ = layerwise.get_layerwise_info(module).restore_metadata
        for name, wanted in parameters.items():
            held = module._parameters.get(name, wanted)
            if wanted.numel() and (held is None or not held.numel()):
                freed = ".".join(filter(None, (path, name)))
                raise ConfigError(
                    f"vllm-ascend has freed {freed} after it had made others of it (as with MLA's and SFA's "
                    "projections), which a reload cannot make anew: start the engine without the option that "
                    "frees it, or restart it with the new weights"
                )


def refuse_asleep(worker: Any) -> None:  # noqa: ANN401 - vllm-ascend's NPUWorker
    """Raises ConfigError where the memory of the weights has been given back (vLLM's sleep): a write to it
    would end the worker. vllm-ascend's allocator does not say so; what it keeps until then does."""
    held = weights_of("vllm_ascend.device_allocator.camem", "CaMemAllocator")
    offloaded = any(data.cpu_backup_tensor is not None for data in held)
    if offloaded or getattr(worker, "_sleep_saved_buffers", None):
        raise asleep()


def nz_mode() -> int:
    """vllm-ascend's weight_nz_mode: 0 off, 1 quantised weights, 2 all."""
    mode = getattr(ascend_config(), "weight_nz_mode", None)
    return int(os.environ.get("VLLM_ASCEND_ENABLE_NZ", "1") if mode is None else mode)


def ascend_config() -> object:
    """vllm-ascend's own configuration; None where this version has none, or has not set it up."""
    try:
        found: object = importlib.import_module("vllm_ascend.ascend_config").get_ascend_config()
    except (ImportError, RuntimeError):
        return None
    return found


def _is_blocked(parameter: torch.Tensor) -> bool:
    get_format = getattr(importlib.import_module("torch_npu"), "get_npu_format", None)
    return get_format is not None and parameter.device.type == "npu" and get_format(parameter) == FRACTAL_NZ
