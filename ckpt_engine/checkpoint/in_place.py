"""Which files become host buffers where they are, and where their tensors lie then."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_engine.checkpoint.index import SUFFIX
from ckpt_engine.checkpoint.mapped_file import MappedFile
from ckpt_engine.checkpoint.packing import PackedBuffer
from ckpt_engine.checkpoint.safetensors_header import HeaderEntry, SafetensorsHeader
from ckpt_engine.metadata import TensorMeta

IN_MEMORY = Path("/dev/shm")  # noqa: S108 - not for files of ours: the contract names it
"""Files below it are in memory already, and temporary."""

logger = logging.getLogger(__name__)


def lies_in_memory(path: Path) -> bool:
    """Whether it is a `.safetensors` file below /dev/shm, after its directories' links were followed.

    A link to a file is not one: removing the link would free nothing, and the file may have other readers.
    """
    return path.suffix == SUFFIX and not path.is_symlink() and IN_MEMORY in path.resolve().parents


@dataclass(frozen=True, slots=True)
class Taken:
    """Tensors of one file, by offset, none of them known to be elsewhere."""

    header: SafetensorsHeader
    entries: tuple[HeaderEntry, ...]

    @property
    def begin(self) -> int:
        """The first byte of the file that is needed."""
        return self.entries[0].begin

    def map(self) -> MappedFile:
        """Maps the file from the first to the last of these tensors, with what lies between.

        Raises:
            CheckpointError, CheckpointFormatError: as of `MappedFile`.
        """
        return MappedFile(
            self.header.path,
            self.begin,
            max(entry.end for entry in self.entries),
            file_nbytes=self.header.file_nbytes,
            whole=len(self.entries) == len(self.header.tensors),
        )

    def host_buffers(self, buffer_limit: int) -> tuple[PackedBuffer, ...]:
        """The tensors as they lie, in buffers of at most max(`buffer_limit`, largest tensor) bytes.

        `start` counts from `begin`. Neither buffers nor tensors have any alignment but the file's.
        """
        limit = max([buffer_limit, *(entry.nbytes for entry in self.entries)])
        groups: list[list[HeaderEntry]] = []
        for entry in self.entries:
            if not groups or entry.end - groups[-1][0].begin > limit:
                groups.append([])
            groups[-1].append(entry)
        return tuple(self._buffer(group) for group in groups)

    def _buffer(self, group: Sequence[HeaderEntry]) -> PackedBuffer:
        begin = group[0].begin
        tensors = tuple(
            TensorMeta(
                name=entry.name,
                dtype=entry.dtype,
                shape=entry.shape,
                offset=entry.begin - begin,
                nbytes=entry.nbytes,
            )
            for entry in group
        )
        return PackedBuffer(begin - self.begin, group[-1].end - begin, tensors)


def taken_in_place(chosen: Sequence[tuple[SafetensorsHeader, HeaderEntry]]) -> list[Taken]:
    """Those of the chosen tensors whose files can stay where they are, by file."""
    by_file: dict[Path, tuple[SafetensorsHeader, list[HeaderEntry]]] = {}
    for header, entry in chosen:
        by_file.setdefault(header.path, (header, []))[1].append(entry)
    return [
        Taken(header, tuple(sorted(entries, key=lambda entry: (entry.begin, entry.end))))
        for path, (header, entries) in by_file.items()
        if lies_in_memory(path)
    ]
