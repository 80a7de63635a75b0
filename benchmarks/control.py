"""What an update costs besides its bytes, for 1 to 64 ranks: tiny weights, real ranks, eight to a "host".

    python -m benchmarks.control --ranks 1,2,4,8,16,32,64 --json
    python -m benchmarks.control --plot control.png
    python -m benchmarks.control --lines measured-elsewhere.json --plot control.png

Every rank is a process, whose worker is the thread of its `req_func`; the first and the last hold a tensor
of 2 KiB each, so the number of buckets stays the same. Hosts are names (CKPT_ENGINE_HOST_ID): the first
ranks of eight broadcast by gloo, the others copy inside their host. All ranks share this machine's cores:
where there are fewer cores than ranks, seconds grow with the ranks for that alone. So the processor time of
a rank stands beside them. One JSON line for each number of ranks, medians of all updates but the first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import zmq

from benchmarks.fleet import Lines, run_ranks
from ckpt_engine import ParameterServer
from ckpt_engine.ipc.receiver import serve_update

RANKS_OF_A_HOST = 8
ELEMENTS = 512


def serve(rank: int, arguments: argparse.Namespace, port: int) -> Lines:
    """One rank's part; a line for each update."""
    world_size = arguments.ranks
    host = f"host{rank // RANKS_OF_A_HOST}"
    os.environ |= {
        "CKPT_ENGINE_HOST_ID": host,
        "CKPT_ENGINE_P2P": "off",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    context = zmq.Context()
    uuid = f"CPU-{host}-{rank % RANKS_OF_A_HOST}"
    received: dict[str, float] = {}

    def run(tensors: list[tuple[str, torch.Tensor]]) -> None:
        received.update((name, float(tensor[-1])) for name, tensor in tensors)

    def req_func(paths: list[tuple[str, str]]) -> None:
        status = serve_update(context, paths, uuid, None, run=run)
        if status["outcome"] != "committed":
            raise RuntimeError(status["error"])

    lines: Lines = []
    with ParameterServer(
        rank=rank,
        world_size=world_size,
        master_addr="127.0.0.1",
        master_port=port,
        device="cpu",
        gpu_count=RANKS_OF_A_HOST,
    ) as ps:
        holders = {0, world_size - 1}
        share = {f"layers.{rank:02d}.weight": torch.full((ELEMENTS,), float(rank))} if rank in holders else {}
        ps.register_checkpoint("benchmark", named_tensors=share)
        for _ in range(arguments.rounds + 1):
            received.clear()
            cpu, begin = time.process_time(), time.perf_counter()
            ps.gather_metas("benchmark")
            gathered = time.perf_counter() - begin
            report = ps.update("benchmark", req_func, timeout=600)
            lines.append(
                {
                    "gather_seconds": gathered,
                    "seconds": report.seconds,
                    "stages": report.stages,
                    "cpu_seconds": time.process_time() - cpu,
                }
            )
            if set(received.values()) != holders:
                raise RuntimeError(f"rank {rank}'s worker got {received}")
    return lines


def measure(world_size: int, rounds: int) -> dict[str, Any]:
    """The line for this many ranks. Raises SystemExit: a rank failed."""
    # Forked from one process that has torch already: 64 imports of it would take minutes, and 20 GB.
    processes = multiprocessing.get_context("forkserver")
    arguments = argparse.Namespace(ranks=world_size, rounds=rounds, device="cpu")
    warm = [lines[1:] for lines in run_ranks(serve, arguments, processes)]
    of_rank_0 = warm[0]
    cpu = [statistics.median(line["cpu_seconds"] for line in lines) for lines in warm]
    return {
        "benchmark": "control",
        "ranks": world_size,
        "hosts": -(-world_size // RANKS_OF_A_HOST),
        "cores": len(os.sched_getaffinity(0)),
        "median_of": len(of_rank_0),
        "gather_seconds": _median(line["gather_seconds"] for line in of_rank_0),
        "seconds": _median(line["seconds"] for line in of_rank_0),
        "stages": {
            stage: _median(line["stages"][stage] for line in of_rank_0) for stage in of_rank_0[0]["stages"]
        },
        "rank_0_cpu_seconds": round(cpu[0], 5),
        "rank_cpu_seconds": _median(cpu[1:] or cpu),
    }


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 5)


def plot(lines: Lines, path: str) -> None:
    """Milliseconds of an update with its gather, by the number of ranks, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = [line["ranks"] for line in lines]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in {
        "seconds": f"wall clock of the update, on {lines[0]['cores']} cores",
        "rank_0_cpu_seconds": "processor time of rank 0, which serves the control plane, with gather",
        "rank_cpu_seconds": "processor time of another rank (median), with gather",
    }.items():
        axes.plot(ranks, [1000 * line[key] for line in lines], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="ms", xticks=ranks, xticklabels=ranks)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4,8,16,32,64", help="numbers of ranks, with commas")
    parser.add_argument("--rounds", type=int, default=10, help="updates after the first, cold one")
    parser.add_argument("--plot", help="a picture of the lines goes to this file (needs matplotlib)")
    parser.add_argument("--lines", type=Path, help="plot these lines, printed before, and measure nothing")
    parser.add_argument("--json", action="store_true", help="only JSON lines (they are printed anyway)")
    arguments = parser.parse_args()
    if arguments.lines is not None:
        if not arguments.plot:
            parser.error("--lines needs --plot FILE: where the picture goes")
        plot([json.loads(line) for line in arguments.lines.read_text().splitlines()], arguments.plot)
        return
    multiprocessing.set_forkserver_preload(["ckpt_engine", "ckpt_engine.ipc.receiver"])
    lines = []
    for count in arguments.ranks.split(","):
        lines.append(measure(int(count), arguments.rounds))
        print(json.dumps(lines[-1]), flush=True)
    if arguments.plot:
        plot(lines, arguments.plot)


if __name__ == "__main__":
    main()
