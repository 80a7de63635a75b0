"""Launches real ranks under torchrun, once per world, and keeps what each of them saw."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.worker import digest

ROOT = Path(__file__).parents[2]
SEED = 20261124


@dataclass(frozen=True)
class World:
    """One launch: its size, the checkpoints' digests, and scenario -> result by rank."""

    size: int
    hosts: int
    first: dict[str, str]
    second: dict[str, str]
    ranks: list[dict[str, Any]]
    socket_dir: Path
    trace_dir: Path

    def results(self, scenario: str) -> list[dict[str, Any]]:
        return [rank[scenario] for rank in self.ranks]


def make_checkpoint(directory: Path, seed: int) -> dict[str, str]:
    """Several shards with an index; one tensor is larger than a slot of 1 MiB, one is empty."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"layers.{layer}.{name}": torch.randn(shape, generator=generator).to(dtype)
        for layer in range(6)
        for name, shape, dtype in (
            ("q", (256, 512), torch.bfloat16),
            ("norm", (513,), torch.float32),
            ("mlp", (384, 700), torch.float16),
            ("steps", (7,), torch.int64),
        )
    }
    tensors["embed"] = torch.randn((3000, 512), generator=generator).to(torch.bfloat16)
    tensors["scalar"] = torch.tensor(float(seed))
    tensors["nothing"] = torch.empty((0, 4), dtype=torch.float16)
    names = sorted(tensors)
    shards = [names[start::3] for start in range(3)]
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in shard}, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return {name: digest(tensor) for name, tensor in tensors.items()}


def free_port() -> int:
    """A port whose successor is free too: the control store takes MASTER_PORT + 1."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return int(port)


def torchrun(size: int, module: str, *arguments: str, timeout: float, **environment: str) -> str:
    """Runs `module` on `size` ranks; fails the test with all output unless every rank ends well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", module, *arguments]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Ranks are in sessions of their own: SIGTERM lets the launcher end them first.
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"torchrun did not end within {timeout} s:\n{output[-8000:]}")
    if process.returncode:
        pytest.fail(f"torchrun ended with {process.returncode}:\n{output[-8000:]}")
    return output


@pytest.fixture(scope="session")
def broken_engine() -> Iterator[str]:
    """An engine that answers 500 to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b'{"error": "CUDA error: the engine is unwell"}'
            self.send_response(500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/collective_rpc"
    server.shutdown()
    server.server_close()
    thread.join()


def launch(out: Path, size: int, hosts: int, broken_engine: str, **environment: str) -> World:
    """Runs the scenarios of tests/support/rank.py on `size` ranks."""
    device = environment.get("TEST_DEVICE", "cpu") + environment.get("TEST_GPUS", "")
    sockets = Path("/tmp") / f"ce-test-{os.getpid()}-{size}-{hosts}-{device}"
    first = make_checkpoint(out / "first", SEED)
    second = make_checkpoint(out / "second", SEED + 1)
    arguments = [str(out), str(out / "first"), str(out / "second"), "http://127.0.0.1:9/collective_rpc"]
    output = torchrun(
        size,
        "tests.support.rank",
        *arguments,
        broken_engine,
        timeout=240,
        TEST_HOSTS=str(hosts),
        CKPT_ENGINE_SLOT_MIB="1",
        CKPT_ENGINE_SOCKET_DIR=str(sockets),
        CKPT_ENGINE_TRACE_DIR=str(out / "traces"),
        GLOO_SOCKET_IFNAME="lo",
        **environment,
    )
    (out / "output.txt").write_text(output)
    ranks = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(size)]
    return World(size, hosts, first, second, ranks, sockets, out / "traces")


@pytest.fixture(scope="session", params=[(1, 1), (2, 1), (4, 1), (4, 2)], ids=["1", "2", "4", "4-on-2-hosts"])
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, broken_engine: str
) -> Iterator[World]:
    size, hosts = request.param
    world = launch(tmp_path_factory.mktemp("world"), size, hosts, broken_engine)
    yield world
    shutil.rmtree(world.socket_dir, ignore_errors=True)
