"""Updates of one size, over and over: seconds of every stage, beside the limit measured in the same run.

    python -m benchmarks.update --device cpu --gib 1 --ranks 2 --json
    python -m benchmarks.update --device cuda --gib 16 --json

Every rank registers its share as tensors, and has a worker process that copies each tensor into a parameter
of its own. One JSON line for each update (the first one is cold), and a last one with the medians of the
others. `limit_seconds`: on CPU one memcpy of all bytes in one process; on CUDA the copy of all bytes from
the registered host memory to the device, in pieces of 256 MiB. `ratio` = limit / ours.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zmq

from ckpt_engine import ParameterServer
from ckpt_engine.devices import cpu_uuid, detect_device
from ckpt_engine.ipc.receiver import serve_update
from ckpt_engine.settings import load_settings

PIECE_NBYTES = 256 * 1024 * 1024


def shapes_of(nbytes: int, tensor_mib: float) -> dict[str, tuple[int, ...]]:
    """bf16 matrices of about `tensor_mib` MiB each, `nbytes` in all."""
    each = max(2048, int(tensor_mib * 1024 * 1024))
    count = max(1, nbytes // each)
    return {f"layers.{i:05d}.weight": (each // 2048, 1024) for i in range(count)}


def work(local_index: int, kind: str, pipe: Connection) -> None:
    """An engine's worker: parameters on the device, updated whenever handles come through the pipe."""
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
    shapes = pipe.recv()
    parameters = {name: torch.zeros(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes}
    uuid = pipe.recv()
    context = zmq.Context()
    pipe.send("ready")

    def run(tensors: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            parameters[name].copy_(tensor, non_blocking=True)

    while (handles := pipe.recv()) is not None:
        status = serve_update(context, handles, uuid, 0 if kind == "cuda" else None, run=run)
        sums = sum(float(parameters[name].view(torch.int16)[0, 0]) for name in parameters)
        pipe.send(status | {"sum": sums})


def serve(rank: int, arguments: argparse.Namespace, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ["CKPT_ENGINE_SOCKET_DIR"] = f"{out}/sockets"
    kind = arguments.device
    if kind == "cuda":
        os.environ["CKPT_ENGINE_DEVICE_UUID"] = f"GPU-benchmark-{rank}"
    here, there = multiprocessing.get_context("spawn").Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(rank, kind, there))
    worker.start()
    shapes = shapes_of(int(arguments.gib * 2**30), arguments.tensor_mib)
    here.send(list(shapes.items()))
    settings = load_settings()
    uuid = settings.device_uuid or cpu_uuid(settings, rank)
    here.send(uuid)
    mine = list(shapes)[rank :: arguments.ranks]
    torch.manual_seed(rank)
    block = torch.randint(-100, 100, (1024 * 1024,), dtype=torch.int16)
    tensors = {}
    for name in mine:
        rows, columns = shapes[name]
        repeated = block.repeat(-(-rows * columns // block.numel()))[: rows * columns]
        tensors[name] = repeated.view(torch.bfloat16).view(rows, columns)
    expected = sum(float(tensor.view(torch.int16)[0, 0]) for tensor in tensors.values())
    lines: list[dict[str, Any]] = []
    with ParameterServer(
        rank=rank,
        world_size=arguments.ranks,
        master_addr="127.0.0.1",
        master_port=port,
        device=kind,
        gpu_count=1 if kind == "cuda" else arguments.ranks,
    ) as ps:
        begin = time.perf_counter()
        ps.register_checkpoint("benchmark", named_tensors=tensors)
        register_seconds = time.perf_counter() - begin
        del tensors
        assert here.recv() == "ready"

        def req_func(paths: list[tuple[str, str]]) -> None:
            here.send(paths)
            status = here.recv()
            if status["outcome"] != "committed":
                raise RuntimeError(status["error"])
            if arguments.ranks == 1 and status["sum"] != expected:
                raise RuntimeError(f"the worker's parameters sum to {status['sum']}, not {expected}")

        for number in range(arguments.rounds + 1):
            limit = limit_seconds(ps, kind, shapes) if rank == 0 else 0.0
            begin = time.perf_counter()
            ps.gather_metas("benchmark")
            gathered = time.perf_counter()
            report = ps.update("benchmark", req_func, timeout=600)
            lines.append(
                {
                    "round": number,
                    "bytes": report.nbytes,
                    "tensors": report.tensors,
                    "buckets": report.buckets,
                    "ring_bytes": report.ring_nbytes,
                    "register_seconds": round(register_seconds, 4),
                    "gather_seconds": round(gathered - begin, 5),
                    "seconds": round(report.seconds, 5),
                    "stages": {stage: round(seconds, 5) for stage, seconds in report.stages.items()},
                    "limit_seconds": round(limit, 5),
                }
            )
    here.send(None)
    worker.join()
    if rank == 0:
        Path(out, "lines.json").write_text(json.dumps(lines))
    if worker.exitcode:
        raise SystemExit(1)


def limit_seconds(ps: ParameterServer, kind: str, shapes: dict[str, tuple[int, ...]]) -> float:
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
    parser.add_argument("--json", action="store_true", help="only JSON lines (they are printed anyway)")
    arguments = parser.parse_args()
    arguments.device = detect_device(arguments.device)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = int(sock.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as out:
        ranks = [
            context.Process(target=serve, args=(rank, arguments, port, out))
            for rank in range(arguments.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(1)
        lines = json.loads(Path(out, "lines.json").read_text())
    common = {"benchmark": "update", "device": arguments.device, "ranks": arguments.ranks}
    for line in lines:
        print(json.dumps(common | line | figures(line["bytes"], line["seconds"], line["limit_seconds"])))
    warm = lines[1:] or lines
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
    print(json.dumps(common | summary | figures(warm[0]["bytes"], seconds, limit)))


def figures(nbytes: int, seconds: float, limit: float) -> dict[str, float]:
    return {"gb_per_second": round(nbytes / seconds / 1e9, 2), "ratio": round(limit / seconds, 3)}


if __name__ == "__main__":
    main()
