from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ckpt_engine import __version__
from ckpt_engine.errors import ConfigError


def test_runs_as_a_module_for_torchrun() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_engine.cli.main", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for command in ("update", "serve", "inspect", "plan", "demo"):
        assert command in done.stdout


def test_help_loads_neither_torch_nor_the_http_client() -> None:
    code = (
        "import sys, ckpt_engine.cli.main; print({'torch', 'httpx', 'pydantic', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "httpx", "pydantic"}.isdisjoint(eval(done.stdout))


def test_an_error_is_one_message_and_status_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_engine.cli.main", "inspect", tmp_path / "none"],
        capture_output=True,
        text=True,
        env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"},
    )
    assert done.returncode == 1
    assert done.stderr == f"[rank 1] error: {tmp_path / 'none'} does not exist\n"
    assert not done.stdout


def test_verbose_shows_the_traceback(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("inspect", tmp_path / "none", "-v")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith(f"error: {tmp_path / 'none'} does not exist\n")


@pytest.mark.parametrize("args", [(), ("nonsense",), ("update",), ("plan", "x"), ("demo", "--size", "huge")])
def test_bad_usage_is_status_2(cli: Callable[..., Any], args: tuple[str, ...]) -> None:
    assert cli(*args).exit_code == 2


def test_one_update_has_nothing_to_put_back(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("update", "--checkpoint-path", tmp_path, "--on-failure", "restore")
    assert done.exit_code == 2
    assert "run this command once more with the checkpoint before" in done.stderr


def test_version(cli: Callable[..., Any]) -> None:
    assert cli("--version").stdout == f"ckpt-engine {__version__}\n"


@pytest.mark.parametrize("status", [0, 3])
def test_demo_ends_with_its_status(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    calls: list[dict[str, object]] = []
    _replace_demo(monkeypatch, lambda **options: calls.append(options) or status)
    done = cli("demo", "--size", "tiny", "--keep")
    assert done.exit_code == status
    assert not done.output
    assert calls == [{"size": "tiny", "keep": True}]


def test_demo_reports_its_errors(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_demo(**_: object) -> int:
        raise ConfigError("install ckpt-engine[demo]")

    _replace_demo(monkeypatch, run_demo)
    done = cli("demo")
    assert (done.exit_code, done.stderr) == (1, "error: install ckpt-engine[demo]\n")


def _replace_demo(monkeypatch: pytest.MonkeyPatch, run_demo: Callable[..., object]) -> None:
    module = ModuleType("ckpt_engine.cli.demo")
    module.run_demo = run_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ckpt_engine.cli.demo", module)
