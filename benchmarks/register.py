"""Registering a checkpoint: from files and from CPU tensors, into a new host arena and into a kept one.

    python -m benchmarks.register --gib 1 --rounds 3 --json

Writes a checkpoint of random bytes, in several shards, to a temporary directory, so that its pages are in the
page cache. Prints one line for each way; `seconds` is the median over the rounds. `limit_seconds`: as many
threads read the same files (`preadv`), or copy the same tensors, into memory that is there already, in the
same run. `ratio` is the limit's time by ours: 1 is as fast as possible. With `--device cuda`, where there is
one, everything is pinned as well, and one more line is about files in /dev/shm that stay where they are.
`--source device` is about tensors on that device: the limit is one copy of as many bytes from it into pinned
memory.

`--cold` has the files dropped from the page cache before each reading, ours and the limit's; `direct_seconds`
is the limit's time with O_DIRECT, which passes the cache by.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ckpt_engine.checkpoint import CheckpointRegistry, HostArena, HostCheckpoint, load
from ckpt_engine.checkpoint.arena import PIECE_NBYTES, default_threads
from ckpt_engine.checkpoint.in_place import IN_MEMORY
from ckpt_engine.devices import make_device
from ckpt_engine.errors import CkptEngineError
from ckpt_engine.host_memory import HostMemoryPinner
from ckpt_engine.metadata import align_up
from ckpt_engine.settings import load_settings

SHARES = (0.4, 0.3, 0.2, 0.09, 0.01)
"""The bytes of a shard's large tensors; 16 small ones of 8 KiB come on top."""
SMALL_NBYTES = 8192

Tensors = dict[str, torch.Tensor]


