"""A rank with a worker on a GPU joins by P2P what another fleet holds: through pinned staging, to the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.mooncake import need_mooncake
from tests.support.worker import digest

need_mooncake()

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "TEST_DEVICE": "cuda",
    "CKPT_ENGINE_P2P": "on",
    "CKPT_ENGINE_SLOT_MIB": "16",
}
COUNT = 64
OWNER = """
import sys, torch
from ckpt_engine import ParameterServer
from ckpt_engine.metadata import metas_to_json
def tensors(version):
    return {f"t{i}": torch.full((1024, 1024), float(version + i)) for i in range(int(sys.argv[1]))}
with ParameterServer(device="cuda", rank=0, world_size=1, gpu_count=1) as ps:
    for line in sys.stdin:
        ps.unregister_checkpoint("a")
        ps.register_checkpoint("a", named_tensors=tensors(int(line)))
        ps.gather_metas("a")
        print(metas_to_json(ps.get_metas()).decode(), flush=True)
"""
JOINER = """
import json, sys
from ckpt_engine import ParameterServer
from ckpt_engine.metadata import metas_from_json
from tests.support.rank import Worker
worker = Worker(0)
with ParameterServer(device="cuda", rank=0, world_size=1, gpu_count=1) as ps:
    for line in sys.stdin:
        ps.load_metas(metas_from_json(line))
        report = ps.update("a", lambda paths: worker.update(paths, None), timeout=120, ranks=[0])
        print(json.dumps({"digests": worker.last["digests"], "transport": report.transport,
                          "bytes": report.p2p_nbytes, "seconds": report.seconds}), flush=True)
worker.close()
"""


class Program:
    def __init__(self, body: str, device: str, port: int, *arguments: str) -> None:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CKPT_ENGINE_DEVICE_UUID": device}
        self._process = subprocess.Popen(
            [sys.executable, "-c", body, *arguments],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | where,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> Any:  # noqa: ANN401
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "it ended"
        return json.loads(answer)

    def close(self) -> int:
        self._process.communicate()
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_a_rank_joins_version_after_version() -> None:
    from tests.integration.conftest import free_port

    owner = Program(OWNER, "GPU-owner", free_port(), str(COUNT))
    joiner = Program(JOINER, "GPU-joiner", free_port())
    try:
        for version in (0, 1000, 0):
            metas = owner.ask(str(version))
            seen = joiner.ask(json.dumps(metas))
            assert seen["bytes"] == COUNT * 4 * 1024 * 1024
            assert seen["transport"] == "tcp"
            assert seen["digests"] == {
                f"t{i}": digest(torch.full((1024, 1024), float(version + i))) for i in range(COUNT)
            }
        assert joiner.close() == 0
        assert owner.close() == 0
    finally:
        joiner.kill()
        owner.kill()
