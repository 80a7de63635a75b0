"""Two servers on two hosts, as far as the parameter servers can tell, in one update."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.engines.sglang.parameter_servers import RANK_SECONDS
from tests.engines.sglang.servers import Checkpoints, Server, end_group
from tests.integration.conftest import free_port

pytestmark = pytest.mark.timeout(600)


def launch(
    servers: tuple[Server, Server], model: object, *arguments: str
) -> list[subprocess.CompletedProcess[str]]:
    """The command on each of two hosts, each with one rank for its own server."""
    port = free_port()
    with ExitStack() as ending:
        made = []
        for node, server in enumerate(servers):
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ckpt_engine_sglang.sglang_update"),
                    *("--checkpoint-path", str(model), "--checkpoint-name", "everywhere"),
                    *(part for each in servers for part in ("--endpoint", each.url)),
                    *("--nnodes", "2", "--node-rank", str(node), "--inference-parallel-size", "1"),
                    *("--master-addr", "127.0.0.1", "--master-port", str(port), *arguments),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "CKPT_ENGINE_HOST_ID": server.host, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            ending.callback(end_group, process)
            made.append(process)
        texts = [process.communicate(timeout=RANK_SECONDS) for process in made]
        return [
            subprocess.CompletedProcess([], process.returncode, *text)
            for process, text in zip(made, texts, strict=True)
        ]


def test_one_launch_updates_both(pair: tuple[Server, Server], checkpoints: Checkpoints) -> None:
    pair[0].fail()
    for seed in (2, 1):
        done = launch(pair, checkpoints("llama", seed), "--verify")
        assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
        assert "checksums of 1 ranks of 2 servers compared" in done[0].stdout
        assert re.search(r"^update [\d.]+ s$", done[0].stdout, re.MULTILINE)
        assert pair[0].state() == pair[1].state()
        assert pair[0].generate()[1] == pair[1].generate()[1] == "everywhere"
    received = pair[1].state()
    pair[1].load_from_disk(checkpoints("llama", 1))
    assert received == pair[1].state()


def test_one_server_that_fails_keeps_both_from_it(
    pair: tuple[Server, Server], checkpoints: Checkpoints
) -> None:
    pair[0].fail(at="load", rank=0, action="raise")
    try:
        done = launch(pair, checkpoints("llama", 2))
    finally:
        pair[0].fail()
    assert [each.returncode for each in done] == [1, 1]
    for each in done:
        assert "injected before load" in each.stderr
        assert "host here" in each.stderr
    done = launch(pair, checkpoints("llama", 1))
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    assert pair[0].state() == pair[1].state()
