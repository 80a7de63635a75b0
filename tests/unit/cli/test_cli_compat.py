from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def run_compat(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ckpt_engine.cli.main", "compat", "--", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_command_finds_our_modules() -> None:
    done = run_compat(
        *(sys.executable, "-c"),
        "import ckpt_engine, checkpoint_engine\nfrom checkpoint_engine import ps, worker\n"
        "assert ps.ParameterServer is checkpoint_engine.ParameterServer is ckpt_engine.ParameterServer\n"
        "assert worker.update_weights_from_ipc is checkpoint_engine.update_weights_from_ipc\n"
        "print(checkpoint_engine.__file__)",
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parts[-4:-1] == ("ckpt_engine", "compat", "checkpoint_engine")


def test_the_key_of_an_npu_is_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang puts the prefix before it."""
    code = "from checkpoint_engine.device_utils import npu_generate_uuid as key; print(key())"
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", "NPU-10.0.0.7-5")
    assert run_compat(sys.executable, "-c", code).stdout == "10.0.0.7-5\n"
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", "mine")
    assert "CKPT_ENGINE_DEVICE_UUID='mine'" in run_compat(sys.executable, "-c", code).stderr


def test_its_options_and_its_exit_status_are_its_own() -> None:
    done = run_compat(sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "--help", "-v")
    assert (done.returncode, done.stdout.strip()) == (7, "['--help', '-v']")


def test_no_such_command(cli: Cli) -> None:
    done = cli("compat", "--", "no-such-command-anywhere")
    assert (done.exit_code, done.stderr) == (1, "error: no command 'no-such-command-anywhere' on the path\n")


def test_a_worker_loads_no_parameter_server() -> None:
    done = run_compat(
        *(sys.executable, "-c"),
        "import sys, checkpoint_engine.worker\nassert 'ckpt_engine.parameter_server' not in sys.modules",
    )
    assert done.returncode == 0, done.stderr
