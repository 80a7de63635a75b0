"""Loads a checkpoint's sources (files, tensors) into one host arena, straight to their final places."""

from __future__ import annotations

import os
import threading
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ckpt_engine.checkpoint.arena import HostArena, default_threads
from ckpt_engine.checkpoint.file_reads import Segment, SharedFile, cut_pieces
from ckpt_engine.checkpoint.index import FileSelection
from ckpt_engine.checkpoint.packing import BUFFER_LIMIT, TensorSpec, pack
from ckpt_engine.checkpoint.safetensors_header import HeaderEntry, read_header_unless_empty
from ckpt_engine.checkpoint.tensor_copies import cut_copies, tensor_spec, wait_for_producers
from ckpt_engine.errors import CheckpointFormatError, ConfigError
from ckpt_engine.metadata import HostBufferMeta

FileSource = str | os.PathLike[str] | FileSelection
"""A `.safetensors` file, or some of its tensors."""


@dataclass(frozen=True, slots=True)
class HostCheckpoint:
    """One rank's share of a checkpoint in host memory.

    `epoch`: a uuid (hex) that no other arena, of this name or another, shares. `buffers`: in the order in
    which they lie in `arena`, each one's tensors sorted by name; addresses are this process's.
    """

    name: str
    epoch: str
    arena: HostArena
    buffers: tuple[HostBufferMeta, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the padding between them (the arena's are `arena.nbytes`)."""
        return sum(tensor.nbytes for buffer in self.buffers for tensor in buffer.tensors)

    def view(self, buffer_index: int, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes [offset, offset + nbytes) of a host buffer: a 1-D uint8 tensor that shares the memory.

        Raises:
            ConfigError: not inside that buffer.
            CheckpointError: the checkpoint is closed.
        """
        if not 0 <= buffer_index < len(self.buffers):
            raise ConfigError(f"checkpoint {self.name!r} has no host buffer {buffer_index}")
        buffer = self.buffers[buffer_index]
        if not 0 <= offset <= offset + nbytes <= buffer.nbytes:
            raise ConfigError(
                f"bytes {offset} .. {offset + nbytes} are not inside host buffer {buffer_index} "
                f"of checkpoint {self.name!r} ({buffer.nbytes} bytes)"
            )
        return self.arena.view(buffer.address - self.arena.address + offset, nbytes)

    def close(self) -> None:
        """Lets go of the arena; its memory is freed with the last view. Idempotent."""
        self.arena.close()


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor comes from: an entry of a file, or a tensor of the caller."""

    spec: TensorSpec
    path: Path | None = None
    entry: HeaderEntry | None = None
    tensor: torch.Tensor | None = None

    def __str__(self) -> str:
        return "named_tensors" if self.path is None else str(self.path)


def load(
    name: str,
    files: Sequence[FileSource] | None = None,
    named_tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    threads: int | None = None,
    huge_pages: bool | None = None,
    buffer_limit: int = BUFFER_LIMIT,
) -> HostCheckpoint:
    """Loads files and copies tensors (of any device and strides) into a new arena.

    No sources at all make an empty share. `threads`: default min(16, 2 * CPUs). `huge_pages`: as of
    `HostArena`. `buffer_limit`: bytes of a host buffer, unless one tensor is larger.

    Raises:
        ConfigError: an argument is not what it may be.
        CheckpointError: a file or a tensor cannot be read.
        CheckpointFormatError: a file is not what it claims to be; a tensor's name is there twice.
        HostMemoryError: too little host memory.
        After any failure, KeyboardInterrupt included, no memory and no file is held.
    """
    sources = collect_sources(files, named_tensors)
    packed = pack([source.spec for source in sources.values()], buffer_limit)
    places = {tensor.name: buffer.start + tensor.offset for buffer in packed for tensor in buffer.tensors}
    nbytes = packed[-1].start + packed[-1].nbytes if packed else 0
    threads = threads if threads is not None else default_threads()
    arena = HostArena(nbytes, threads=threads, huge_pages=huge_pages)
    shared_files: list[SharedFile] = []
    try:
        tasks = _file_tasks(arena, sources, places, shared_files)
        tasks += _tensor_tasks(arena, sources, places)
        _run_all(tasks, threads)
        buffers = tuple(
            HostBufferMeta(address=arena.address + buffer.start, nbytes=buffer.nbytes, tensors=buffer.tensors)
            for buffer in packed
        )
        return HostCheckpoint(name, uuid.uuid4().hex, arena, buffers)
    except BaseException:
        arena.close()
        raise
    finally:
        for file in shared_files:
            file.close()


def collect_sources(
    files: Sequence[FileSource] | None, named_tensors: Mapping[str, torch.Tensor] | None
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

    for file in files or ():
        for path, entry in _selected(file):
            spec = TensorSpec(entry.name, entry.dtype, entry.shape, entry.nbytes)
            add(Source(spec, path=path, entry=entry))
    for name, tensor in (named_tensors or {}).items():
        add(Source(tensor_spec(name, tensor), tensor=tensor))
    return sources


def _selected(file: FileSource) -> list[tuple[Path, HeaderEntry]]:
    if not isinstance(file, FileSelection):
        if not isinstance(file, (str, os.PathLike)):
            raise ConfigError(f"files: {file!r} is neither a path nor a FileSelection")
        file = FileSelection(Path(file))
    header = read_header_unless_empty(file.path)
    entries = header.tensors if header is not None else ()
    if file.names is not None:
        lacking = sorted(file.names - {entry.name for entry in entries})
        if lacking:
            raise CheckpointFormatError(f"{file.path}: has no tensor {lacking[0]!r}, which was selected")
        entries = tuple(entry for entry in entries if entry.name in file.names)
    return [(file.path, entry) for entry in entries]


def _file_tasks(
    arena: HostArena,
    sources: Mapping[str, Source],
    places: Mapping[str, int],
    shared_files: list[SharedFile],
) -> list[Callable[[], None]]:
    """A task for each piece of each file, in the order of the bytes; fills `shared_files`."""
    segments: dict[Path, list[Segment]] = {}
    for name, source in sources.items():
        if source.path is not None and source.entry is not None:
            segment = Segment(name, source.entry.begin, places[name], source.entry.nbytes)
            segments.setdefault(source.path, []).append(segment)
    tasks: list[Callable[[], None]] = []
    for path, of_file in segments.items():
        pieces = cut_pieces(of_file)
        file = SharedFile(path, len(pieces))
        shared_files.append(file)
        tasks.extend(partial(file.read, arena, piece) for piece in pieces)
    return tasks


def _tensor_tasks(
    arena: HostArena, sources: Mapping[str, Source], places: Mapping[str, int]
) -> list[Callable[[], None]]:
    tensors = {name: source.tensor for name, source in sources.items() if source.tensor is not None}
    wait_for_producers(tensors.values())
    return [
        partial(copy.run, arena)
        for name, tensor in tensors.items()
        for copy in cut_copies(tensor, places[name])
    ]


def _run_all(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    """Runs the tasks in threads; after the first failure, starts no more and raises it.

    However it ends, no task is at work any more: its caller frees memory and closes files next.
    """
    if not tasks:
        return
    idle = threading.Condition()
    running, stopped = 0, False

    def guarded(task: Callable[[], None]) -> None:
        nonlocal running
        with idle:
            if stopped:
                return
            running += 1
        try:
            task()
        except BaseException as error:
            # Its frames hold views, which would keep the memory for as long as someone keeps the error.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            with idle:
                running -= 1
                idle.notify_all()

    pool = ThreadPoolExecutor(min(threads, len(tasks)), "ckpt-load")
    futures: list[Future[None]] = []
    try:
        futures.extend(pool.submit(guarded, task) for task in tasks)
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        with idle:
            stopped = True
        pool.shutdown(wait=True, cancel_futures=True)
        # A KeyboardInterrupt inside submit() may leave a thread that the pool does not know of.
        with idle:
            idle.wait_for(lambda: running == 0)
    errors = (future.exception() for future in futures if not future.cancelled())
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise first
