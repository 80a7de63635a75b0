"""A parameter server in the tests' own process, for engines with one worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_engine import ParameterServer
from ckpt_engine.settings import Verify
from ckpt_engine.update.session import UpdateReport
from tests.engines.vllm.engines import OfflineEngine


def update_from(
    engine: OfflineEngine,
    checkpoint: Path | Mapping[str, torch.Tensor],
    *,
    slot_nbytes: int | None = None,
    timeout: float = 120,
    device: str = "cpu",
    verify: Verify = "off",
    **options: Any,  # noqa: ANN401 - of the worker's method
) -> UpdateReport:
    """One update, as a program would do it that has both in its hands."""

    def ask(socket_paths: list[tuple[str, str]]) -> None:
        (status,) = engine.rpc("update_weights_from_ipc", socket_paths, **options)
        if status["outcome"] != "committed":
            raise RuntimeError(f"the engine says: {status['error']}")

    return update_by(checkpoint, ask, slot_nbytes=slot_nbytes, timeout=timeout, device=device, verify=verify)


def update_by(
    checkpoint: Path | Mapping[str, torch.Tensor],
    ask: Callable[[list[tuple[str, str]]], None],
    *,
    slot_nbytes: int | None = None,
    timeout: float = 120,
    device: str = "cpu",
    verify: Verify = "off",
) -> UpdateReport:
    """The same, by a program that asks its engine in a way of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_ENGINE_HOST_ID", "here")
        patch.setenv("CKPT_ENGINE_P2P", "off")  # nothing is read by it, and ending it takes a second
        if slot_nbytes is not None:
            patch.setenv("CKPT_ENGINE_SLOT_MIB", str(slot_nbytes / 2**20))
        with ParameterServer(rank=0, world_size=1, device=device) as ps:
            digests = verify != "off"
            if isinstance(checkpoint, Path):
                files = [str(checkpoint / "model.safetensors")]
                ps.register_checkpoint("new", files=files, digests=digests)
            else:
                ps.register_checkpoint("new", named_tensors=dict(checkpoint), digests=digests)
            ps.gather_metas("new")
            return ps.update("new", ask, timeout=timeout, verify=verify)
