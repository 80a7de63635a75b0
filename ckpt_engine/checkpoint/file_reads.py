"""Reads byte ranges of files straight into an arena, in pieces of which each is one `preadv`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

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


class SharedFile:
    """A file that several threads read: opened once, by its first piece, and closed after its last."""

    def __init__(self, path: Path, pieces: int) -> None:
        self.path = path
        self._pieces = pieces
        self._file: FileIO | None = None
        self._lock = threading.Lock()

    def read(self, arena: HostArena, piece: Piece) -> None:
        """Populates the piece's part of the arena and fills it.

        Raises:
            CheckpointFormatError: the file ends too early (it was cut since its header was read).
            CheckpointError: it can no longer be read.
        """
        try:
            for segment in _spans(piece):
                arena.populate(segment.arena_offset, segment.nbytes)
            _fill(self._descriptor(), self.path, arena, piece)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read at byte {piece.segments[0].file_offset}: "
                f"{error.strerror or error}"
            ) from error
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


def _fill(descriptor: int, path: Path, arena: HostArena, piece: Piece) -> None:
    segments = list(piece.segments)
    targets = [arena.memory(segment.arena_offset, segment.nbytes) for segment in segments]
    offset = segments[0].file_offset
    first = 0  # of the targets that are not full yet
    while first < len(targets):
        count = os.preadv(descriptor, targets[first:], offset)
        if count == 0:
            raise CheckpointFormatError(
                f"{path}: truncated while reading tensor {segments[first].tensor!r} (ends at byte {offset})"
            )
        offset += count
        while first < len(targets) and count >= len(targets[first]):
            count -= len(targets[first])
            first += 1
        if count:  # a short read ended inside this one
            targets[first] = targets[first][count:]
