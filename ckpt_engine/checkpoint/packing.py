"""Where each tensor lies: pure arithmetic, shared by everything that fills an arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_engine.errors import ConfigError
from ckpt_engine.metadata import TensorMeta, align_up

BUFFER_LIMIT = 4 * 1024**3
"""Most bytes of a host buffer, unless one tensor alone is larger."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its place: `dtype` by torch's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class PackedBuffer:
    """Bytes [start, start + nbytes) of the arena; the tensors' offsets count from `start`."""

    start: int
    nbytes: int
    tensors: tuple[TensorMeta, ...]


def pack(specs: Sequence[TensorSpec], buffer_limit: int = BUFFER_LIMIT) -> tuple[PackedBuffer, ...]:
    """Lays the tensors, sorted by name and aligned to 256 bytes, into consecutive host buffers.

    A buffer has at most max(`buffer_limit`, largest tensor) bytes and begins at a multiple of 256.

    Raises:
        ConfigError: `buffer_limit` is less than 1.
    """
    if buffer_limit < 1:
        raise ConfigError(f"buffer_limit={buffer_limit}: give at least 1 byte")
    limit = max([buffer_limit, *(spec.nbytes for spec in specs)])
    buffers: list[PackedBuffer] = []
    tensors: list[TensorMeta] = []
    start = end = 0  # of the buffer at work; `end` counts from `start`

    def finish() -> None:
        nonlocal tensors, start, end
        buffers.append(PackedBuffer(start, end, tuple(tensors)))
        start, end, tensors = start + align_up(end), 0, []

    for spec in sorted(specs, key=lambda spec: spec.name):
        offset = align_up(end)
        if tensors and offset + spec.nbytes > limit:
            finish()
            offset = 0
        tensors.append(
            TensorMeta(name=spec.name, dtype=spec.dtype, shape=spec.shape, offset=offset, nbytes=spec.nbytes)
        )
        end = offset + spec.nbytes
    if tensors:
        finish()
    return tuple(buffers)
