"""A server that loads no plugin, as those before 0.5.15: SGLang's own handler, our worker on its path."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckpt_engine.compat import DIRECTORY
from tests.engines.sglang.parameter_servers import outcomes, update_from
from tests.engines.sglang.servers import WAIT, Checkpoints, Server, with_stubs

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def bare(checkpoints: Checkpoints, log: Callable[[str], Path]) -> Iterator[Server]:
    server = Server(
        *(checkpoints("llama", 1), log("bare"), WAIT),
        SGLANG_PLUGINS="none",
        SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="600",
        PYTHONPATH=os.pathsep.join([str(DIRECTORY), with_stubs(os.environ)]),
    )
    try:
        yield server.wait()
    finally:
        server.close()


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    # What SGLang's own handler takes the CPU for.
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", f"GPU-{platform.machine()}")


def test_its_weights_are_updated(bare: Server, disk_server: Server, checkpoints: Checkpoints) -> None:
    assert not bare.client.is_ready()
    update_from(bare, checkpoints("llama", 2), slot_nbytes=64 * 1024)
    bare.client.wait_until_ready(120)
    disk_server.load_from_disk(checkpoints("llama", 2))
    try:
        assert bare.state() == disk_server.state()
    finally:
        disk_server.load_from_disk(checkpoints("llama", 1))
    update_from(bare, checkpoints("llama", 1), weight_version="first")
    assert bare.state() == disk_server.state()
    assert bare.generate()[1] == "first"


def test_a_parameter_server_that_dies_does_not_block_it(
    bare: Server, disk_server: Server, checkpoints: Checkpoints
) -> None:
    update_from(bare, checkpoints("llama", 1))
    assert outcomes(bare, checkpoints("llama", 2), faults=[{"kind": "exit", "after": 100_000}]) == [{}]
    bare.generate()
    update_from(bare, checkpoints("llama", 1))
    assert bare.state() == disk_server.state()
