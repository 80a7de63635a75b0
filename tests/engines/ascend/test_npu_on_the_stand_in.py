"""Runs what needs torch to know "npu" in a process of its own, and checks what holds where it does not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckpt_engine.devices import detect_device, npu
from ckpt_engine.devices.npu_environment import PORT_VARIABLES, port_problem
from ckpt_engine.errors import ConfigError
from tests.engines.ascend.conftest import STUB

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.mark.parametrize("file", ["npu_device_checks.py", "npu_extension_checks.py"])
def test_in_a_process_with_npus(file: str, tmp_path: Path) -> None:
    paths = [str(STUB), str(ROOT), os.environ.get("PYTHONPATH")]
    machine = f"{os.getpid()}-{file.split('_')[1]}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)],
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "FAKE_NPU_MACHINE": machine,
            "CKPT_ENGINE_SOCKET_DIR": str(tmp_path / "s"),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    for left in Path("/dev/shm").glob(f"fake-npu-{machine}-*"):
        left.unlink()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_without_torch_npu_there_is_no_npu() -> None:
    assert detect_device(None) in ("cuda", "cpu")
    with pytest.raises(ConfigError, match=r"torch_npu, which cannot be imported.*set_env.sh"):
        detect_device("npu")


def test_ports_that_the_engine_has_too_are_told() -> None:
    first, second = PORT_VARIABLES
    for good in ("auto", "61000", "61000-61050", "61000-61010,62000"):
        assert port_problem({first: good, second: "auto"}) is None
    for environment, says in (
        ({}, f"{first} and {second} not set: hccl listens on port 16666"),
        ({first: "auto"}, f"{second} not set"),
        ({first: "auto", second: ""}, f"{second} not set"),
        ({first: "61000..61050", second: "auto"}, f"{first}='61000..61050': neither 'auto' nor ports"),
    ):
        problem = port_problem(environment)
        assert problem is not None
        assert says in problem[0]
        assert "'auto' on every rank and for the engine" in problem[1]


def test_a_shared_files_contents_begin_where_torch_puts_them() -> None:
    """Where the counters of readers are looked for: torch's own allocator writes the file."""
    storage = torch.arange(5, dtype=torch.int64).untyped_storage()
    _, name, nbytes = storage._share_filename_cpu_()
    data = (Path("/dev/shm") / name.decode().lstrip("/")).read_bytes()
    assert len(data) == npu._COUNTERS_OFFSET + nbytes
    assert torch.frombuffer(bytearray(data[npu._COUNTERS_OFFSET :]), dtype=torch.int64).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
