"""Copies (snapshots) tensors of the caller into an arena, in pieces that threads do side by side."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckpt_engine.checkpoint.arena import PIECE_NBYTES, HostArena
from ckpt_engine.checkpoint.packing import TensorSpec
from ckpt_engine.errors import CheckpointError, ConfigError
from ckpt_engine.metadata import DTYPE_NBYTES


def has_lone_surrogate(text: str) -> bool:
    """Whether UTF-8, and so every message, cannot carry it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def tensor_spec(name: object, tensor: object) -> TensorSpec:
    """Checks one item of `named_tensors`.

    Raises:
        ConfigError: the name is not a non-empty string of Unicode, or the value not a tensor.
        CheckpointError: a tensor whose elements cannot be copied as they are.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"named_tensors: {name!r} is not a tensor's name (a non-empty string)")
    if has_lone_surrogate(name):
        raise ConfigError(f"named_tensors: {name!r} has a lone surrogate, which no message could carry")
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError(f"named_tensors: {name!r} is a {type(tensor).__name__}, not a torch.Tensor")

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(f"named_tensors: tensor {name!r} {problem}")

    if is_traceable_wrapper_subclass(tensor):
        # A DTensor's shape is the whole tensor's, while its memory is one shard.
        raise refuse(f"is a {type(tensor).__name__}: give plain tensors (for a DTensor, `.full_tensor()`)")
    if tensor.layout is not torch.strided:
        raise refuse(f"has layout {tensor.layout}, only torch.strided is supported")
    if tensor.device.type == "meta":
        raise refuse("is on the meta device: it has no data")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPE_NBYTES:
        raise refuse(f"has dtype {dtype}, supported are {', '.join(sorted(DTYPE_NBYTES))}")
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        # Sharding wrappers free storages this way; a copy from one would read address 0.
        raise refuse("has had its storage freed")
    return TensorSpec(name, dtype, tuple(tensor.shape), tensor.numel() * DTYPE_NBYTES[dtype])


def wait_for_producers(tensors: Iterable[torch.Tensor]) -> None:
    """Waits until what the calling thread has enqueued on its current streams is done.

    The copies run in other threads, whose current stream is another one: without this they could read a
    device tensor before it is computed.
    """
    for device in sorted({tensor.device for tensor in tensors if tensor.device.type != "cpu"}, key=str):
        module = torch.get_device_module(device)
        if hasattr(module, "current_stream"):
            module.current_stream(device).synchronize()
        else:
            module.synchronize()


@dataclass(frozen=True, slots=True)
class Copy:
    """Copies `source` (any strides, any device) to the arena at `arena_offset`, contiguous."""

    source: torch.Tensor
    arena_offset: int
    nbytes: int

    def run(self, arena: HostArena) -> None:
        arena.populate(self.arena_offset, self.nbytes)
        target, source = arena.view(self.arena_offset, self.nbytes), self.source
        if (
            source.device.type == "cpu"
            and source.is_contiguous()
            and not source.is_conj()  # bits that a copy must still flip
            and not source.is_neg()
        ):
            # Without torch, whose copy starts threads of its own: here every one of ours would.
            ctypes.memmove(target.data_ptr(), source.data_ptr(), self.nbytes)
            return
        with torch.no_grad():  # grad mode is per thread
            target.view(source.dtype).view(source.shape).copy_(source)


def cut_copies(tensor: torch.Tensor, arena_offset: int) -> Iterator[Copy]:
    """Cuts a tensor into copies of about 16 MiB, or of one row of its first dimension if that is more."""
    if tensor.numel() == 0:
        return
    tensor = tensor.detach()
    if tensor.is_contiguous():
        tensor = tensor.view(-1)  # rows of one element: any piece can be cut
    elif tensor.dim() == 0:
        tensor = tensor.reshape(1)
    row_nbytes = tensor[0].numel() * tensor.element_size()
    rows = max(1, PIECE_NBYTES // row_nbytes)
    for begin in range(0, tensor.shape[0], rows):
        part = tensor[begin : begin + rows]
        yield Copy(part, arena_offset + begin * row_nbytes, part.shape[0] * row_nbytes)
