"""Rehearsals of vLLM's models, whose parameters are not in the checkpoint's layout any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.recording import Recording
from ckpt_engine.loading.rehearsal import buckets_of, named_parameters, put_back
from ckpt_engine.loading.rehearsal import rehearse as rehearse_with
from ckpt_engine_vllm.layerwise import some_of_a_drafter


def rehearse(model: torch.nn.Module, tensors: Sequence[TensorLayout]) -> Recording:
    """`loading.rehearsal.rehearse`, a bucket at a time, as the update itself will.

    Args:
        tensors: in the order of the update.
    """
    with some_of_a_drafter():
        return rehearse_with(model, buckets_of(tensors), _without_storage)


@contextmanager
def _without_storage(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Puts tensors without storage, in the checkpoint's layout, in the place of all of the model's. Tied ones
    stand under each of their names, apart."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta, to_meta_tensor

    with put_back(model):
        for module in model.modules():
            restore_layer_on_meta(module, get_layerwise_info(module))
            for registry in (module._parameters, module._buffers):
                for name, tensor in registry.items():
                    if tensor is not None:
                        registry[name] = _unwrapped(to_meta_tensor(tensor))  # type: ignore[assignment]
        yield named_parameters(model)


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with its own weight loader: an earlier reload left a wrapped one, which does nothing now."""
    loader = getattr(tensor, "weight_loader", None)
    while getattr(loader, "__name__", "") == "online_process_loader":
        loader = loader.__wrapped__  # type: ignore[union-attr]
    if loader is not None:
        tensor.weight_loader = loader  # type: ignore[attr-defined]
    return tensor
