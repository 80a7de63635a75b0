"""Register, gather, update, unregister, over and over: does anything grow?

    python -m benchmarks.soak --device cpu --ranks 2 --cycles 100 --json
    python -m benchmarks.soak --device cuda --cycles 100 --json

Every cycle registers other weights and ends with the workers holding them. One JSON line for each rank, at
cycle 10 and at every tenth of the cycles, with what its processes hold between two cycles: anonymous and
shared memory, descriptors, threads, and the device's memory in use. `dev_shm_bytes` is what lies in /dev/shm,
whoever put it there: it is told, not judged. The last line says by how much each figure grew, from the least
of the first third of these lines to the least of the last third, on the rank where it grew most, and whether
that is `flat`; the exit status is 1 where it is not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.fleet import (
    Lines,
    Worker,
    parameter_server,
    process_figures,
    run_ranks,
    shapes_of,
    share_of,
    sum_of,
)
from ckpt_engine.devices import detect_device

ALLOWED: Mapping[str, int] = {
    "anonymous_bytes": 32 * 2**20,
    "shared_bytes": 0,
    "descriptors": 2,
    "threads": 1,
    "device_bytes": 4 * 2**20,
}
"""By how much a figure may differ between two moments without growing: what allocators and ZeroMQ's
lingering connections come to."""
WARM_CYCLE = 10
"""After it nothing may grow. (Of fewer than 20 cycles the first half warms up.)"""


def serve(rank: int, arguments: argparse.Namespace, port: int) -> Lines:
    shapes = shapes_of(int(arguments.gib * 2**30), arguments.tensor_mib)
    worker = Worker(arguments.device, rank, shapes)
    warm, every = min(WARM_CYCLE, arguments.cycles // 2), max(1, arguments.cycles // 10)
    lines: Lines = []
    with parameter_server(rank, arguments.ranks, arguments.device, port) as ps:
        worker.wait_until_ready()
        for cycle in range(1, arguments.cycles + 1):
            everything = [share_of(shapes, other, arguments.ranks, cycle) for other in range(arguments.ranks)]
            expected = sum(map(sum_of, everything))
            ps.register_checkpoint("soak", named_tensors=everything[rank])
            del everything
            ps.gather_metas("soak")
            begin = time.perf_counter()
            ps.update("soak", worker.update, timeout=120)
            seconds = time.perf_counter() - begin
            got = worker.sum()
            if got != expected:
                raise RuntimeError(f"cycle {cycle}: the worker's parameters sum to {got}, not {expected}")
            ps.unregister_checkpoint("soak")
            if cycle == warm or (cycle > warm and cycle % every == 0) or cycle == arguments.cycles:
                gc.collect()
                figures = process_figures() | device_figures(arguments.device)
                lines.append(
                    {
                        "rank": rank,
                        "cycle": cycle,
                        "seconds": round(seconds, 5),
                        "dev_shm_bytes": dev_shm_bytes(),
                        "server": figures,
                        "worker": worker.figures(),
                    }
                )
    worker.close()
    return lines


def device_figures(kind: str) -> dict[str, int]:
    """What all processes together hold of the device, in bytes."""
    if kind != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(0)
    return {"device_bytes": total - free}


def dev_shm_bytes() -> int:
    """What all files in /dev/shm take."""
    shm = os.statvfs("/dev/shm")  # noqa: S108 - only looked at
    return (shm.f_blocks - shm.f_bfree) * shm.f_frsize


def growth(of_ranks: list[Lines]) -> dict[str, dict[str, int]]:
    """From the first third of the lines to the last, by process and figure, on the rank where it is the most.

    From the least of each third: what an allocator keeps for a while comes and goes, what leaks stays.
    """
    third = -(-len(of_ranks[0]) // 3)

    def least(lines: Lines, who: str, figure: str) -> int:
        return min(int(line[who][figure]) for line in lines)

    return {
        who: {
            figure: max(
                least(lines[-third:], who, figure) - least(lines[:third], who, figure) for lines in of_ranks
            )
            for figure in of_ranks[0][0][who]
        }
        for who in ("server", "worker")
    }


def is_flat(grown: Mapping[str, Mapping[str, int]]) -> bool:
    return all(more <= ALLOWED[figure] for figures in grown.values() for figure, more in figures.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--gib", type=float, default=0.25, help="GiB of the checkpoint")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--tensor-mib", type=float, default=4.0, help="MiB of each tensor")
    parser.add_argument("--json", action="store_true", help="only JSON lines (they are printed anyway)")
    arguments = parser.parse_args()
    if arguments.cycles < 2:
        parser.error("--cycles: at least 2, or nothing can be seen to grow")
    arguments.device = detect_device(arguments.device)
    of_ranks = run_ranks(serve, arguments)
    common: dict[str, Any] = {"benchmark": "soak", "device": arguments.device, "ranks": arguments.ranks}
    for moment in zip(*of_ranks, strict=True):
        for line in moment:
            print(json.dumps(common | line))
    grown = growth(of_ranks)
    flat = is_flat(grown)
    print(json.dumps(common | {"cycles": arguments.cycles, "growth": grown, "flat": flat}))
    sys.exit(not flat)


if __name__ == "__main__":
    main()
