"""Quantised weights: which of vLLM's ways to keep them can be updated. And scales of a quantised KV cache.

Each way has post-processing of its own, and some leave more behind than parameters: a reload is right only
where all of that is made anew. So a layer is updated if its kind was compared, updated and loaded from disk
(`PROVEN`); every other kind is refused by name, while nothing is touched.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch

from ckpt_engine.errors import ConfigError

PROVEN = frozenset(
    {
        ("AutoAWQMarlinLinearMethod", "CPUWNA16LinearKernel"),
        ("AutoGPTQLinearMethod", "CPUWNA16LinearKernel"),
        ("CompressedTensorsW8A8Fp8", "ChannelWiseTorchFP8ScaledMMLinearKernel"),
        ("CompressedTensorsW8A8Int8", "CPUInt8ScaledMMLinearKernel"),
        ("CompressedTensorsWNA16", "CPUWNA16LinearKernel"),
        ("Fp8LinearMethod", "CPUFp8BlockScaledMMKernel"),
        ("Fp8PerBlockOnlineLinearMethod", "CPUFp8BlockScaledMMKernel"),
        ("Fp8PtpcOnlineLinearMethod", "ChannelWiseTorchFP8ScaledMMLinearKernel"),
    }
)
"""vLLM's method (or, of compressed-tensors, its scheme), and the kernel; all of them on CPU. Some run on CUDA
too, where none was compared."""
PASSED_OVER = re.compile(r"\.g_idx$")
"""The order of a GPTQ checkpoint's groups, which vLLM does not read where it is the plain one."""
_SCALES_IN_TENSORS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Attention that reads a cache's scales from memory, or runs in no graph. Others have them in graphs."""


def refuse_unproven(model: torch.nn.Module, quantization: str | None) -> None:
    """Raises ConfigError where a quantised model has a layer whose reload is not known to be right."""
    if quantization is None:
        return
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or type(method).__name__.startswith("Unquantized") or _keeps_scales(module):
            continue
        kind = getattr(module, "scheme", None) or method
        found = (type(kind).__name__, kernel_of(kind))
        device = next((weight.device.type for weight in module.parameters(recurse=False)), "cpu")
        if found not in PROVEN or device != "cpu":
            raise ConfigError(
                f"{name}: updating {quantization} weights of vLLM's {found[0]} with {found[1]} on {device} "
                "is not in this version: restart the engine with the new checkpoint"
            )


def cache_scales(model: torch.nn.Module, parameters: Collection[str]) -> set[str]:
    """Those of a model's parameters, by name, that are scales of its KV cache: a checkpoint may lack them."""
    holders = {name for name, _ in _holders(model)}
    return {name for name in parameters if name.rpartition(".")[0] in holders}


def refuse_baked_scales(model: torch.nn.Module, vllm_config: Any, loaded: Collection[str]) -> None:  # noqa: ANN401
    """Raises ConfigError where new scales of the KV cache would not reach captured CUDA graphs.

    Args:
        loaded: names of the modules that the update has tensors for.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    if vllm_config.model_config.enforce_eager or not mode.has_full_cudagraphs():
        return
    for name, module in _holders(model):
        backend = module.attn_backend.get_name()
        changes = name in loaded or getattr(module, "_k_scale_float", 1.0) != 1.0
        if changes and backend not in _SCALES_IN_TENSORS:
            raise ConfigError(
                f"{name}: {backend} keeps the KV cache's scales in its CUDA graphs: start the engine with "
                "--enforce-eager, or restart it with the new checkpoint"
            )


def default_cache_scales(model: torch.nn.Module) -> None:
    """Gives attention layers the scales that vLLM takes where a checkpoint has none. A reload would leave
    them those of the checkpoint before, or a dummy's."""
    for _, module in _holders(model):
        scales = {key: module._buffers[key] for key in module._buffers if key.endswith("_scale")}
        for scale in scales.values():
            scale.fill_(1)
        with module._k_scale.device:
            module.quant_method.create_weights(module)
            module.quant_method.process_weights_after_loading(module)
        for key, scale in scales.items():
            # Graphs know it by its address.
            module._buffers[key] = scale.copy_(module._buffers[key])


def kernel_of(kind: Any) -> str:  # noqa: ANN401 - vLLM's method or scheme
    """What it computes with, by the names of vLLM's classes."""
    kernels = [value for value in vars(kind).values() if "Kernel" in type(value).__name__]
    # A handler of oneDNN refers to scales by their address, and a reload moves them: wrong answers, no error.
    names = [
        type(kernel).__name__ + (" on oneDNN" if hasattr(kernel, "dnnl_handler") else "")
        for kernel in kernels
    ]
    return " and ".join(sorted(names)) or "no kernel of its own"


def _holders(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if _keeps_scales(module):
            yield name, module


def _keeps_scales(module: torch.nn.Module) -> bool:
    """Whether it is attention that reads a checkpoint's scales for the KV cache."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    return isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)
