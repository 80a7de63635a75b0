from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_for_cli_tests import Engine
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from ckpt_engine.cli.main import app
from tests.support import loggers

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def lone_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's environment, and a host name of our own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CKPT_ENGINE_HOST_ID", "here")


@pytest.fixture
def cli() -> Iterator[Cli]:
    with loggers.put_back():
        yield lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files without an index: 4 tensors, 10 496 bytes."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(
        {"a.weight": torch.arange(2048, dtype=torch.float32), "a.bias": torch.ones(32, dtype=torch.bfloat16)},
        directory / "one.safetensors",
    )
    save_file(
        {"b.weight": torch.ones(16, 64, dtype=torch.bfloat16), "b[red]": torch.ones(4, 12)},
        directory / "two.safetensors",
    )
    return directory


@pytest.fixture
def lying_file(tmp_path: Path) -> Path:
    """Claims more bytes than it has."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}).encode()
    path = tmp_path / "lying.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(40))
    return path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    # pytest's tmp_path may be too long for a Unix socket.
    sockets = tempfile.mkdtemp(prefix="cli-")
    monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", sockets)
    engine = Engine()
    yield engine
    engine.close()
    shutil.rmtree(sockets)
