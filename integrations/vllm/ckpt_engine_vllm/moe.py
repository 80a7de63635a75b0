"""The experts of a mixture-of-experts model on CPU, which vLLM packs for its kernels when it starts, and
forgets to pack again when it reloads (seen on 0.32.0: wrong answers, no error)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ckpt_engine.errors import ConfigError


def refuse_unknown_packing(model: torch.nn.Module) -> None:
    """Raises ConfigError where experts are packed in a way that this version cannot repeat."""
    for name, experts in ((name, experts) for name, _, experts in _packed(model)):
        if not any(kind.__name__ == "CPUUnquantizedExperts" for kind in type(experts).__mro__):
            raise ConfigError(
                f"{name}: experts of kind {type(experts).__name__} are not updated in place in this version: "
                "restart the engine with the new checkpoint"
            )
        size = experts.moe_config.intermediate_size_per_partition
        padded = experts._padded_intermediate_size(experts.moe_config)
        if size != padded:
            raise ConfigError(
                f"{name}: its experts' intermediate size of {size} on each rank is padded to {padded}, which "
                "vLLM cannot reload: choose another tensor parallel size, or restart the engine with the new "
                "checkpoint"
            )


def pack_experts(model: torch.nn.Module, loaded: set[str]) -> None:
    """Packs the experts of the modules named in `loaded`, in place, as vLLM does when it starts."""
    for name, layer, experts in _packed(model):
        if name in loaded:
            from vllm._custom_ops import cpu_prepack_moe_weight  # not in all builds

            for weight in (layer.w13_weight, layer.w2_weight):
                weight.data.copy_(cpu_prepack_moe_weight(weight.data, experts.isa))


def _packed(model: torch.nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Name, module and kernel of the expert layers whose kernel packs their weights."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for name, module in model.named_modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if experts is not None and not getattr(experts, "_use_zentorch", False):
            yield name, module, experts
