"""What benchmarks of whole updates share: ranks and their workers, each a process, and their weights."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import zmq

from ckpt_engine import ParameterServer
from ckpt_engine.devices import make_device
from ckpt_engine.ipc.receiver import serve_update
from ckpt_engine.settings import load_settings

Shapes = dict[str, tuple[int, int]]
Lines = list[dict[str, Any]]
Tensors = list[tuple[str, torch.Tensor]]
Handles = list[tuple[str, str]]
Context = zmq.Context[zmq.Socket[bytes]]
Receive = Callable[[Context, Handles, str, int | None, Callable[[Tensors], None]], dict[str, Any]]
"""(context, handles, device UUID, device index, run) -> a status with an `outcome`. A function of a module:
its name is sent to another process."""

_SPAWN = multiprocessing.get_context("spawn")


def shapes_of(nbytes: int, tensor_mib: float) -> Shapes:
    """bf16 matrices of about `tensor_mib` MiB each, `nbytes` in all."""
    each = max(2048, int(tensor_mib * 1024 * 1024))
    count = max(1, nbytes // each)
    return {f"layers.{i:05d}.weight": (each // 2048, 1024) for i in range(count)}


def share_of(shapes: Shapes, rank: int, ranks: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """This rank's tensors, with values that follow from the seed."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    block = torch.randint(-100, 100, (1024 * 1024,), dtype=torch.int16, generator=generator)
    tensors = {}
    for name in list(shapes)[rank::ranks]:
        rows, columns = shapes[name]
        tensor = torch.empty(rows * columns, dtype=torch.int16)
        for start in range(0, tensor.numel(), block.numel()):
            part = tensor[start : start + block.numel()]
            part.copy_(block[: part.numel()])
        tensors[name] = tensor.view(torch.bfloat16).view(rows, columns)
    return tensors


def sum_of(tensors: dict[str, torch.Tensor]) -> float:
    """Of the first element of each: enough to tell one version from another."""
    return sum(float(tensor.view(torch.int16)[0, 0]) for tensor in tensors.values())


def process_figures(pid: int | str = "self") -> dict[str, int]:
    """What a process holds now: bytes of anonymous memory and of shared memory, descriptors, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "anonymous_bytes": int(status["RssAnon"].split()[0]) * 1024,
        "shared_bytes": int(status["RssShmem"].split()[0]) * 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


class Worker:
    """An engine's worker process, with parameters on the device.

    `receive`: what it receives an update with; see `Receive`.
    """

    def __init__(self, kind: str, index: int, shapes: Shapes, receive: Receive | None = None) -> None:
        self._pipe, there = _SPAWN.Pipe()
        arguments = (kind, index, shapes, there, receive or receive_ours)
        # A daemon: a rank that fails must not wait for it.
        self._process = _SPAWN.Process(target=_work, args=arguments, daemon=True)
        self._process.start()

    def wait_until_ready(self) -> None:
        assert self._pipe.recv() == "ready"

    def update(self, handles: list[tuple[str, str]]) -> float:
        """Lets it receive; the seconds that `run` took, its engine's time.

        Raises:
            RuntimeError: it did not commit.
        """
        self._pipe.send(handles)
        status = self._pipe.recv()
        if status["outcome"] != "committed":
            raise RuntimeError(status["error"])
        return float(status["run_seconds"])

    def sum(self) -> float:
        """What its parameters sum to (`sum_of`)."""
        self._pipe.send("sum")
        return float(self._pipe.recv())

    def figures(self) -> dict[str, int]:
        self._pipe.send("figures")
        return dict(self._pipe.recv())

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()
        if self._process.exitcode:
            raise SystemExit(f"the worker ended with {self._process.exitcode}")


def receive_ours(
    context: Context, handles: Handles, uuid: str, index: int | None, run: Callable[[Tensors], None]
) -> dict[str, Any]:
    return serve_update(context, handles, uuid, index, run=run)


def _work(kind: str, index: int, shapes: Shapes, pipe: Connection, receive: Receive) -> None:
    torch.set_num_threads(1)
    number = index % torch.cuda.device_count() if kind == "cuda" else None
    device = torch.device("cpu") if number is None else torch.device("cuda", number)
    parameters = {
        name: torch.zeros(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()
    }
    uuid = make_device(kind, load_settings(), index if number is None else number).uuid()
    context = zmq.Context()
    pipe.send("ready")

    seconds = 0.0

    def run(tensors: Tensors) -> None:
        nonlocal seconds
        begin = time.perf_counter()
        for name, tensor in tensors:
            parameters[name].copy_(tensor, non_blocking=True)
        seconds += time.perf_counter() - begin

    while (message := pipe.recv()) is not None:
        if message == "figures":
            pipe.send(process_figures())
            continue
        if message == "sum":
            pipe.send(sum_of(parameters))
            continue
        seconds = 0.0
        status = receive(context, message, uuid, number, run)
        pipe.send(status | {"run_seconds": seconds})


def parameter_server(rank: int, ranks: int, kind: str, port: int) -> ParameterServer:
    return ParameterServer(
        rank=rank,
        world_size=ranks,
        master_addr="127.0.0.1",
        master_port=port,
        device=kind,
        gpu_count=torch.cuda.device_count() if kind == "cuda" else ranks,
    )


def run_ranks(
    serve: Callable[[int, argparse.Namespace, int], Lines],
    arguments: argparse.Namespace,
    processes: BaseContext = _SPAWN,
) -> list[Lines]:
    """Runs `serve(rank, arguments, port)` in a process for each of `arguments.ranks`; what each returned.

    `processes`: how they are made.

    Raises:
        SystemExit: a rank failed.
    """
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = int(sock.getsockname()[1])
    with tempfile.TemporaryDirectory() as out:
        ranks = [
            processes.Process(target=_run_rank, args=(serve, rank, arguments, port, out))  # type: ignore[attr-defined]
            for rank in range(arguments.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(1)
        return [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(arguments.ranks)]


def _run_rank(
    serve: Callable[[int, argparse.Namespace, int], Lines],
    rank: int,
    arguments: argparse.Namespace,
    port: int,
    out: str,
) -> None:
    torch.set_num_threads(1)
    os.environ["CKPT_ENGINE_SOCKET_DIR"] = f"{out}/sockets"
    if arguments.device == "cuda" and arguments.ranks > torch.cuda.device_count():
        # Ranks share a GPU, whose own UUID would be there twice.
        os.environ["CKPT_ENGINE_DEVICE_UUID"] = f"GPU-benchmark-{rank}"
    Path(out, f"{rank}.json").write_text(json.dumps(serve(rank, arguments, port)))
