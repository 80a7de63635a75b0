"""Fresh tensors for every layer; arguments kept BY REFERENCE until the layer has them all; then it is
processed, and copied to where the old weights lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vllm.config import get_current_vllm_config


@dataclass
class Info:
    kernel: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    loaded_weights: list[tuple[Any, torch.Tensor]] = field(default_factory=list)
    load_numel: int = 0
    active: bool = False


_INFO: WeakKeyDictionary[torch.nn.Module, Info] = WeakKeyDictionary()


def get_layerwise_info(module: torch.nn.Module) -> Info:
    return _INFO.setdefault(module, Info())


def initialize_layerwise_reload(model: torch.nn.Module) -> None:
    assert get_current_vllm_config() is not None
    for module in model.modules():
        if not hasattr(module, "checkpoint_shape"):
            continue
        info = get_layerwise_info(module)
        assert not info.active, "the last reload was neither finished nor put back"
        info.kernel = dict(module.named_parameters(recurse=False))
        info.active = True
        shape = module.checkpoint_shape
        like = info.kernel["weight"]
        module.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=like.dtype, device=like.device), requires_grad=False
        )


def buffer(module: torch.nn.Module, place: Any, loaded: torch.Tensor) -> bool:
    """Whether the layer is being reloaded, and has taken the tensor."""
    info = get_layerwise_info(module)
    if not info.active:
        return False
    info.loaded_weights.append((place, loaded))
    info.load_numel += loaded.numel()
    if info.load_numel == module.weight.numel():
        _process(module, info)
    return True


def _process(module: torch.nn.Module, info: Info) -> None:
    for place, loaded in info.loaded_weights:
        module.copy_into(place, loaded)
    process = getattr(module, "process", None)
    if process is not None:
        process()
    info.kernel["weight"].copy_(module.weight)
    _put_back(module, info)


def _put_back(module: torch.nn.Module, info: Info) -> None:
    module.weight = info.kernel["weight"]
    _INFO[module] = Info()


def finalize_layerwise_reload(model: torch.nn.Module, model_config: Any) -> None:
    assert get_current_vllm_config().model_config is model_config
    for module in model.modules():
        info = get_layerwise_info(module)
        if not info.active:
            continue
        assert not info.loaded_weights, "a layer is incomplete"
        _put_back(module, info)
