"""How torch_npu exports a tensor: 15 fields, and the function that takes them."""

from __future__ import annotations

import os
from typing import Any

import torch

from torch_npu import memory, npu
from torch_npu.tensor import NpuTensor


def rebuild_npu_tensor(
    tensor_cls: type,
    tensor_size: torch.Size,
    tensor_stride: tuple[int, ...],
    tensor_offset: int,
    storage_cls: type,
    dtype: torch.dtype,
    storage_device: int,
    storage_handle: bytes,
    storage_size_bytes: int,
    storage_offset_bytes: int,
    requires_grad: bool,
    ref_counter_handle: bytes,
    ref_counter_offset: int,
    event_handle: bytes,
    event_sync_required: bool,
) -> torch.Tensor:
    assert storage_cls is torch.storage.TypedStorage
    npu._lazy_init()
    raw = memory.map_shared(
        storage_device,
        storage_handle,
        storage_size_bytes,
        storage_offset_bytes,
        ref_counter_handle,
        ref_counter_offset,
        event_handle,
        event_sync_required,
    )
    typed = raw.view(dtype).as_strided(tensor_size, tensor_stride, tensor_offset)
    made = NpuTensor(typed, storage_device)
    return torch.nn.Parameter(made, requires_grad) if tensor_cls is torch.nn.Parameter else made


def _npu_reduce_tensor(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    assert isinstance(tensor, NpuTensor)
    if "expandable_segments:True" in os.environ.get("PYTORCH_NPU_ALLOC_CONF", ""):
        raise RuntimeError("cannot share expandable memory via IPC")
    device, handle, nbytes, offset, counter, counter_offset, event, sync = memory.share(
        tensor.raw, tensor.device.index
    )
    return rebuild_npu_tensor, (
        torch.Tensor,
        tensor.size(),
        tensor.stride(),
        tensor.storage_offset(),
        torch.storage.TypedStorage,
        tensor.dtype,
        device,
        handle,
        nbytes,
        offset,
        tensor.requires_grad,
        counter,
        counter_offset,
        event,
        sync,
    )
