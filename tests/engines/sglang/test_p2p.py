"""A server that gets its weights from the memory of parameter servers that already hold them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from safetensors.torch import save_file

from tests.engines.sglang.parameter_servers import command_line, launch_on_hosts, tensors_of, update_from
from tests.engines.sglang.servers import Checkpoints, Server, end_group
from tests.integration.conftest import free_port

pytestmark = pytest.mark.timeout(600)
SAVE_SECONDS = 120.0


@pytest.fixture(scope="module")
def in_two_files(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second checkpoint, so that each of two ranks holds a part of it."""
    directory = tmp_path_factory.mktemp("in-two-files")
    tensors = sorted(tensors_of(checkpoints("llama", 2)).items())
    half = len(tensors) // 2
    for number, part in enumerate((tensors[:half], tensors[half:])):
        save_file(dict(part), directory / f"model-{number}.safetensors")
    return directory


@pytest.mark.parametrize("method", ["p2p", "all"])
def test_the_methods_of_sglang_s_own_updater(
    server: Server, disk_server: Server, checkpoints: Checkpoints, in_two_files: Path, method: str
) -> None:
    """Of two servers: the first one reads what the other one's rank holds."""
    pytest.importorskip("mooncake.engine", reason="mooncake is not installed, or libibverbs is missing")
    update_from(server, checkpoints("llama", 1))
    first = server.weights()
    options = ("--update-method", method, "--weight-version", method)
    try:
        done = launch_on_hosts([server, disk_server], in_two_files, *options)
        assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
        assert "read by P2P (tcp)" in done[0].stdout
        assert server.generate()[1] == method
        assert (disk_server.client.weight_version() == method) is (method == "all")
        assert (disk_server.weights() == first) is (method == "p2p")
        received = server.state()
        disk_server.load_from_disk(checkpoints("llama", 2))
        assert received == disk_server.state()
    finally:
        disk_server.load_from_disk(checkpoints("llama", 1))


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


def test_a_server_joins_a_fleet_that_serves(
    server: Server, disk_server: Server, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """`ckpt-engine serve` tells what it holds over HTTP; no server was updated by it."""
    pytest.importorskip("mooncake.engine", reason="mooncake is not installed, or libibverbs is missing")
    update_from(server, checkpoints("llama", 2))
    port = free_port()
    token = {"CKPT_ENGINE_API_TOKEN": "sesame"}
    own = token | {"CKPT_ENGINE_HOST_ID": "elsewhere", "CKPT_ENGINE_P2P": "on"}
    with subprocess.Popen(
        [sys.executable, "-m", "ckpt_engine.cli.main", "serve", "--port", str(port)],
        env={**os.environ, **own, "CKPT_ENGINE_ALLOWED_ROOTS": str(checkpoints("llama", 1))},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as fleet:
        try:
            assert fleet.stdout is not None
            assert fleet.stdout.readline() == f"rank 0 of 1 listens on http://127.0.0.1:{port}\n"
            url = f"http://127.0.0.1:{port}"
            for path, body in (
                ("files", {"files": str(checkpoints("llama", 1))}),
                ("gather-metas", {}),
            ):
                answer = httpx.post(
                    f"{url}/v1/checkpoints/step-1/{path}",
                    params={"all_ranks": "true"},
                    json=body,
                    headers={"Authorization": "Bearer sesame"},
                    timeout=SAVE_SECONDS,
                )
                assert answer.status_code == 200, answer.text
            done = command_line(
                "--join", url, "--endpoint", server.url, "--weight-version", "joined", **token
            )
            assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
            assert "read by P2P (tcp)" in done.stdout
        finally:
            end_group(fleet)
    assert server.state() == disk_server.state()
    assert server.generate()[1] == "joined"
