"""Post-processing, as vLLM does it after a plain load: every layer that has something to do."""

from __future__ import annotations

from typing import Any

import torch

from vllm.config import get_current_vllm_config


def process_weights_after_loading(
    model: torch.nn.Module, model_config: Any, target_device: torch.device
) -> None:
    assert get_current_vllm_config().model_config is model_config
    assert target_device.type == "npu"
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
