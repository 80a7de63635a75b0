"""A server that gets its weights from the memory of parameter servers that another server was updated by."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engines.sglang.parameter_servers import command_line, update_from
from tests.engines.sglang.servers import Checkpoints, Server, end_group

pytestmark = pytest.mark.timeout(600)
SAVE_SECONDS = 120.0


@pytest.mark.parametrize("method", ["p2p", "all"])
def test_the_methods_of_sglang_s_own_updater(
    server: Server, disk_server: Server, checkpoints: Checkpoints, method: str
) -> None:
    update_from(server, checkpoints("llama", 2))
    done = command_line(
        *("--checkpoint-path", checkpoints("llama", 1), "--endpoint", server.url, "--update-method", method),
        *("--weight-version", method),
    )
    assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
    assert server.state() == disk_server.state()
    assert server.generate()[1] == method


def test_a_server_joins(
    server: Server, disk_server: Server, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    pytest.importorskip("mooncake.engine", reason="mooncake is not installed, or libibverbs is missing")
    update_from(server, checkpoints("llama", 1))
    metas = tmp_path / "metas.json"
    fleet = subprocess.Popen(
        [
            *(sys.executable, "-m", "ckpt_engine_sglang.sglang_update", "--endpoint", disk_server.url),
            *("--checkpoint-path", str(checkpoints("llama", 2)), "--save-metas-file", str(metas)),
            *("--weight-version", "shared", "--sleep-time", "600"),
        ],
        env={**os.environ, "CKPT_ENGINE_HOST_ID": disk_server.host, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + SAVE_SECONDS
        while not metas.exists() or disk_server.client.weight_version() != "shared":
            assert fleet.poll() is None, "the first server's update failed"
            assert time.monotonic() < deadline, f"no metas after {SAVE_SECONDS} s"
            time.sleep(0.1)
        done = command_line(
            *("--load-metas-file", metas, "--endpoint", server.url, "--weight-version", "joined")
        )
        assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
        assert server.state() == disk_server.state()
        assert server.generate()[1] == "joined"
    finally:
        end_group(fleet)
        disk_server.load_from_disk(checkpoints("llama", 1))
