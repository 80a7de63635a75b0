"""A broadcast inside a host: bytes copied out of the owner's ring, and a gloo broadcast of the same.

    python -m benchmarks.broadcast --mib 256 --ranks 2 --rounds 5

Prints one JSON line for each way, and a last one with their ratio. `seconds`: the median over the rounds of
the slowest rank's time. `limit_seconds`: one memcpy of the same bytes in one process, in the same run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import SharedRing
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.settings import load_settings
from ckpt_engine.transport.bootstrap import own_store
from ckpt_engine.transport.collectives import GlooCollectives
from ckpt_engine.transport.shared_memory import COPIED, STAGED, HostLinks

SLOT_NBYTES = 64 * 1024 * 1024
DEADLINE_SECONDS = 300.0


def through_rings(rank: int, ranks: int, ring: SharedRing, directory: str) -> tuple[Callable[[], None], Any]:
    """Rank 0 says that a slot is there, the others copy it and say so: what an update does."""
    reactor = Reactor()
    paths = {other: f"{directory}/{other}" for other in range(ranks)}
    links = HostLinks(paths[rank], rank, reactor)
    notes = {STAGED: 0, COPIED: 0}

    def on_note(kind: int, _rank: int, _bucket: int) -> None:
        notes[kind] += 1

    def connect() -> None:
        others = {other: path for other, path in paths.items() if other != rank}
        deadline = Deadline.after(DEADLINE_SECONDS)
        links.connect(others, "benchmark", ring, on_note, deadline, poll=lambda: reactor.turn(0))

    def once() -> None:
        notes.update({STAGED: 0, COPIED: 0})
        starts = range(0, ring.nbytes, SLOT_NBYTES)
        deadline = Deadline.after(DEADLINE_SECONDS)
        for index, start in enumerate(starts):
            if rank == 0:
                for other in range(1, ranks):
                    links.tell(other, STAGED, index)
                continue
            reactor.wait(lambda index=index: notes[STAGED] > index, deadline)  # type: ignore[misc]
            nbytes = min(SLOT_NBYTES, ring.nbytes - start)
            ring.view(start, nbytes).copy_(links.ring_of(0).view(start, nbytes))
            links.tell(0, COPIED, index)
        if rank == 0:
            reactor.wait(lambda: notes[COPIED] == len(starts) * (ranks - 1), deadline)

    return once, (connect, links.close)


def work(rank: int, ranks: int, nbytes: int, rounds: int, port: int, directory: str, sync: Barrier) -> None:
    torch.set_num_threads(1)
    ring = SharedRing.create(nbytes)
    data = ring.view(0, nbytes)
    data.fill_(rank + 1)
    deadline = Deadline.after(DEADLINE_SECONDS)
    point = own_store(rank, ranks, "127.0.0.1", port, load_settings(), deadline)
    gloo = GlooCollectives(point.store, "benchmark", rank, ranks, deadline, poll=lambda: None)
    rings, (connect, close) = through_rings(rank, ranks, ring, directory)
    sync.wait()
    connect()

    def through_gloo() -> None:
        for start in range(0, nbytes, SLOT_NBYTES):
            slot = ring.view(start, min(SLOT_NBYTES, nbytes - start))
            gloo.broadcast(slot, 0, deadline, poll=lambda: None)

    seconds: dict[str, list[float]] = {"rings": [], "gloo": []}
    for number in range(rounds + 1):
        # In turn, so that a noisy minute hits both.
        for way, once in (("rings", rings), ("gloo", through_gloo)):
            if rank:
                data.fill_(rank + 1)
            sync.wait()
            begin = time.perf_counter()
            once()
            sync.wait()
            if number:  # the first round warms up
                seconds[way].append(time.perf_counter() - begin)
            if not bool((data == 1).all()):
                raise SystemExit(f"rank {rank} has other bytes than rank 0 after {way}")
    if rank == 0:
        Path(directory, "seconds.json").write_text(json.dumps(seconds))
    sync.wait()
    close()
    gloo.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=256, help="MiB to broadcast")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    nbytes = arguments.mib * 1024 * 1024
    torch.set_num_threads(1)
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    limits = []
    for _ in range(arguments.rounds):
        begin = time.perf_counter()
        target.copy_(source)
        limits.append(time.perf_counter() - begin)
    del source, target
    context = multiprocessing.get_context("spawn")
    sync = context.Barrier(arguments.ranks)
    with tempfile.TemporaryDirectory() as directory:
        port = _free_port()
        processes = [
            context.Process(
                target=work,
                args=(rank, arguments.ranks, nbytes, arguments.rounds, port, directory, sync),
            )
            for rank in range(arguments.ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(1)
        seconds = json.loads(Path(directory, "seconds.json").read_text())
    limit = statistics.median(limits)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    for way, median in medians.items():
        line = {
            "benchmark": "broadcast",
            "way": way,
            "ranks": arguments.ranks,
            "bytes": nbytes,
            "rounds": arguments.rounds,
            "seconds": round(median, 5),
            "gb_per_second": round(nbytes / median / 1e9, 2),
            "limit_seconds": round(limit, 5),
            "ratio": round(limit / median, 3),
        }
        print(json.dumps(line))
    print(
        json.dumps(
            {"benchmark": "broadcast", "gloo_over_rings": round(medians["gloo"] / medians["rings"], 2)}
        )
    )


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    main()
