"""MoonshotAI's checkpoint-engine, from the package index, beside ours."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ckpt_engine_sglang import plugin

from tests.engines.sglang.parameter_servers import update_from
from tests.engines.sglang.servers import Checkpoints, Server, with_stubs

pytestmark = pytest.mark.timeout(600)
RELEASE = "0.4.2"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is; without what it needs, since it is found, and never run."""
    directory = tmp_path_factory.mktemp("other-package")
    command = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*command, "--target", directory, f"checkpoint-engine=={RELEASE}"], check=True)
    return directory


def test_a_server_beside_it_is_updated_all_the_same(
    installed: Path, checkpoints: Checkpoints, log: Callable[[str], Path]
) -> None:
    path = os.pathsep.join([with_stubs(os.environ), str(installed)])
    server = Server(checkpoints("llama", 1), log("other-package"), PYTHONPATH=path)
    try:
        server.wait("/health")
        dummy = server.state()
        update_from(server, checkpoints("llama", 1))
        received = server.state()
        server.load_from_disk(checkpoints("llama", 1))
        assert server.state() == received != dummy
        told = f"not the package checkpoint-engine {RELEASE} ({installed / plugin.STOCK_PACKAGE})"
        assert told in server.log.read_text()
    finally:
        server.close()


def test_it_is_left_alone_where_sglang_s_own_handler_would_use_it(
    sglang_in_process: None,
    installed: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] == plugin.STOCK_PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(installed)
    with caplog.at_level(logging.WARNING, logger=plugin.__name__):
        plugin.serve_stock_handler("it is too new")
    assert plugin.STOCK_PACKAGE not in sys.modules
    assert f"with the package checkpoint-engine {RELEASE}" in caplog.text
    assert "pip uninstall checkpoint-engine" in caplog.text
