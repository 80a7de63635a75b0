"""A bucket's tensors as views of the ring: one call of torch for each, since a checkpoint may have many."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import torch

from ckpt_engine.errors import ProtocolError
from ckpt_engine.ipc.messages import BucketLayout, TensorLayout


class RingBytes(Protocol):
    nbytes: int

    def view(self, offset: int, nbytes: int) -> torch.Tensor: ...


class RingViews:
    """Views of one ring; `close` drops what they share, so that the ring can be unmapped."""

    def __init__(self, ring: RingBytes) -> None:
        self._ring = ring
        self._typed: dict[str, torch.Tensor] = {}

    def tensors_of(self, bucket: BucketLayout) -> list[tuple[str, torch.Tensor]]:
        """`[(name, tensor), ...]`, shapes as in the checkpoint.

        Raises:
            ProtocolError: a tensor's bytes are not those of its dtype and shape.
        """
        # No comprehension: it would close over views of the ring. See clear_frames.
        tensors = []
        with _collector_at_rest():
            for layout in bucket.tensors:
                start = bucket.ring_offset + layout.offset
                itemsize, strides, nbytes = _contiguous(layout.dtype, layout.shape)
                if nbytes != layout.nbytes or start % itemsize:
                    raise _unlike(layout, start)
                whole = self._typed.get(layout.dtype)
                if whole is None:
                    whole = self._whole(layout.dtype, itemsize)
                tensors.append((layout.name, whole.as_strided(layout.shape, strides, start // itemsize)))
        return tensors

    def _whole(self, dtype: str, itemsize: int) -> torch.Tensor:
        data = self._ring.view(0, self._ring.nbytes // itemsize * itemsize)
        whole = self._typed[dtype] = data.view(getattr(torch, dtype))
        return whole

    def close(self) -> None:
        self._typed.clear()


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Tens of thousands of new objects, none of them garbage, would make Python's collector look at them a
    hundred times, and now and then at all of the engine's."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@lru_cache(maxsize=4096)
def _contiguous(dtype: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], int]:
    """Bytes of an element, strides in elements, bytes of all."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or any(size < 0 for size in shape):
        raise ProtocolError(f"no tensor is of dtype {dtype!r} and shape {shape}")
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return kind.itemsize, tuple(reversed(strides)), math.prod(shape) * kind.itemsize


def _unlike(layout: TensorLayout, start: int) -> ProtocolError:
    return ProtocolError(
        f"tensor {layout.name!r}: {layout.nbytes} bytes at byte {start} of the ring are no {layout.dtype} of "
        f"shape {layout.shape}"
    )
