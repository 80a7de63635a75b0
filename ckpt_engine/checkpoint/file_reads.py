"""Reads byte ranges of files straight into an arena, in pieces of which each is one `preadv`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

from ckpt_engine.checkpoint.arena import PIECE_NBYTES, HostArena
from ckpt_engine.errors import CheckpointError, CheckpointFormatError

MAX_IOVECS = 1024
"""Most buffers that Linux takes in one `preadv` (IOV_MAX)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes of one tensor: where they are in the file, and where they go in the arena."""

    tensor: str
    file_offset: int
    arena_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Segments that follow each other in the file without a gap; at most 16 MiB and 1024 of them."""

    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    @property
    def file_offset(self) -> int:
        return self.segments[0].file_offset

    def read(self, descriptor: int, path: Path, arena: HostArena) -> None:
        for segment in _spans(self):
            arena.populate(segment.arena_offset, segment.nbytes)
        targets = [arena.memory(segment.arena_offset, segment.nbytes) for segment in self.segments]
        filled = read_into(descriptor, targets, self.file_offset)
        if filled < len(targets):
            raise CheckpointFormatError(
                f"{path}: truncated while reading tensor {self.segments[filled].tensor!r}"
            )


def cut_pieces(segments: Iterable[Segment]) -> list[Piece]:
    """Sorts the segments by file offset and cuts them into pieces; segments of 0 bytes are dropped."""
    pieces: list[Piece] = []
    current: list[Segment] = []
    nbytes = end = 0  # of the piece at work
    for segment in sorted(segments, key=lambda segment: segment.file_offset):
        done = 0
        while done < segment.nbytes:
            begin = segment.file_offset + done
            if current and (begin != end or nbytes == PIECE_NBYTES or len(current) == MAX_IOVECS):
                pieces.append(Piece(tuple(current)))
                current, nbytes = [], 0
            part = min(segment.nbytes - done, PIECE_NBYTES - nbytes)
            current.append(Segment(segment.tensor, begin, segment.arena_offset + done, part))
            done, nbytes, end = done + part, nbytes + part, begin + part
    if current:
        pieces.append(Piece(tuple(current)))
    return pieces


class FilePiece(Protocol):
    """Bytes of one file that one task reads, from `file_offset` on."""

    @property
    def file_offset(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def read(self, descriptor: int, path: Path, arena: HostArena) -> None:
        """Populates its part of the arena and fills it; CheckpointFormatError where the file ends before."""
        ...


class SharedFile:
    """A file that several threads read: opened once, by its first piece, and closed after its last."""

    def __init__(self, path: Path, pieces: int) -> None:
        self.path = path
        self._pieces = pieces
        self._file: FileIO | None = None
        self._lock = threading.Lock()

    def read(self, arena: HostArena, piece: FilePiece) -> None:
        """Populates the piece's part of the arena and fills it.

        Raises:
            CheckpointFormatError: the file ends too early (it was cut since its header was read).
            CheckpointError: it can no longer be read.
        """
        try:
            piece.read(self._descriptor(), self.path, arena)
        except OSError as error:
            raise cannot_be_read(self.path, piece.file_offset, error) from error
        finally:
            with self._lock:
                self._pieces -= 1
                if self._pieces == 0:
                    self._close()

    def close(self) -> None:
        """Closes it early; only once no thread reads any more."""
        with self._lock:
            self._close()

    def _descriptor(self) -> int:
        with self._lock:
            if self._file is None:
                self._file = FileIO(self.path, "rb")
            return self._file.fileno()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _spans(piece: Piece) -> Iterable[Segment]:
    """The piece's parts of the arena, neighbours joined: names in order lie side by side, nearly."""
    spans: list[Segment] = []
    for segment in sorted(piece.segments, key=lambda segment: segment.arena_offset):
        last = spans[-1] if spans else None
        # A page apart at most: the padding between belongs to the arena as well.
        if last and segment.arena_offset - (last.arena_offset + last.nbytes) < 4096:
            nbytes = segment.arena_offset + segment.nbytes - last.arena_offset
            spans[-1] = Segment(last.tensor, last.file_offset, last.arena_offset, nbytes)
        else:
            spans.append(segment)
    return spans


def read_into(descriptor: int, targets: Sequence[memoryview], offset: int) -> int:
    """Fills the targets (at most 1024) in turn from byte `offset` on; how many are full: all, unless the
    file ends before.
    """
    left = list(targets)
    first = 0  # of those that are not full yet
    while first < len(left):
        count = os.preadv(descriptor, left[first:], offset)
        if count == 0:
            break
        offset += count
        while first < len(left) and count >= len(left[first]):
            count -= len(left[first])
            first += 1
        if count:  # a short read ended inside this one
            left[first] = left[first][count:]
    return first


def cannot_be_read(path: Path, offset: int, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read at byte {offset}: {error.strerror or error}")
