"""A death in the middle of an update on a GPU, while copies and reloads are enqueued on both sides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.rank import Worker

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "TEST_DEVICE": "cuda",
    "CKPT_ENGINE_DEVICE_UUID": "GPU-death",
    "CKPT_ENGINE_SLOT_MIB": "8",
    "CKPT_ENGINE_REPLY_TIMEOUT": "20",
}
PROMPT_SECONDS = 20.0
SERVER = """
import json, sys, torch
from ckpt_engine import ParameterServer
from ckpt_engine.errors import UpdateError
ps = ParameterServer(device="cuda")
ps.register_checkpoint("a", named_tensors={f"t{i}": torch.full((1024, 1024), float(i)) for i in range(128)})
ps.gather_metas("a")
for line in sys.stdin:
    def req_func(paths):
        print(json.dumps({"paths": paths}), flush=True)
        sys.stdin.readline()
    before = torch.cuda.mem_get_info(0)[0]
    try:
        ended = ps.update("a", req_func, timeout=60).version
        error = None
    except UpdateError as failed:
        ended, error = None, str(failed)
    taken = before - torch.cuda.mem_get_info(0)[0]
    print(json.dumps({"version": ended, "error": error, "taken": taken}), flush=True)
"""


class Server:
    """A parameter server process that updates whenever it is told to."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the parameter server ended"
        return dict(json.loads(line))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def start(worker: Worker, paths: list[tuple[str, str]], ended: dict[str, Any]) -> threading.Thread:
    """Lets the worker receive, slowly, in a thread."""

    def run() -> None:
        begin = time.monotonic()
        try:
            worker.update(paths, {"kind": "slow"})
        except RuntimeError as error:
            ended["error"] = str(error)
        ended["seconds"] = time.monotonic() - begin

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_worker_outlives_its_parameter_server(server: Server) -> None:
    worker = Worker(0, **ENVIRONMENT)
    try:
        server.say()
        ended: dict[str, Any] = {}
        thread = start(worker, server.hear()["paths"], ended)
        # 64 buckets of 50 ms of device work each: the worker is in the middle of them.
        deadline = time.monotonic() + 20
        while not device_is_busy() and time.monotonic() < deadline:
            time.sleep(0.01)
        server.process.kill()
        killed = time.monotonic()
        thread.join(60)
        assert not thread.is_alive()
        assert "PeerLost" in ended["error"] or "died" in ended["error"], ended
        assert time.monotonic() - killed < PROMPT_SECONDS
        follower = Server()
        try:
            follower.say()
            thread = start(worker, follower.hear()["paths"], ended := {})
            follower.say()
            assert follower.hear()["error"] is None
            thread.join(60)
            assert worker.last["status"]["outcome"] == "committed"
        finally:
            follower.close()
    finally:
        worker.close()


def test_a_parameter_server_outlives_its_worker(server: Server) -> None:
    worker = Worker(0, **ENVIRONMENT)
    server.say()
    thread = start(worker, server.hear()["paths"], {})
    deadline = time.monotonic() + 20
    while not device_is_busy() and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.process.kill()
    begin = time.monotonic()
    server.say()  # req_func returns
    heard = server.hear()
    assert time.monotonic() - begin < PROMPT_SECONDS
    assert heard["version"] is None
    assert "died" in heard["error"]
    assert "GPU-death" in heard["error"]
    thread.join(60)
    worker.close()
    worker = Worker(0, **ENVIRONMENT)
    try:
        server.say()
        thread = start(worker, server.hear()["paths"], {})
        server.say()
        again = server.hear()
        assert again["error"] is None
        assert again["taken"] <= 8 * 1024 * 1024
        thread.join(60)
        assert worker.last["status"]["outcome"] == "committed"
    finally:
        worker.close()


def device_is_busy() -> bool:
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() not in ("", "0")
