"""A death in the middle of an update on a GPU, while copies and reloads are enqueued on both sides."""

from __future__ import annotations

import json
import os
import signal
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
    "CKPT_ENGINE_REPLY_TIMEOUT": "8",
    "CKPT_ENGINE_STALL_TIMEOUT": "8",
}
PROMPT_SECONDS = 20.0
STOPPED_SECONDS = 20.0
"""More for a stopped worker: time to answer, to say goodbye, and for `req_func`."""
BUCKETS = 64
MIDDLE = 20
SERVER = """
import json, os, sys, torch
from ckpt_engine import ParameterServer
from ckpt_engine.errors import UpdateError
def pages():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmPin", "VmLck")}
ps = ParameterServer(device="cuda")
torch.cuda.mem_get_info(0)
before = pages()
ps.register_checkpoint("a", named_tensors={f"t{i}": torch.full((1024, 1024), float(i)) for i in range(128)})
ps.gather_metas("a")
for line in sys.stdin:
    if line == "unregister\\n":
        ps.unregister_checkpoint("a", force=True)
        now = pages()
        print(json.dumps({key: now[key] - before[key] for key in now}), flush=True)
        continue
    def req_func(paths):
        print(json.dumps({"paths": paths}), flush=True)
        sys.stdin.readline()
    free = torch.cuda.mem_get_info(0)[0]
    try:
        ended = ps.update("a", req_func, timeout=60).version
        error = None
    except UpdateError as failed:
        ended, error = None, str(failed)
    taken = free - torch.cuda.mem_get_info(0)[0]
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

    def say(self, word: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
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


def start(
    worker: Worker, paths: list[tuple[str, str]], ended: dict[str, Any], progress: Path
) -> threading.Thread:
    """Lets the worker receive, in a thread; each bucket is 50 ms of work for its device."""

    def run() -> None:
        begin = time.monotonic()
        try:
            worker.update(paths, {"kind": "slow", "progress": str(progress)})
        except RuntimeError as error:
            ended["error"] = str(error)
        ended["seconds"] = time.monotonic() - begin

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def wait_for_middle(progress: Path) -> None:
    deadline = time.monotonic() + 30
    while bucket_of(progress) < MIDDLE:
        assert time.monotonic() < deadline, "the worker never came to the middle bucket"
        time.sleep(0.01)


def bucket_of(progress: Path) -> int:
    text = progress.read_text() if progress.exists() else ""
    return int(text) if text else -1


def good_update(server: Server, worker: Worker, progress: Path) -> None:
    server.say()
    thread = start(worker, server.hear()["paths"], {}, progress)
    server.say()  # req_func returns
    heard = server.hear()
    assert heard["error"] is None
    assert heard["taken"] <= 8 * 1024 * 1024
    thread.join(60)
    assert worker.last["status"]["outcome"] == "committed"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_outlives_its_parameter_server(server: Server, tmp_path: Path, end: signal.Signals) -> None:
    worker = Worker(0, **ENVIRONMENT)
    progress = tmp_path / "bucket"
    try:
        server.say()
        ended: dict[str, Any] = {}
        thread = start(worker, server.hear()["paths"], ended, progress)
        wait_for_middle(progress)
        server.process.send_signal(end)
        begin = time.monotonic()
        thread.join(60)
        assert not thread.is_alive()
        assert MIDDLE <= bucket_of(progress) < BUCKETS - 1, "it was not in the middle"
        cause = "PeerLost" if end == signal.SIGKILL else "no answer from the parameter server"
        assert cause in ended["error"]
        assert time.monotonic() - begin < PROMPT_SECONDS
        server.close()
        follower = Server()
        try:
            good_update(follower, worker, progress)
        finally:
            follower.close()
    finally:
        worker.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_parameter_server_outlives_its_worker(server: Server, tmp_path: Path, end: signal.Signals) -> None:
    worker = Worker(0, **ENVIRONMENT)
    progress = tmp_path / "bucket"
    server.say()
    thread = start(worker, server.hear()["paths"], {}, progress)
    wait_for_middle(progress)
    worker.process.send_signal(end)
    begin = time.monotonic()
    server.say()  # req_func returns
    heard = server.hear()
    assert time.monotonic() - begin < PROMPT_SECONDS + (STOPPED_SECONDS if end == signal.SIGSTOP else 0)
    assert MIDDLE <= bucket_of(progress) < BUCKETS - 1, "it was not in the middle"
    assert heard["version"] is None
    assert ("died" if end == signal.SIGKILL else "stopped, or stuck") in heard["error"]
    assert "GPU-death" in heard["error"]
    assert "stage buckets, bucket" in heard["error"]
    worker.close()
    thread.join(60)
    worker = Worker(0, **ENVIRONMENT)
    try:
        if end == signal.SIGKILL:
            good_update(server, worker, progress)
        else:
            # The memory of the ring stays taken, as long as the worker may read it.
            server.say()
            thread = start(worker, server.hear()["paths"], {}, progress)
            server.say()
            assert server.hear()["error"] is None
            thread.join(60)
        server.say("unregister")
        left = server.hear()
        assert left["VmPin"] <= 0
        assert left["VmLck"] <= 0
        assert left["VmRSS"] < 256 * 1024 * 1024, "the checkpoint of 512 MiB is still there"
    finally:
        worker.close()
