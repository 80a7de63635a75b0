"""What a checkpoint is loaded from: every tensor's one source, from the headers of all files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ckpt_engine.checkpoint.index import FileSelection
from ckpt_engine.checkpoint.npy_file import NPY_SUFFIX, read_npy_header
from ckpt_engine.checkpoint.packing import TensorSpec
from ckpt_engine.checkpoint.safetensors_header import (
    HeaderEntry,
    SafetensorsHeader,
    read_header_unless_empty,
)
from ckpt_engine.checkpoint.tensor_copies import tensor_spec
from ckpt_engine.checkpoint.tensor_shards import Selected, ShardedTensor, assemble
from ckpt_engine.errors import CheckpointFormatError, ConfigError

FileSource = str | os.PathLike[str] | FileSelection
"""A `.safetensors` or `.npy` file, or some of its tensors."""


Places = Callable[[str], torch.Tensor]
"""A tensor's name -> its place in host memory: a contiguous tensor of its dtype and shape."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """Tensors that are brought once there is a place for them: `bring(places, done)` fills all of it, and
    calls `done` with bytes that are there."""

    specs: Sequence[TensorSpec]
    bring: Callable[[Places, Callable[[int], object]], None]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor comes from: an entry of a file, shards in several files, a tensor of the caller; where
    there is none of them, from `Incoming`."""

    spec: TensorSpec
    of_file: tuple[SafetensorsHeader, HeaderEntry] | None = None
    tensor: torch.Tensor | None = None
    sharded: ShardedTensor | None = None

    def __str__(self) -> str:
        if self.sharded is not None:
            return str(self.sharded.shards[0].path)
        if self.of_file is None and self.tensor is None:
            return "what is incoming"
        return "named_tensors" if self.of_file is None else str(self.of_file[0].path)


def collect_sources(
    files: Sequence[FileSource] | None,
    named_tensors: Mapping[str, torch.Tensor] | None,
    incoming: Incoming | None = None,
) -> dict[str, Source]:
    """Reads all headers; tensor name -> its one source."""
    if isinstance(files, (str, bytes, os.PathLike, FileSelection)):
        raise ConfigError(f"files={files!r}: give a list of files")
    if named_tensors is not None and not isinstance(named_tensors, Mapping):
        raise ConfigError(
            f"named_tensors is a {type(named_tensors).__name__}: give a mapping of names to tensors"
        )
    sources: dict[str, Source] = {}

    def add(source: Source) -> None:
        first = sources.setdefault(source.spec.name, source)
        if first is not source:
            raise CheckpointFormatError(
                f"tensor {source.spec.name!r} is there twice: in {first} and in {source}"
            )

    shards: list[Selected] = []
    for selection in map(_selection, files or ()):
        if selection.path.suffix == NPY_SUFFIX:
            shards.append(_of_shards(selection))
            continue
        for header, entry in _of_safetensors(selection):
            spec = TensorSpec(entry.name, entry.dtype, entry.shape, entry.nbytes)
            add(Source(spec, of_file=(header, entry)))
    for sharded in assemble(shards):
        spec = TensorSpec(sharded.name, sharded.dtype, sharded.shape, sharded.nbytes)
        add(Source(spec, sharded=sharded))
    for name, tensor in (named_tensors or {}).items():
        add(Source(tensor_spec(name, tensor), tensor=tensor))
    for spec in incoming.specs if incoming is not None else ():
        add(Source(spec))
    return sources


def _selection(file: FileSource) -> FileSelection:
    if isinstance(file, FileSelection):
        return file
    if not isinstance(file, (str, os.PathLike)):
        raise ConfigError(f"files: {file!r} is neither a path nor a FileSelection")
    return FileSelection(Path(file))


def _of_safetensors(selection: FileSelection) -> list[tuple[SafetensorsHeader, HeaderEntry]]:
    header = read_header_unless_empty(selection.path)
    entries = header.tensors if header is not None else ()
    _check_has(selection, entries)
    if header is None:
        return []
    return [(header, entry) for entry in entries if selection.names is None or entry.name in selection.names]


def _of_shards(selection: FileSelection) -> Selected:
    header = read_npy_header(selection.path)
    _check_has(selection, header.tensors)
    return header, selection.names


def _check_has(selection: FileSelection, entries: Sequence[HeaderEntry]) -> None:
    lacking = sorted((selection.names or frozenset()) - {entry.name for entry in entries})
    if lacking:
        raise CheckpointFormatError(f"{selection.path}: has no tensor {lacking[0]!r}, which was selected")
