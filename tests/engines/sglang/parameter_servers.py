"""Parameter servers for the tests: one in the tests' own process, or one in a process of its own per rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_engine import ParameterServer
from ckpt_engine.settings import Verify
from ckpt_engine.update.session import UpdateReport
from tests.engines.sglang.servers import Server, end_group
from tests.integration.conftest import free_port

RANK_SECONDS = 280.0
SocketPaths = list[tuple[str, str]]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(checkpoint / "model.safetensors"))


def update_from(
    server: Server,
    checkpoint: Path | Mapping[str, torch.Tensor],
    *,
    slot_nbytes: int | None = None,
    timeout: float = 120,
    ask: Callable[[SocketPaths], object] | None = None,
    verify: Verify = "off",
    **options: Any,  # noqa: ANN401 - of SglangServer.update
) -> UpdateReport:
    """One update of a server with one rank, as a program would do it that has both in its hands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_ENGINE_HOST_ID", server.host)
        if slot_nbytes is not None:
            patch.setenv("CKPT_ENGINE_SLOT_MIB", str(slot_nbytes / 2**20))
        with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
            digests = verify != "off"
            if isinstance(checkpoint, Path):
                files = [str(checkpoint / "model.safetensors")]
                ps.register_checkpoint("new", files=files, digests=digests)
            else:
                ps.register_checkpoint("new", named_tensors=dict(checkpoint), digests=digests)
            ps.gather_metas("new")
            call = ask or (lambda paths: server.client.update(paths, timeout - 20, **options))
            return ps.update("new", call, timeout=timeout, verify=verify)


def command_line(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m ckpt_engine_sglang.sglang_update ARGUMENTS`, without a launcher's variables."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt_engine_sglang.sglang_update", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=RANK_SECONDS)
    finally:
        end_group(process)  # a launcher that is killed leaves its ranks behind
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def launch_on_hosts(
    servers: Sequence[Server],
    model: Path,
    *arguments: str,
    master: str = "127.0.0.1",
    on_host: Callable[[int], AbstractContextManager[object]] = nullcontext,
    **environment: str,
) -> list[subprocess.CompletedProcess[str]]:
    """The command on each host, with one rank for its own server.

    Args:
        servers: one for each host.
        master: address of host 0.
        on_host: in which the command is started there.
    """
    port = free_port()
    with ExitStack() as ending:
        made = []
        for node, server in enumerate(servers):
            command = [
                *(sys.executable, "-m", "ckpt_engine_sglang.sglang_update"),
                *("--checkpoint-path", str(model), "--checkpoint-name", "everywhere"),
                *(part for each in servers for part in ("--endpoint", each.url)),
                *("--nnodes", str(len(servers)), "--node-rank", str(node), "--inference-parallel-size", "1"),
                *("--master-addr", master, "--master-port", str(port), *arguments),
            ]
            with on_host(node):
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={
                        **os.environ,
                        "CKPT_ENGINE_HOST_ID": server.host,
                        "OMP_NUM_THREADS": "1",
                        **environment,
                    },
                    start_new_session=True,
                )
            ending.callback(end_group, process)
            made.append(process)
        return [_completed(process) for process in made]


def _completed(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """One that does not end is killed, so that what it and the others said is known."""
    try:
        text = process.communicate(timeout=RANK_SECONDS)
    except subprocess.TimeoutExpired:
        end_group(process)
        text = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, *text)


@contextmanager
def ranks(
    server: Server, checkpoint: Path, *, faults: Sequence[Mapping[str, object]] = ()
) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each of the server's ranks, all in one update (see rank_process.py)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = []
    try:
        for rank in range(server.rank_count):
            request = {
                "url": server.url,
                "checkpoint": str(checkpoint),
                "fault": faults[rank] if rank < len(faults) else {},
            }
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(server.rank_count),
                "LOCAL_WORLD_SIZE": str(server.rank_count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port - 1),
                "OMP_NUM_THREADS": "1",
                "CKPT_ENGINE_HOST_ID": server.host,
                "CKPT_ENGINE_SLOT_MIB": str(1 / 16),
            }
            made.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.engines.sglang.rank_process", json.dumps(request)],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
        yield made
    finally:
        for process in made:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()


def outcomes(server: Server, checkpoint: Path, **options: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """What each rank says of one update; {} for one that was killed."""
    with ranks(server, checkpoint, **options) as processes:
        texts = [process.communicate(timeout=RANK_SECONDS)[0] for process in processes]
    return [json.loads(text.splitlines()[-1]) if text else {} for text in texts]
