"""Updates of one size, over and over: seconds of every stage, beside the limit measured in the same run.

    python -m benchmarks.update --device cpu --gib 1 --ranks 2 --json
    python -m benchmarks.update --device cuda --gib 16 --json

Every rank registers its share as tensors, and has a worker process that copies each tensor into a parameter
of its own. One JSON line for each update (the first one is cold), and a last one with the medians of the
others. `limit_seconds`: on CPU one memcpy of all bytes in one process; on CUDA the copy of all bytes from
the registered host memory to the device, in pieces of 256 MiB. `ratio` = limit / ours.

With `--verify transport` every other update is verified; the last line then has the medians of both kinds,
`verify_cost` (how much longer the verified ones took), and `digest_seconds`: of the digests of this rank's
share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from benchmarks.fleet import Lines, Shapes, Worker, parameter_server, run_ranks, shapes_of, share_of, sum_of
from ckpt_engine import ParameterServer
from ckpt_engine.checkpoint.arena import default_threads
from ckpt_engine.devices import detect_device

PIECE_NBYTES = 256 * 1024 * 1024


def serve(rank: int, arguments: argparse.Namespace, port: int) -> Lines:
    """One rank's part; a line for each update."""
    kind = arguments.device
    shapes = shapes_of(int(arguments.gib * 2**30), arguments.tensor_mib)
    worker = Worker(kind, rank, shapes)
    tensors = share_of(shapes, rank, arguments.ranks)
    expected = sum_of(tensors)
    lines: Lines = []
    run_seconds = 0.0
    with parameter_server(rank, arguments.ranks, kind, port) as ps:
        begin = time.perf_counter()
        ps.register_checkpoint("benchmark", named_tensors=tensors, digests=bool(arguments.verify))
        register_seconds = time.perf_counter() - begin
        digest_seconds = seconds_of_digests(ps) if arguments.verify else 0.0
        del tensors
        worker.wait_until_ready()

        def req_func(paths: list[tuple[str, str]]) -> None:
            nonlocal run_seconds
            run_seconds = worker.update(paths)

        kinds = ("off", arguments.verify) if arguments.verify else ("off",)
        for number, verify in enumerate([*kinds * (arguments.rounds + 1)]):
            limit = limit_seconds(ps, kind, shapes) if rank == 0 else 0.0
            begin = time.perf_counter()
            ps.gather_metas("benchmark")
            gathered = time.perf_counter()
            report = ps.update(
                "benchmark", req_func, timeout=600, keep_buffers=arguments.keep_buffers, verify=verify
            )
            if arguments.ranks == 1 and worker.sum() != expected:
                raise RuntimeError(f"the worker's parameters sum to {worker.sum()}, not {expected}")
            lines.append(
                {
                    "round": number // len(kinds),
                    "verify": verify,
                    "bytes": report.nbytes,
                    "tensors": report.tensors,
                    "buckets": report.buckets,
                    "ring_bytes": report.ring_nbytes,
                    "register_seconds": round(register_seconds, 4),
                    "digest_seconds": round(digest_seconds, 4),
                    "gather_seconds": round(gathered - begin, 5),
                    "seconds": round(report.seconds, 5),
                    "run_seconds": round(run_seconds, 5),
                    "stages": {stage: round(seconds, 5) for stage, seconds in report.stages.items()},
                    "limit_seconds": round(limit, 5),
                }
            )
    worker.close()
    return lines


def seconds_of_digests(ps: ParameterServer) -> float:
    begin = time.perf_counter()
    ps._registry.get("benchmark").add_digests(default_threads())
    return time.perf_counter() - begin


def limit_seconds(ps: ParameterServer, kind: str, shapes: Shapes) -> float:
    """What the hardware takes for the same bytes, in this process."""
    nbytes = sum(rows * columns * 2 for rows, columns in shapes.values())
    if kind == "cpu":
        source = torch.ones(min(nbytes, 4 * PIECE_NBYTES), dtype=torch.uint8)
        target = torch.ones_like(source)
        begin = time.perf_counter()
        for start in range(0, nbytes, source.numel()):
            part = min(source.numel(), nbytes - start)
            target[:part].copy_(source[:part])
        return time.perf_counter() - begin
    held = ps._registry.get("benchmark")
    mine = sum(buffer.nbytes for buffer in held.buffers)
    slot = torch.empty(PIECE_NBYTES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for number, buffer in enumerate(held.buffers):
        for start in range(0, buffer.nbytes, PIECE_NBYTES):
            part = min(PIECE_NBYTES, buffer.nbytes - start)
            slot[:part].copy_(held.view(number, start, part), non_blocking=True)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) * nbytes / mine
    del slot
    torch.cuda.empty_cache()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--gib", type=float, default=1.0, help="GiB of the checkpoint")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="updates after the first, cold one")
    parser.add_argument("--tensor-mib", type=float, default=64.0, help="MiB of each tensor")
    parser.add_argument("--keep-buffers", action="store_true", help="keep the ring from update to update")
    parser.add_argument("--verify", choices=("transport",), help="verify every other update")
    parser.add_argument("--json", action="store_true", help="only JSON lines (they are printed anyway)")
    arguments = parser.parse_args()
    arguments.device = detect_device(arguments.device)
    lines = run_ranks(serve, arguments)[0]
    common = {
        "benchmark": "update",
        "device": arguments.device,
        "ranks": arguments.ranks,
        "keep_buffers": arguments.keep_buffers,
    }
    for line in lines:
        print(json.dumps(common | line | figures(line["bytes"], line["seconds"], line["limit_seconds"])))
    kinds = 2 if arguments.verify else 1
    rest = lines[kinds:] or lines
    warm = [line for line in rest if line["verify"] == "off"]
    seconds = statistics.median(line["seconds"] for line in warm)
    limit = statistics.median(line["limit_seconds"] for line in warm)
    summary = {
        "median_of": len(warm),
        "bytes": warm[0]["bytes"],
        "ring_bytes": warm[0]["ring_bytes"],
        "gather_seconds": statistics.median(line["gather_seconds"] for line in warm),
        "seconds": seconds,
        "limit_seconds": limit,
        "limit": "memcpy" if arguments.device == "cpu" else "pinned H2D",
    }
    if arguments.verify:
        verified = statistics.median(line["seconds"] for line in rest if line["verify"] != "off")
        summary |= {
            "verified_seconds": verified,
            "verify_cost": round(verified / seconds - 1, 3),
            "digest_seconds": warm[0]["digest_seconds"],
        }
    print(json.dumps(common | summary | figures(warm[0]["bytes"], seconds, limit)))


def figures(nbytes: int, seconds: float, limit: float) -> dict[str, float]:
    return {"gb_per_second": round(nbytes / seconds / 1e9, 2), "ratio": round(limit / seconds, 3)}


if __name__ == "__main__":
    main()
