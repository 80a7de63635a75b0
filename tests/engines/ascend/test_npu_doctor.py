"""What `ckpt-engine doctor` says of NPUs. With a (stand-in for) torch_npu: npu_device_checks.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ckpt_engine_ascend import findings
from ckpt_engine_ascend.findings import find
from ckpt_engine_ascend.identity import NAME_IT
from typer.testing import CliRunner

from ckpt_engine.cli.main import app
from ckpt_engine.devices.npu_environment import PORT_VARIABLES
from ckpt_engine.findings import Finding, Level
from ckpt_engine.settings import load_settings

AUTO = dict.fromkeys(PORT_VARIABLES, "auto")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed"
)


def examine(**environment: str) -> dict[str, Finding]:
    return {finding.subject: finding for finding in find(load_settings(), environment)}


def test_nothing_is_said_where_there_is_no_npu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(findings, "DRIVER", tmp_path / "davinci_manager")
    assert examine() == {}
    (tmp_path / "davinci_manager").touch()
    found = examine(**AUTO)
    assert "not found on PATH" in found["npu-smi"].message
    assert "Mount it (-v /usr/local/bin/npu-smi" in found["npu-smi"].remedy
    assert found["npu-smi"].level is Level.WARNING


def test_npus_without_torch_npu(scenario: Callable[..., None]) -> None:
    scenario("a3_8x2")
    found = examine(**AUTO)
    assert found["npu-smi"] == Finding("npu-smi", Level.OK, "lists 16 chips of 8 NPUs")
    assert found["torch_npu"].level is Level.ERROR
    assert "set_env.sh" in found["torch_npu"].remedy
    assert found["npu ports"].level is Level.OK


@pytest.mark.parametrize(
    ("name", "says", "remedy"),
    [
        ("dcmi_fail", "dcmi module initialize failed. ret is -8005", "Load the driver, add the user to"),
        ("no_permission", "ret is -8002", "Run as root in the container, or add the user to"),
        ("device_used", "ret is -8020", "Another container holds the device: stop it"),
        ("phyid_remap", "Invalid card id.", "run `npu-smi info -m` here"),
    ],
)
def test_npu_smis_own_words_are_shown_with_the_way_out(
    scenario: Callable[..., None], name: str, says: str, remedy: str
) -> None:
    scenario(name)
    found = examine()["npu-smi"]
    assert found.level is Level.WARNING
    assert says in found.message
    assert found.remedy.startswith(remedy)
    assert found.remedy.endswith(NAME_IT)


def test_the_command_says_it_with_the_remedy(scenario: Callable[..., None]) -> None:
    """As an operator sees it: in text, in JSON, and in the exit status."""
    scenario("no_permission")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1, "torch_npu is missing"
    assert "ret is -8002" in done.stdout
    assert "remedy: Run as root in the container" in done.stdout
    listed = CliRunner().invoke(app, ["doctor", "--json"])
    (found,) = [one for one in json.loads(listed.stdout) if one["subject"] == "npu ports"]
    assert found["level"] == "warning"
    assert "16666" in found["message"]


def test_a_torch_npu_that_cannot_be_loaded_does_not_end_the_doctor(tmp_path: Path) -> None:
    """Without CANN's libraries. torch would load it by itself, and not be importable."""
    package, metadata = tmp_path / "torch_npu", tmp_path / "torch_npu-2.13.0.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_engine.cli.main", "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    found = {one["subject"]: one for one in json.loads(done.stdout)}
    assert found["torch_npu"]["level"] == "error"
    assert "libhccl.so" in found["torch_npu"]["message"]
    assert "set_env.sh" in found["torch_npu"]["message"]
    assert "npu ports" in found


def test_port_16666_is_explained(scenario: Callable[..., None]) -> None:
    scenario("a2_8npu")
    ports = examine(HCCL_NPU_SOCKET_PORT_RANGE="auto")["npu ports"]
    assert ports.level is Level.WARNING
    assert ports.message.startswith("HCCL_HOST_SOCKET_PORT_RANGE not set")
    assert "16666" in ports.message
    assert "'auto' on every rank and for the engine" in ports.remedy
    assert examine(**AUTO)["npu ports"].level is Level.OK
    assert "neither 'auto' nor ports" in examine(**(AUTO | {PORT_VARIABLES[0]: "any"}))["npu ports"].message


def test_memory_that_cannot_be_shared_is_told(scenario: Callable[..., None]) -> None:
    scenario("a2_8npu")
    memory = examine(PYTORCH_NPU_ALLOC_CONF="expandable_segments:True")["npu memory"]
    assert memory.level is Level.WARNING
    assert "expandable_segments:False" in memory.message
    assert "npu memory" not in examine()


def test_a_rank_table_must_be_json(scenario: Callable[..., None], tmp_path: Path) -> None:
    scenario("a2_8npu")
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"server_count": "1"}))
    assert examine(RANK_TABLE_FILE=str(table))["rank table"].level is Level.OK
    table.write_text('{"server_count": "1"  // one\n}')
    assert "without comments" in examine(RANK_TABLE_FILE=str(table))["rank table"].remedy
    assert examine(RANK_TABLE_FILE=str(tmp_path / "none"))["rank table"].level is Level.ERROR
