"""A layer's tensors without storage, in the checkpoint's layout."""

from __future__ import annotations

import torch

from vllm.model_executor.model_loader.reload.layerwise import Info


def to_meta_tensor(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
    made = torch.nn.Parameter(made, requires_grad=False)
    made.__dict__.update(tensor.__dict__)
    return made


def restore_layer_on_meta(layer: torch.nn.Module, info: Info) -> None:
    for name, tensor in info.restore_metadata[0].items():
        layer.register_parameter(name, to_meta_tensor(tensor))
