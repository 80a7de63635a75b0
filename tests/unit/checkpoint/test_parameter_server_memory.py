"""The options of `register_checkpoint` and `unregister_checkpoint` reach the memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import contents, expected
from pinner_for_tests import FakePinner
from safetensors.torch import save_file

from ckpt_engine import ParameterServer, parameter_server
from ckpt_engine.checkpoint import arena
from ckpt_engine.devices import CpuDevice
from ckpt_engine.devices.numa import NumaPlace
from ckpt_engine.errors import CheckpointError

WEIGHTS = {"w": torch.arange(2000.0)}


@pytest.fixture
def pinner(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePinner]:
    with FakePinner() as fake:
        monkeypatch.setattr(CpuDevice, "pinner", fake)
        yield fake


@pytest.fixture
def file(shm: Path) -> Path:
    save_file(WEIGHTS, shm / "a.safetensors")
    return shm / "a.safetensors"


def test_the_devices_pinner_is_used(pinner: FakePinner) -> None:
    with ParameterServer(device="cpu") as ps:
        ps.register_checkpoint("c", named_tensors=WEIGHTS)
        assert len(pinner.held) == 1
        ps.unregister_checkpoint("c")
        assert pinner.held == {}
        ps.register_checkpoint("c", named_tensors=WEIGHTS)


@pytest.mark.parametrize("how", ["argument", "environment", "neither"])
def test_in_place(how: str, pinner: FakePinner, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "environment":
        monkeypatch.setenv("CKPT_ENGINE_INPLACE_PIN", "true")
    with ParameterServer(device="cpu") as ps:
        ps.register_checkpoint("c", files=[file], use_inplace_pin_memory=how == "argument")
        held = ps._registry.get("c")
        assert contents(held) == expected(WEIGHTS)
        assert len(held.files) == (how != "neither")
        assert file.exists() == (how == "neither")
        assert len(pinner.held) == 1
        ps.gather_metas("c")
        assert ps.get_metas()[0].buffers == held.buffers


def test_pool(pinner: FakePinner, caplog: pytest.LogCaptureFixture) -> None:
    with ParameterServer(device="cpu") as ps:
        epochs = set()
        for name in ("a", "b"):
            ps.register_checkpoint(name, named_tensors=WEIGHTS, use_shared_memory_pool=True)
            ps.gather_metas(name)
            epochs.add(ps.get_metas()[0].epoch)
            with pytest.raises(CheckpointError, match="unregister it first"):
                ps.register_checkpoint("x", named_tensors=WEIGHTS, use_shared_memory_pool=True)
            ps.unregister_checkpoint(name)
            assert len(pinner.held) == 1
        assert len(epochs) == 2
        assert pinner.calls == 1
        ps.unregister_checkpoint("b", force=True)
        assert pinner.held == {}
        assert caplog.text == ""
        ps.unregister_checkpoint("b", force=True)
        assert "'b' is not registered" in caplog.text


@pytest.mark.parametrize("on", [True, False])
def test_host_memory_is_made_near_the_device(
    pinner: FakePinner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on: bool
) -> None:
    near = frozenset([max(os.sched_getaffinity(0))])
    monkeypatch.setenv("CKPT_ENGINE_NUMA", str(on).lower())
    monkeypatch.setattr(parameter_server, "numa_place_of", lambda *_: NumaPlace(1, near))
    seen: list[frozenset[int]] = []
    real = arena._populate

    def populate(*arguments: Any) -> None:  # noqa: ANN401
        seen.append(frozenset(os.sched_getaffinity(0)))
        real(*arguments)

    monkeypatch.setattr(arena, "_populate", populate)
    with caplog.at_level("INFO"), ParameterServer(device="cpu", rank=0, world_size=1) as ps:
        ps.register_checkpoint("c", named_tensors=WEIGHTS)
        ps.register_checkpoint("d", named_tensors=WEIGHTS, use_shared_memory_pool=True)
    assert seen == ([near] if on else [frozenset(os.sched_getaffinity(0))]) * 2
    assert ("cpu 0 is on NUMA node 1, of whose CPUs 1 are allowed here" in caplog.text) == on
