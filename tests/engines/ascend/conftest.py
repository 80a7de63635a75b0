"""The fake npu-smi on PATH, and a clean memory of which NPU a process uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ckpt_engine_ascend import identity

FAKE_NPU_SMI = Path(__file__).parent / "npu_smi" / "bin"
STUB = Path(__file__).parent / "stub"
"""Packages torch_npu and vllm: only for processes of their own, or torch would know "npu" in all tests."""
IP = "10.0.0.7"


@pytest.fixture
def scenario(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes npu-smi answer as in a scenario of cases.json; `pid`: the sample's pid that is this process."""

    def choose(name: str, pid: int | None = None) -> None:
        monkeypatch.setenv("PATH", f"{FAKE_NPU_SMI}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_NPU_SMI_SCENARIO", name)
        if pid is not None:
            monkeypatch.setenv(f"FAKE_PID__{pid}", str(os.getpid()))

    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CKPT_ENGINE_DEVICE_UUID", raising=False)
    monkeypatch.setenv("CKPT_ENGINE_HOST_ID", IP)
    monkeypatch.setattr(identity, "_NUMBERS", {})
    monkeypatch.setattr(identity, "sees_own_pids", lambda: True)  # wherever the tests run
    return choose
