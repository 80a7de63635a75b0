"""Ranks with a GPU each, and nccl between them, torch's or vLLM's: a rank or a worker ends in the middle of
an update."""

from __future__ import annotations

import importlib.util
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
import torch

from tests.integration.conftest import free_port
from tests.support.rank import Worker

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "TEST_DEVICE": "cuda",
    "CKPT_ENGINE_SLOT_MIB": "8",
    "CKPT_ENGINE_REPLY_TIMEOUT": "8",
    "CKPT_ENGINE_STALL_TIMEOUT": "8",
}
RANKS = 2
TENSORS = 128
MIDDLE = 20
"""Of the buckets, 4 MiB in each of the tensors: 64 and more."""
KILLED_SECONDS = 10.0
STOPPED_SECONDS = 40.0

SERVER = """
import json, os, sys, time, torch
from ckpt_engine import ParameterServer
from ckpt_engine.errors import UpdateError
said_to = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print (vLLM logs there) goes where errors go
def say(**what): print(json.dumps(what), file=said_to, flush=True)
ps = ParameterServer(device="cuda")
def share(part, of, version):
    return {f"t{i}": torch.full((1024, 1024), float(version + i)) for i in range(part, int(sys.argv[1]), of)}
for line in sys.stdin:
    said = json.loads(line)
    ranks = said["ranks"]
    try:
        ps.unregister_checkpoint("a")
        ps.register_checkpoint("a", named_tensors=share(ranks.index(ps.rank), len(ranks), said["version"]))
        ps.gather_metas("a", ranks=ranks if len(ranks) < ps.world_size else None)
        def req_func(paths):
            say(paths=paths)
            sys.stdin.readline()
        report = ps.update("a", req_func, timeout=60, ranks=ranks)
        say(version=report.version, error=None, at=time.monotonic())
    except UpdateError as failed:
        say(version=None, error=str(failed), at=time.monotonic())
ps.close()
"""


class Pair:
    """One rank's parameter server and its worker, on a GPU of their own."""

    def __init__(self, rank: int, port: int, custom_dist: str, progress: Path) -> None:
        self.progress = progress
        self.worker = Worker(0, **ENVIRONMENT, TEST_GPU=str(rank))
        place = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        where |= {"CKPT_ENGINE_CUSTOM_DIST": custom_dist}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(TENSORS)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | place | where,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ended: dict[str, Any] = {}
        self._thread = threading.Thread(target=lambda: None)

    def say(self, **what: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(what) + "\n")
        self.server.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the parameter server ended"
        return dict(json.loads(line))

    def receive(self, fault: dict[str, Any] | None) -> None:
        """The worker receives, in a thread, once the parameter server asks its engine."""
        paths = self.hear()["paths"]
        self.ended = {}

        def run() -> None:
            try:
                self.worker.update(paths, fault)
            except RuntimeError as error:
                self.ended["error"] = str(error)

        self._thread = threading.Thread(target=run)
        self._thread.start()
        self.say()  # req_func returns

    def wait_for_middle(self) -> None:
        deadline = time.monotonic() + 60
        while not self.progress.exists() or int(self.progress.read_text() or -1) < MIDDLE:
            assert time.monotonic() < deadline, "the worker never came to the middle bucket"
            time.sleep(0.01)

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()
        self.worker.close()


@pytest.fixture(params=["auto", "vllm_nccl"])
def custom_dist(request: pytest.FixtureRequest) -> str:
    if request.param == "vllm_nccl" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    return str(request.param)


@pytest.fixture
def pairs(custom_dist: str, tmp_path: Path) -> Iterator[list[Pair]]:
    port = free_port()
    pairs = [Pair(rank, port, custom_dist, tmp_path / f"bucket-{rank}") for rank in range(RANKS)]
    yield pairs
    for pair in pairs:
        pair.close()


def update(pairs: list[Pair], version: int, *, slow: bool = False) -> None:
    """Starts one; `slow`: 50 ms of work for the device in each bucket."""
    for pair in pairs:
        pair.say(ranks=list(range(len(pairs))), version=version)
    for pair in pairs:
        pair.receive({"kind": "slow", "progress": str(pair.progress)} if slow else None)


def committed(pairs: list[Pair], version: int) -> None:
    for pair in pairs:
        assert pair.hear()["error"] is None
        pair.join()
        assert pair.worker.last["status"]["outcome"] == "committed"
    digests = [pair.worker.last["digests"] for pair in pairs]
    assert digests[0] == digests[-1]
    assert len(digests[0]) == TENSORS
    assert len(set(digests[0].values())) == TENSORS, f"version {version}: tensors of the same bits"


def test_updates_follow_one_another(pairs: list[Pair]) -> None:
    seen = []
    for version in (0, 1000, 0):
        update(pairs, version)
        committed(pairs, version)
        seen.append(pairs[1].worker.last["digests"])
    assert seen[0] == seen[2]
    assert set(seen[0].values()).isdisjoint(seen[1].values())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_outlives_another(pairs: list[Pair], end: signal.Signals) -> None:
    """Its broadcasts are enqueued on its device, and wait there for one that will never come."""
    update(pairs, 0)
    committed(pairs, 0)
    update(pairs, 1000, slow=True)
    survivor, victim = pairs
    survivor.wait_for_middle()
    begin = time.monotonic()
    victim.server.send_signal(end)
    heard = survivor.hear()
    limit = KILLED_SECONDS if end == signal.SIGKILL else STOPPED_SECONDS
    assert heard["error"] is not None
    assert "rank 1" in heard["error"]
    assert heard["at"] - begin < limit
    survivor.join()
    assert "rank 1" in survivor.ended["error"]
    victim.join()
    assert victim.ended["error"]
    update([survivor], 2000)
    committed([survivor], 2000)


def test_ranks_outlive_a_worker(pairs: list[Pair]) -> None:
    update(pairs, 1000, slow=True)
    pairs[0].wait_for_middle()
    begin = time.monotonic()
    pairs[1].worker.process.kill()
    for pair in pairs:
        heard = pair.hear()
        assert heard["error"] is not None
        assert "rank 1" in heard["error"]
        assert "died" in heard["error"]
        assert heard["at"] - begin < KILLED_SECONDS
    pairs[0].join()
    assert pairs[0].ended["error"]
    pairs[1].join()
    pairs[1].worker.close()
    pairs[1].worker = Worker(0, **ENVIRONMENT, TEST_GPU="1")
    update(pairs, 2000)
    committed(pairs, 2000)