def random_tensors(nbytes: int, shards: int) -> list[Tensors]:
    """Shards of about `nbytes` bytes together."""
    generator = np.random.default_rng(1)

    def tensor(size: int) -> torch.Tensor:
        words = generator.integers(0, 2**64, max(1, size // 8), dtype=np.uint64)
        return torch.from_numpy(words.view(np.uint8)).view(torch.bfloat16)

    return [
        {f"layers.{shard}.large.{i}": tensor(int(nbytes / shards * share)) for i, share in enumerate(SHARES)}
        | {f"layers.{shard}.small.{i}": tensor(SMALL_NBYTES) for i in range(16)}
        for shard in range(shards)
    ]


def write_shards(shards: list[Tensors], directory: Path) -> list[Path]:
    files = []
    for number, tensors in enumerate(shards):
        file = directory / f"model-{number:05}.safetensors"
        save_file(tensors, file)
        with file.open("rb") as written:
            os.fsync(written.fileno())  # else the disk is at work during the first rounds
        files.append(file)
    return files


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Limits:
    """What no way of registering can beat: the bytes' way alone, into memory that was touched before."""

    def __init__(self, nbytes: int, threads: int) -> None:
        nbytes = align_up(nbytes, 4096)
        self._arena = HostArena(nbytes, threads=threads)
        self._arena.populate()
        self._arena.view(0, nbytes).zero_()
        self._pool = ThreadPoolExecutor(threads)

    def close(self) -> None:
        self._pool.shutdown()
        self._arena.close()

    def read(self, files: list[Path], *, direct: bool = False) -> float:
        """`direct`: with O_DIRECT, for which offsets, lengths and addresses must be multiples of 4096."""
        with ExitStack() as stack:
            pieces, place = [], 0
            for file in files:
                descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
                stack.callback(os.close, descriptor)
                size = os.fstat(descriptor).st_size
                for start in range(0, size, PIECE_NBYTES):
                    nbytes = min(PIECE_NBYTES, size - start)
                    target = self._arena.memory(place + start, align_up(nbytes, 4096))
                    pieces.append((descriptor, start, nbytes, target))
                place += align_up(size, 4096)

            def one(piece: tuple[int, int, int, memoryview]) -> None:
                descriptor, start, nbytes, target = piece
                done = 0
                while done < nbytes:
                    done += os.preadv(descriptor, [target[done:]], start + done)

            return timed(lambda: list(self._pool.map(one, pieces)))

    def copy(self, tensors: Tensors) -> float:
        pieces, place = [], 0
        for tensor in tensors.values():
            nbytes = tensor.numel() * tensor.element_size()
            for start in range(0, nbytes, PIECE_NBYTES):
                count = min(PIECE_NBYTES, nbytes - start)
                pieces.append((self._arena.address + place + start, tensor.data_ptr() + start, count))
            place += nbytes
        return timed(lambda: list(self._pool.map(lambda piece: ctypes.memmove(*piece), pieces)))

    def from_device(self, tensors: Tensors, pinner: HostMemoryPinner | None) -> float:
        """One copy of as many bytes into pinned memory, in pieces of 256 MiB."""
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if pinner is not None:
            self._arena.pin(pinner)
        source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()

        def copy() -> None:
            for start in range(0, nbytes, 2**28):
                part = source[start : start + 2**28]
                self._arena.view(start, part.numel()).copy_(part, non_blocking=True)
            torch.cuda.synchronize()

        return timed(copy)

    def once(
        self,
        source: str,
        files: list[Path],
        tensors: Tensors,
        pinner: HostMemoryPinner | None,
        *,
        cold: bool,
    ) -> dict[str, float]:
        """Seconds of a source's limit; where the cache is cold also `direct`, the files' other one."""
        if source == "device":
            return {source: self.from_device(tensors, pinner)}
        if source == "tensors":
            return {source: self.copy(tensors)}
        if not cold:
            return {source: self.read(files)}
        drop_from_cache(files)
        direct = self.read(files, direct=True)
        drop_from_cache(files)
        return {source: self.read(files), "direct": direct}


def drop_from_cache(files: list[Path]) -> None:
    """The pages are clean, since the files were synced: the kernel keeps others."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(held: HostCheckpoint, tensors: Tensors) -> None:
    """Every byte is there; outside of what is timed."""
    for index, buffer in enumerate(held.buffers):
        for tensor in buffer.tensors:
            view = held.view(index, tensor.offset, tensor.nbytes)
            if not torch.equal(view, tensors[tensor.name].view(torch.uint8)):
                raise SystemExit(f"{tensor.name} was registered with other bytes")
    if sum(len(buffer.tensors) for buffer in held.buffers) != len(tensors):
        raise SystemExit("tensors are missing")


class Ways:
    """Each way of registering: seconds of one round, and of unregistering after it."""

    def __init__(
        self,
        tensors: Tensors,
        files: list[Path],
        in_memory: list[Path],
        threads: int,
        huge_pages: bool | None,
        pinner: HostMemoryPinner | None,
        *,
        sources: Sequence[str],
        cold: bool,
    ) -> None:
        self._tensors = tensors
        self._in_memory = in_memory if "files" in sources else []
        self._cold = files if cold else []
        self._load: dict[str, Any] = {"threads": threads, "huge_pages": huge_pages, "pinner": pinner}
        on_device = {name: t.cuda() for name, t in tensors.items()} if "device" in sources else {}
        every: dict[str, dict[str, Any]] = {
            "files": {"files": files},
            "tensors": {"named_tensors": tensors},
            "device": {"named_tensors": on_device},
        }
        self._sources = {source: every[source] for source in sources}
        self._new = CheckpointRegistry(**self._load)
        # A pool for each: one that was just filled would be warmer than one that was not.
        self._kept = {source: CheckpointRegistry(**self._load) for source in self._sources}
        self.huge_pages: bool | None = None

    def names(self) -> list[tuple[str, str]]:
        """(source, memory) of each way."""
        ways = [(source, memory) for memory in ("new", "kept") for source in self._sources]
        return [*ways, ("files", "in_place")] if self._in_memory else ways

    def once(self, source: str, memory: str, *, checked: bool) -> tuple[float, float]:
        if memory == "in_place":
            return self._in_place(checked)
        registry = self._kept[source] if memory == "kept" else self._new
        options = {**self._sources[source], "use_shared_memory_pool": memory == "kept"}
        if source == "files":
            drop_from_cache(self._cold)
        seconds = timed(lambda: registry.register("benchmark", **options))
        self.huge_pages = registry.get("benchmark").arena.huge_pages
        if checked:
            check(registry.get("benchmark"), self._tensors)
        return seconds, timed(lambda: registry.unregister("benchmark"))

    def _in_place(self, checked: bool) -> tuple[float, float]:
        held: list[HostCheckpoint] = []
        # `load` alone leaves the files, for the next round.
        seconds = timed(lambda: held.append(load("benchmark", self._in_memory, in_place=True, **self._load)))
        if checked:
            check(held[0], self._tensors)
        return seconds, timed(held[0].close)

    def close(self) -> None:
        for registry in (self._new, *self._kept.values()):
            registry.close()


@contextmanager
def copies_in_memory(files: list[Path], pinner: HostMemoryPinner | None) -> Iterator[list[Path]]:
    """The files once more, in /dev/shm; none where nothing is pinned."""
    if pinner is None:
        yield []
        return
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as directory:
        yield [Path(shutil.copy(file, directory)) for file in files]


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    settings = load_settings()
    threads = arguments.threads or settings.load_threads or default_threads()
    try:
        device = make_device(arguments.device, settings, 0)
    except CkptEngineError as error:
        print(f"{error}; on the CPU instead", file=sys.stderr)
        device = make_device("cpu", settings, 0)
    shards = random_tensors(int(arguments.gib * 2**30), arguments.shards)
    tensors = {name: tensor for shard in shards for name, tensor in shard.items()}
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    limits: dict[str, list[float]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.directory)))
        files = write_shards(shards, directory)
        in_memory = stack.enter_context(copies_in_memory(files, device.pinner))
        limit = Limits(sum(align_up(file.stat().st_size, 4096) for file in files), threads)
        stack.callback(limit.close)
        options = {"sources": arguments.source, "cold": arguments.cold}
        ways = Ways(tensors, files, in_memory, threads, settings.huge_pages, device.pinner, **options)
        stack.callback(ways.close)
        for number in range(arguments.rounds + 1):
            # In turn, so that a noisy minute hits all; the first round warms up and is checked.
            taken = {way: ways.once(*way, checked=number == 0) for way in ways.names()}
            bare: dict[str, float] = {}
            for source in arguments.source:
                bare |= limit.once(source, files, tensors, device.pinner, cold=arguments.cold)
            if number:
                for way, pair in taken.items():
                    seconds.setdefault(way, []).append(pair)
                for source, alone in bare.items():
                    limits.setdefault(source, []).append(alone)
        huge_pages = ways.huge_pages
    about = {
        "device": device.type,
        "pinned": device.pinner is not None,
        "bytes": nbytes,
        "threads": threads,
        "huge_pages": huge_pages,
        "rounds": arguments.rounds,
        "cold": arguments.cold,
    }
    return [line_of(way, times, limits, about) for way, times in seconds.items()]


def line_of(
    way: tuple[str, str],
    times: list[tuple[float, float]],
    limits: dict[str, list[float]],
    about: dict[str, Any],
) -> dict[str, Any]:
    registering = [seconds for seconds, _ in times]
    ours, limit = statistics.median(registering), statistics.median(limits[way[0]])
    direct = limits.get("direct", []) if way[0] == "files" else []
    return {
        "benchmark": "register",
        "source": way[0],
        "memory": way[1],
        **about,
        "seconds": round(ours, 5),
        "seconds_min": round(min(registering), 5),
        "seconds_max": round(max(registering), 5),
        "gb_per_second": round(about["bytes"] / ours / 1e9, 2),
        "limit_seconds": round(limit, 5),
        **({"direct_seconds": round(statistics.median(direct), 5)} if direct else {}),
        "ratio": round(limit / ours, 3),
        "unregister_seconds": round(statistics.median(seconds for _, seconds in times), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--gib", type=float, default=1.0, help="GiB of tensors; needs four times that in memory"
    )
    parser.add_argument("--shards", type=int, default=4, help="files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: CKPT_ENGINE_LOAD_THREADS")
    parser.add_argument("--device", default="cpu", help="cuda: pin everything for it; the CPU pins nothing")
    parser.add_argument(
        "--source",
        action="append",
        choices=("files", "tensors", "device"),
        help="may be given several times; default: files and tensors",
    )
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache each time")
    parser.add_argument("--directory", help="where the files go; default: that for temporary files")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    arguments = parser.parse_args()
    arguments.source = arguments.source or ["files", "tensors"]
    if "device" in arguments.source and arguments.device != "cuda":
        parser.error("--source device: give --device cuda too")
    for line in measure(arguments):
        if arguments.json:
            print(json.dumps(line))
        else:
            print(
                f"{line['source']:8} {line['memory']:9} {line['seconds']:9.4f} s "
                f"{line['gb_per_second']:7.2f} GB/s  {line['ratio']:6.3f} of the limit"
            )


if __name__ == "__main__":
    main()
