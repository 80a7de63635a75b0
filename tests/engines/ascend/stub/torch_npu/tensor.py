"""Tensors on `npu:i`: a wrapper whose bytes are a CPU tensor's. Copies are work on a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from torch_npu import memory, npu
from torch_npu.streams import current_stream

_LIBRARY: list[torch.library.Library] = []


class NpuTensor(torch.Tensor):
    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor, index: int) -> NpuTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device("npu", index),
        )
        made.raw = raw
        # Alive as long as any view of it.
        made.segment = memory.segment_of(raw)
        return made

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def __repr__(self) -> str:
        return f"NpuTensor({tuple(self.shape)}, {self.device})"

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            return _copy(args[0], args[1])
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            return _to_device(args[0], kwargs)
        index = next(arg.device.index for arg in tree_map_list(args, kwargs) if isinstance(arg, NpuTensor))
        if not func.is_view:
            current_stream().synchronize()
        out = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
        if func.name().split(".")[0].endswith("_") and isinstance(args[0], NpuTensor):
            return args[0]
        return tree_map(
            lambda value: NpuTensor(value, index) if isinstance(value, torch.Tensor) else value, out
        )


def tree_map_list(*trees: Any) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(trees))


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, NpuTensor) else value


def _copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """On the stream between device tensors; from and to the host it has happened on return."""
    to, of = _raw(target), _raw(source)

    def run() -> bool:
        to.copy_(of)
        return True

    current_stream().enqueue(run)
    if not (isinstance(target, NpuTensor) and isinstance(source, NpuTensor)):
        current_stream().synchronize()
    return target


def _to_device(source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    device = torch.device(kwargs["device"])
    dtype = kwargs.get("dtype") or source.dtype
    target = torch.empty(source.shape, dtype=dtype, device=device)
    return _copy(target, source)


def _empty(
    size: Sequence[int], dtype: Any = None, layout: Any = None, device: Any = None, *rest: Any, **more: Any
) -> NpuTensor:
    dtype = dtype or torch.get_default_dtype()
    index = device.index if device is not None and device.index is not None else npu.current_device()
    npu._lazy_init()
    count = torch.Size(size).numel()
    raw = memory.allocate(npu.visible()[index], count * dtype.itemsize)
    return NpuTensor(raw[: count * dtype.itemsize].view(dtype).view(tuple(size)), index)


def _empty_strided(size: Sequence[int], stride: Sequence[int], **kwargs: Any) -> NpuTensor:
    return _empty(size, **kwargs)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return _copy(target, source)


def install() -> None:
    """Registers what makes tensors on the device."""
    library = torch.library.Library("aten", "IMPL")
    makers: dict[str, Callable[..., torch.Tensor]] = {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "_copy_from": _copy_from,
    }
    for name, maker in makers.items():
        library.impl(name, maker, "PrivateUse1")
    _LIBRARY.append(library)
