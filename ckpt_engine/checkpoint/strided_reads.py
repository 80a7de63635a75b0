"""Reads shards of tensors to where they lie among the others' in the arena.

A shard is contiguous in its file. In the arena, unless it is cut along the first dimension, it is many runs
with the other shards' runs between them. Long runs are the targets of one `preadv`; short ones go through a
small buffer that stays in the processor's cache, since each target of a read costs more than they would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from ckpt_engine.checkpoint.arena import PIECE_NBYTES, HostArena
from ckpt_engine.checkpoint.file_reads import (
    MAX_IOVECS,
    FilePiece,
    Segment,
    cannot_be_read,
    cut_pieces,
    read_into,
)
from ckpt_engine.checkpoint.tensor_shards import ShardedTensor, chunks_of
from ckpt_engine.errors import CheckpointFormatError

_SEGMENT_NBYTES = 1024 * 1024
"""Runs from this size on are read like whole tensors; below, thousands of them would each cost an object."""
_DIRECT_NBYTES = 8 * 1024
"""Runs from this size on are targets of `preadv`."""
_SCRATCH_NBYTES = 512 * 1024
"""About what a core's second-level cache holds."""


@dataclass(frozen=True, slots=True)
class StridedPiece:
    """`count` runs of `run_nbytes`, contiguous in the file, `stride` bytes apart in the arena."""

    tensor: str
    file_offset: int
    arena_offset: int
    run_nbytes: int
    stride: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.run_nbytes

    def read(self, descriptor: int, path: Path, arena: HostArena) -> None:
        span = (self.count - 1) * self.stride + self.run_nbytes
        arena.populate(self.arena_offset, span)
        memory = arena.memory(self.arena_offset, span)
        done = (
            self._direct(descriptor, memory)
            if self.run_nbytes >= _DIRECT_NBYTES
            else self._copied(descriptor, memory)
        )
        if not done:
            raise CheckpointFormatError(f"{path}: truncated while reading tensor {self.tensor!r}")

    def _direct(self, descriptor: int, memory: memoryview) -> bool:
        for first in range(0, self.count, MAX_IOVECS):
            runs = range(first, min(first + MAX_IOVECS, self.count))
            targets = [memory[run * self.stride : run * self.stride + self.run_nbytes] for run in runs]
            if read_into(descriptor, targets, self.file_offset + first * self.run_nbytes) < len(targets):
                return False
        return True

    def _copied(self, descriptor: int, memory: memoryview) -> bool:
        at_once = max(1, _SCRATCH_NBYTES // self.run_nbytes)
        scratch = np.empty(at_once * self.run_nbytes, np.uint8)
        # The widest element that fits all of it: a run of one bfloat16 is one assignment, not two.
        width = math.gcd(self.run_nbytes, self.stride, self.arena_offset, 8)
        kind = np.dtype(f"u{width}")
        for first in range(0, self.count, at_once):
            runs = min(at_once, self.count - first)
            source = scratch[: runs * self.run_nbytes]
            if not read_into(descriptor, [source.data], self.file_offset + first * self.run_nbytes):
                return False
            target: np.ndarray[tuple[int, int], np.dtype[np.uint8]] = np.ndarray(
                (runs, self.run_nbytes // width), kind, memory, first * self.stride, (self.stride, width)
            )
            target[:] = source.view(kind).reshape(target.shape)
        return True


@dataclass(frozen=True, slots=True)
class ReplicaCheck:
    """Compares bytes of a shard with those of its replica in another file."""

    tensor: str
    one: Path
    other: Path
    one_offset: int
    other_offset: int
    nbytes: int

    def run(self) -> None:
        """Raises:
        CheckpointFormatError: they differ, or a file ends too early.
        CheckpointError: one can no longer be read.
        """
        size = min(self.nbytes, _SCRATCH_NBYTES)
        first, second = np.empty(size, np.uint8), np.empty(size, np.uint8)
        with _opened(self.one) as one, _opened(self.other) as other:
            for begin in range(0, self.nbytes, size):
                count = min(size, self.nbytes - begin)
                _read(one, self.one, self.tensor, first[:count].data, self.one_offset + begin)
                _read(other, self.other, self.tensor, second[:count].data, self.other_offset + begin)
                if not np.array_equal(first[:count], second[:count]):
                    raise CheckpointFormatError(
                        f"tensor {self.tensor!r}: its bytes in {self.one} are others than in {self.other}, "
                        "which should be the same"
                    )


def pieces_of(tensor: ShardedTensor, place: int) -> Iterator[tuple[Path, list[Segment], list[FilePiece]]]:
    """What to read of each shard's file for a tensor at byte `place` of the arena.

    Segments are to be cut into pieces together with all others of that file.
    """
    for chunks in chunks_of(tensor, place):
        if chunks.count == 1 or chunks.nbytes >= _SEGMENT_NBYTES:
            segments = [
                Segment(
                    tensor.name,
                    chunks.file_offset + run * chunks.nbytes,
                    chunks.offset + run * chunks.stride,
                    chunks.nbytes,
                )
                for run in range(chunks.count)
            ]
            yield chunks.path, segments, []
            continue
        # By what they span in the arena, which is what a task has to populate.
        at_once = max(1, PIECE_NBYTES // chunks.stride)
        yield (
            chunks.path,
            [],
            [
                StridedPiece(
                    tensor.name,
                    chunks.file_offset + first * chunks.nbytes,
                    chunks.offset + first * chunks.stride,
                    chunks.nbytes,
                    chunks.stride,
                    min(at_once, chunks.count - first),
                )
                for first in range(0, chunks.count, at_once)
            ],
        )


def file_pieces(places: Iterable[tuple[ShardedTensor, int]]) -> dict[Path, list[FilePiece]]:
    """Every file's pieces, for the tensors and their places in the arena."""
    segments: dict[Path, list[Segment]] = {}
    pieces: dict[Path, list[FilePiece]] = {}
    for tensor, place in places:
        for path, whole, strided in pieces_of(tensor, place):
            segments.setdefault(path, []).extend(whole)
            pieces.setdefault(path, []).extend(strided)
    for path, whole in segments.items():
        pieces[path].extend(cut_pieces(whole))
        pieces[path].sort(key=lambda piece: piece.file_offset)
    return {path: found for path, found in pieces.items() if found}


def replica_checks(tensor: ShardedTensor) -> Iterator[ReplicaCheck]:
    """Checks of 16 MiB at most, for threads to make."""
    for one, other in tensor.replicas:
        for begin in range(0, one.entry.nbytes, PIECE_NBYTES):
            nbytes = min(PIECE_NBYTES, one.entry.nbytes - begin)
            yield ReplicaCheck(
                tensor.name, one.path, other.path, one.entry.begin + begin, other.entry.begin + begin, nbytes
            )


def _opened(path: Path) -> FileIO:
    try:
        return FileIO(path, "rb")
    except OSError as error:
        raise cannot_be_read(path, 0, error) from error


def _read(file: FileIO, path: Path, tensor: str, target: memoryview, offset: int) -> None:
    try:
        filled = read_into(file.fileno(), [target], offset)
    except OSError as error:
        raise cannot_be_read(path, offset, error) from error
    if not filled:
        raise CheckpointFormatError(f"{path}: truncated while reading tensor {tensor!r}")
