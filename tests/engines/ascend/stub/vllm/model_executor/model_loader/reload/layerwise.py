"""Fresh tensors for every layer; arguments kept BY REFERENCE until the layer has them all; then it is
processed, and copied to where the old weights lie."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vllm.config import get_current_vllm_config


@dataclass
class Info:
    restore_metadata: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    """Parameters, buffers."""
    restore_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kernel_tensors: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    loaded_weights: list[tuple[str, inspect.BoundArguments]] = field(default_factory=list)
    load_numel: int = 0
    active: bool = False


_INFO: WeakKeyDictionary[torch.nn.Module, Info] = WeakKeyDictionary()


def get_layerwise_info(layer: torch.nn.Module) -> Info:
    return _INFO.setdefault(layer, Info())


def record_metadata_for_reloading(model: torch.nn.Module) -> None:
    """When the model has been made, before any weight is processed."""
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    for module in model.modules():
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        info = get_layerwise_info(module)
        info.restore_metadata = ({name: to_meta_tensor(p) for name, p in parameters.items()}, {})
        info.restore_device = next((p.device for p in parameters.values()), torch.device("cpu"))


def initialize_layerwise_reload(model: torch.nn.Module) -> None:
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta

    assert get_current_vllm_config() is not None
    for module in model.modules():
        info = get_layerwise_info(module)
        assert not info.active, "the last reload was neither finished nor put back"
        if not info.restore_metadata[0]:
            continue
        info.kernel_tensors = dict(module.named_parameters(recurse=False))
        info.active = True
        restore_layer_on_meta(module, info)
        for name, parameter in module.named_parameters(recurse=False):
            parameter.weight_loader = _wrapped(module, name, parameter.weight_loader)


def _wrapped(module: torch.nn.Module, name: str, loader: Any) -> Any:
    signature = inspect.signature(loader)

    @wraps(loader, assigned=("__doc__", "__annotations__"))
    def online_process_loader(*args: Any, **kwargs: Any) -> None:
        info = get_layerwise_info(module)
        if not info.active:
            return  # the layer is complete: too much was loaded
        bound = signature.bind(*args, **kwargs)
        info.loaded_weights.append((name, bound))
        loader(*args, **kwargs)  # on tensors without storage, which counts
        info.load_numel += bound.arguments["loaded"].numel()
        if info.load_numel >= sum(p.numel() for p in module.parameters(recurse=False)):
            _process(module, info)

    return online_process_loader


def _process(module: torch.nn.Module, info: Info) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        made = torch.empty(tuple(parameter.shape), dtype=parameter.dtype, device=info.restore_device)
        made = torch.nn.Parameter(made, requires_grad=False)
        made.weight_loader = parameter.weight_loader.__wrapped__
        module.register_parameter(name, made)
    for name, bound in info.loaded_weights:
        bound.arguments["parameter"] = getattr(module, name)
        getattr(module, name).weight_loader(*bound.args, **bound.kwargs)
    method = getattr(module, "quant_method", None)
    if method is not None:
        method.process_weights_after_loading(module)
    for name, parameter in info.kernel_tensors.items():
        parameter.data.copy_(getattr(module, name))
    _put_back(module, info)


def _put_back(module: torch.nn.Module, info: Info) -> None:
    for name, parameter in info.kernel_tensors.items():
        module.register_parameter(name, parameter)
    _INFO[module] = Info(restore_metadata=info.restore_metadata, restore_device=info.restore_device)


def finalize_layerwise_reload(model: torch.nn.Module, model_config: Any) -> None:
    assert get_current_vllm_config().model_config is model_config
    for module in model.modules():
        info = get_layerwise_info(module)
        if info.active:
            assert not info.loaded_weights, "a layer is incomplete"
            _put_back(module, info)
