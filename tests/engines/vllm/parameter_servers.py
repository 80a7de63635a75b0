"""A parameter server in the tests' own process, for engines with one worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_engine import ParameterServer
from ckpt_engine.update.session import UpdateReport
from tests.engines.vllm.engines import OfflineEngine


def update_from(
    engine: OfflineEngine,
    checkpoint: Path | Mapping[str, torch.Tensor],
    *,
    slot_nbytes: int | None = None,
    timeout: float = 120,
    device: str = "cpu",
    **options: Any,  # noqa: ANN401 - of the worker's method
) -> UpdateReport:
    """One update, as a program would do it that has both in its hands."""

    def ask(socket_paths: list[tuple[str, str]]) -> None:
        (status,) = engine.rpc("update_weights_from_ipc", socket_paths, **options)
        if status["outcome"] != "committed":
            raise RuntimeError(f"the engine says: {status['error']}")

    return update_by(checkpoint, ask, slot_nbytes=slot_nbytes, timeout=timeout, device=device)


def update_by(
    checkpoint: Path | Mapping[str, torch.Tensor],
    ask: Callable[[list[tuple[str, str]]], None],
    *,
    slot_nbytes: int | None = None,
    timeout: float = 120,
    device: str = "cpu",
) -> UpdateReport:
    """The same, by a program that asks its engine in a way of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_ENGINE_HOST_ID", "here")
        patch.setenv("CKPT_ENGINE_P2P", "off")  # nothing is read by it, and ending it takes a second
        if slot_nbytes is not None:
            patch.setenv("CKPT_ENGINE_SLOT_MIB", str(slot_nbytes / 2**20))
        with ParameterServer(rank=0, world_size=1, device=device) as ps:
            if isinstance(checkpoint, Path):
                ps.register_checkpoint("new", files=[str(checkpoint / "model.safetensors")])
            else:
                ps.register_checkpoint("new", named_tensors=dict(checkpoint))
            ps.gather_metas("new")
            return ps.update("new", ask, timeout=timeout)
