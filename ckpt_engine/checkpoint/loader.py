"""Loads a checkpoint's sources (files, tensors) into one host arena, straight to their final places.

Files in memory may be taken where they are instead. Where there is a pinner, all of it ends up pinned.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from ckpt_engine.checkpoint.arena import HostArena, default_threads
from ckpt_engine.checkpoint.file_reads import FilePiece, Segment, SharedFile, cut_pieces
from ckpt_engine.checkpoint.host_checkpoint import HostCheckpoint
from ckpt_engine.checkpoint.in_place import Taken, taken_in_place
from ckpt_engine.checkpoint.mapped_file import MappedFile
from ckpt_engine.checkpoint.packing import BUFFER_LIMIT, pack
from ckpt_engine.checkpoint.pool import ArenaPool
from ckpt_engine.checkpoint.progress import Meter, Progress
from ckpt_engine.checkpoint.sources import FileSource, Incoming, Source, collect_sources
from ckpt_engine.checkpoint.strided_reads import file_pieces, replica_checks
from ckpt_engine.checkpoint.tensor_copies import copy_tasks, cut_copies, wait_for_producers
from ckpt_engine.errors import clear_frames
from ckpt_engine.host_memory import HostMemoryPinner

logger = logging.getLogger(__name__)


def load(
    name: str,
    files: Sequence[FileSource] | None = None,
    named_tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    incoming: Incoming | None = None,
    threads: int | None = None,
    huge_pages: bool | None = None,
    buffer_limit: int = BUFFER_LIMIT,
    pinner: HostMemoryPinner | None = None,
    cpus: frozenset[int] | None = None,
    in_place: bool = False,
    pool: ArenaPool | None = None,
    on_progress: Progress | None = None,
) -> HostCheckpoint:
    """Loads files and copies tensors (of any device and strides) into a new arena, or into the pool's.

    No sources at all make an empty share. `incoming`: tensors that are brought once all others are there.
    `threads`: default min(16, 2 * CPUs). `huge_pages`, `cpus`: as of `HostArena`; a pool has its own.
    `buffer_limit`: bytes of a host buffer, unless one tensor is larger.
    `pinner`: pins all of it, before this returns. `in_place`: `.safetensors` files below /dev/shm are mapped
    and pinned where they are; `unlink_files` of the result removes them, when its caller is sure of it.
    Without a pinner, and into a pool, they are copied like all others. `pool`: the caller has it for itself
    until the result is closed. `on_progress`: called with (bytes that are there, bytes in all), by one thread
    at a time; its exception ends the loading.

    Raises:
        ConfigError: an argument is not what it may be.
        CheckpointError: a file or a tensor cannot be read.
        CheckpointFormatError: a file is not what it claims to be; a tensor's name is there twice.
        HostMemoryError: too little host memory, or it cannot be pinned.
        After any failure, KeyboardInterrupt included, no file is held, and no memory but what the pool had.
    """
    sources = collect_sources(files, named_tensors, incoming)
    taken = _in_place(sources, pinner, pool) if in_place else []
    copied = _without(sources, taken)
    packed = pack([source.spec for source in copied.values()], buffer_limit)
    places = {tensor.name: buffer.start + tensor.offset for buffer in packed for tensor in buffer.tensors}
    nbytes = packed[-1].start + packed[-1].nbytes if packed else 0
    threads = threads if threads is not None else default_threads()
    arena: HostArena | None = None
    mapped: list[MappedFile] = []
    shared_files: list[SharedFile] = []
    try:
        mapped.extend(part.map() for part in taken)
        if pool is not None:
            arena = pool.fit(nbytes)
        else:
            arena = HostArena(nbytes, threads=threads, huge_pages=huge_pages, cpus=cpus)
        meter = Meter(sum(source.spec.nbytes for source in copied.values()), on_progress)
        copies = [
            copy
            for name, source in copied.items()
            if source.tensor is not None
            for copy in cut_copies(source.tensor, places[name])
        ]
        wait_for_producers(copy.source for copy in copies)
        tasks = copy_tasks(copies, arena, meter.add)
        tasks += _file_tasks(arena, copied, places, shared_files, meter)
        ahead = incoming is not None or any(copy.device for copy in copies)
        _fill(arena, mapped, tasks, threads, pinner, ahead=ahead)
        if incoming is not None:
            incoming.bring(partial(_place, arena, copied, places), meter.add)
        buffers = [(file, part.host_buffers(buffer_limit)) for file, part in zip(mapped, taken, strict=True)]
        checkpoint = HostCheckpoint.of(name, arena, packed, buffers, pooled=pool is not None)
        if pool is not None:
            pool.keep()
        return checkpoint
    except BaseException:
        for file in mapped:
            file.close()
        if pool is not None:
            pool.drop_new()
        elif arena is not None:
            arena.close()
        raise
    finally:
        for shared in shared_files:
            shared.close()


def _place(
    arena: HostArena, sources: Mapping[str, Source], places: Mapping[str, int], name: str
) -> torch.Tensor:
    spec = sources[name].spec
    dtype = getattr(torch, spec.dtype)
    return arena.view(places[name], spec.nbytes).view(dtype).view(spec.shape)


def _in_place(
    sources: Mapping[str, Source], pinner: HostMemoryPinner | None, pool: ArenaPool | None
) -> list[Taken]:
    taken = taken_in_place([source.of_file for source in sources.values() if source.of_file is not None])
    why = "this device pins no memory" if pinner is None else "the shared memory pool takes copies"
    if taken and (pinner is None or pool is not None):
        logger.warning(
            "%s and %d more files are copied, not pinned in place: %s",
            taken[0].header.path,
            len(taken) - 1,
            why,
        )
        return []
    return taken


def _without(sources: Mapping[str, Source], taken: Sequence[Taken]) -> dict[str, Source]:
    there = {entry.name for part in taken for entry in part.entries}
    return {name: source for name, source in sources.items() if name not in there}


def _fill(
    arena: HostArena,
    mapped: Sequence[MappedFile],
    tasks: Sequence[Callable[[], None]],
    threads: int,
    pinner: HostMemoryPinner | None,
    *,
    ahead: bool,
) -> None:
    """Runs `tasks`, which fill the arena, and pins everything; afterwards every page is there.

    Pages first, by all threads: the driver would make them in one. Then one thread pins while the others
    read, which takes little more than the longer of the two alone. Copies from a device wait for the pin:
    into pinned memory they run at the bus's speed, into other memory through the driver's own buffers.
    """
    if pinner is not None or ahead:  # one thread alone copies from a device
        arena.populate()
        arena.populated = True
    if pinner is not None:
        _run_all([piece for file in mapped for piece in file.populate_pieces()], threads)
        pins = [partial(arena.pin, pinner), *(partial(file.pin, pinner) for file in mapped)]
        if ahead:
            _run_all(pins, threads)
        else:
            tasks = [*pins, *tasks]
    _run_all(tasks, threads)
    arena.populated = True


def _file_tasks(
    arena: HostArena,
    sources: Mapping[str, Source],
    places: Mapping[str, int],
    shared_files: list[SharedFile],
    meter: Meter,
) -> list[Callable[[], None]]:
    """A task for each piece of each file, in the order of the bytes; fills `shared_files`."""
    segments: dict[Path, list[Segment]] = {}
    for name, source in sources.items():
        if source.of_file is not None:
            header, entry = source.of_file
            segment = Segment(name, entry.begin, places[name], entry.nbytes)
            segments.setdefault(header.path, []).append(segment)
    sharded = {name: source.sharded for name, source in sources.items() if source.sharded is not None}
    pieces_of: dict[Path, Sequence[FilePiece]] = {
        **{path: cut_pieces(of_file) for path, of_file in segments.items()},
        **file_pieces((tensor, places[name]) for name, tensor in sharded.items()),
    }
    tasks: list[Callable[[], None]] = []
    for path, pieces in pieces_of.items():
        file = SharedFile(path, len(pieces))
        shared_files.append(file)
        tasks.extend(partial(_read_piece, file, arena, piece, meter) for piece in pieces)
    tasks.extend(check.run for tensor in sharded.values() for check in replica_checks(tensor))
    return tasks


def _read_piece(file: SharedFile, arena: HostArena, piece: FilePiece, meter: Meter) -> None:
    file.read(arena, piece)
    meter.add(piece.nbytes)


def _run_all(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    """Runs the tasks in threads; after the first failure, starts no more and raises it.

    However it ends, no task is at work any more: its caller frees memory and closes files next.
    """
    if not tasks:
        return
    idle = threading.Condition()
    running, left, stopped, failed = 0, len(tasks), False, False

    def guarded(task: Callable[[], None]) -> None:
        nonlocal running, left, failed
        with idle:
            if stopped:
                return
            running += 1
        try:
            task()
        except BaseException as error:
            failed = True
            # Its frames, and its cause's, hold views, which would keep the memory for as long as it is kept.
            clear_frames(error)
            raise
        finally:
            with idle:
                running -= 1
                left -= 1
                idle.notify_all()

    pool = ThreadPoolExecutor(min(threads, len(tasks)), "ckpt-load")
    futures: list[Future[None]] = []
    try:
        futures.extend(pool.submit(guarded, task) for task in tasks)
        with idle:
            while left and not failed:
                # In slices: a signal that came just before a wait is only seen after it.
                idle.wait(0.1)
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
