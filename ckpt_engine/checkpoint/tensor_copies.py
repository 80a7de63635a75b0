"""Copies (snapshots) tensors of the caller into an arena, in pieces that threads do side by side."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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


def tensor_spec(name: object, tensor: object, argument: str = "named_tensors") -> TensorSpec:
    """Checks one item of `named_tensors`, or of another argument.

    Raises:
        ConfigError: the name is not a non-empty string of Unicode, or the value not a tensor.
        CheckpointError: a tensor whose elements cannot be copied as they are.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{argument}: {name!r} is not a tensor's name (a non-empty string)")
    if has_lone_surrogate(name):
        raise ConfigError(f"{argument}: {name!r} has a lone surrogate, which no message could carry")
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError(f"{argument}: {name!r} is a {type(tensor).__name__}, not a torch.Tensor")

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(f"{argument}: tensor {name!r} {problem}")

    if is_traceable_wrapper_subclass(tensor):
        # A DTensor's shape is the whole tensor's, while its memory is one shard.
        raise refuse(
            f"is a {type(tensor).__name__}: give plain tensors (for a DTensor `.full_tensor()`, or "
            "register_state_dict)"
        )
    if tensor.layout is not torch.strided:
        raise refuse(f"has layout {tensor.layout}, only torch.strided is supported")
    if tensor.device.type == "meta":
        raise refuse("is on the meta device: it has no data. Give it some first (to_empty, then weights)")
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

    @property
    def device(self) -> torch.device | None:
        """Where it comes from; None for the CPU."""
        return None if self.source.device.type == "cpu" else self.source.device

    def run(self, arena: HostArena) -> None:
        arena.populate(self.arena_offset, self.nbytes)
        target, source = arena.view(self.arena_offset, self.nbytes), self.source
        if (
            source.is_contiguous()
            and not source.is_conj()  # bits that a copy must still flip
            and not source.is_neg()
        ):
            # Without torch, whose copy starts threads of its own: here every one of ours would.
            ctypes.memmove(target.data_ptr(), source.data_ptr(), self.nbytes)
            return
        with torch.no_grad():  # grad mode is per thread
            target.view(source.dtype).view(source.shape).copy_(source)

    def enqueue(self, arena: HostArena) -> None:
        """Enqueues it on the current stream of its device."""
        target = arena.view(self.arena_offset, self.nbytes)
        with torch.no_grad():
            target.view(self.source.dtype).view(self.source.shape).copy_(self.source, non_blocking=True)


_BATCH_NBYTES = 256 * 1024 * 1024
"""Copies from a device are enqueued this far ahead, twice: it says how far they have come."""


def copy_tasks(
    copies: Iterable[Copy], arena: HostArena, done: Callable[[int], object]
) -> list[Callable[[], None]]:
    """Tasks for threads: one for each copy from the CPU, one for all copies from the same device.

    `done` is called with the bytes of copies that have ended. The arena is populated, and pinned where it is
    to be fast, before a task of a device runs.
    """

    def one(copy: Copy) -> None:
        copy.run(arena)
        done(copy.nbytes)

    tasks: list[Callable[[], None]] = []
    by_device: dict[torch.device, list[Copy]] = {}
    for copy in copies:
        if copy.device is None:
            tasks.append(partial(one, copy))
        else:
            by_device.setdefault(copy.device, []).append(copy)
    # First: threads that copy from the CPU are many, and the bus is to be busy meanwhile.
    return [partial(copy_from_device, part, arena, done) for part in by_device.values()] + tasks


def copy_from_device(copies: Sequence[Copy], arena: HostArena, done: Callable[[int], object]) -> None:
    """Copies from one device, enqueued on a stream of their own, so that the bus is never idle between them
    and no kernel of the caller's waits for them. However it ends, no copy is at work any more.
    """
    device = copies[0].source.device
    module = torch.get_device_module(device)
    stream = module.Stream(device)
    ends: deque[tuple[int, Any]] = deque()

    def wait() -> None:
        nbytes, end = ends.popleft()
        end.synchronize()
        done(nbytes)

    try:
        with module.stream(stream):
            enqueued = 0
            for copy in copies:
                copy.enqueue(arena)
                enqueued += copy.nbytes
                if enqueued >= _BATCH_NBYTES or copy is copies[-1]:
                    ends.append((enqueued, stream.record_event(module.Event(blocking=True))))
                    enqueued = 0
                    if len(ends) > 1:
                        wait()
        while ends:
            wait()
    finally:
        stream.synchronize()


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
