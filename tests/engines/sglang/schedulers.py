"""A scheduler made up of what is asked of it, around models of plain torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ckpt_engine_sglang.options import MARK
from ckpt_engine_sglang.worker_update import WorkerUpdate

from ckpt_engine import ParameterServer
from ckpt_engine.settings import Verify

NamedTensors = Iterable[tuple[str, torch.Tensor]]
SEED = 20261124


def serve(scheduler: Scheduler, handles: dict[str, str]) -> tuple[bool, str]:
    from sglang.srt.runtime_context import get_parallel

    request = SimpleNamespace(zmq_handles=handles, flush_cache=True, weight_version="new")
    with get_parallel().override(tp_size=1, pp_size=1, moe_ep_size=1, attn_dp_size=scheduler.attention_dp):
        return WorkerUpdate(scheduler, request).serve()


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape), requires_grad=False)


class Plain(torch.nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, parameter(*shape))
        self.calls: list[list[str]] = []

    def load_weights(self, weights: NamedTensors) -> None:
        parameters, seen = dict(self.named_parameters()), []
        for name, tensor in weights:
            seen.append(name)
            if name in parameters:
                parameters[name].data.copy_(tensor)
        self.calls.append(seen)


@dataclass
class Scheduler:
    """What the handler asks of SGLang's weight updater and scheduler."""

    runners: list[tuple[str, Any]]
    idle: bool = True
    offload_tags: set[str] = field(default_factory=set)
    attention_dp: int = 1
    did: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tp_worker = SimpleNamespace(model_runner=self.runners[0][1])
        self.scheduler = SimpleNamespace(is_fully_idle=lambda ignore_waiting: self.idle, _engine_paused=False)

    def _select_runners(self) -> list[tuple[str, Any]]:
        return self.runners

    def record_weight_version_after_update(self, version: str | None) -> None:
        self.did.append(f"version {version}")

    def flush_cache_after_weight_update(self, request: Any, success: bool, message: str) -> tuple[bool, str]:  # noqa: ANN401
        self.did.append("flush")
        return success, message


class OldScheduler(Scheduler):
    """As in SGLang 0.5.21."""

    def flush_cache_after_weight_update(self, request: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        self.did.append("flush")


def runner(model: torch.nn.Module, path: str = "/models/m") -> Any:  # noqa: ANN401
    config = SimpleNamespace(model_path=path, dtype=torch.float32, hf_config=SimpleNamespace())
    return SimpleNamespace(
        model=model, model_config=config, device="cpu", gpu_id=0, weight_updater=SimpleNamespace()
    )


def update(
    scheduler: Scheduler,
    tensors: dict[str, torch.Tensor],
    *,
    slot_nbytes: int = 2**20,
    verify: Verify = "off",
    **options: object,
) -> tuple[bool, str]:
    """One update; the handler's answer. Raises what the parameter server raises."""
    answer: list[tuple[bool, str]] = []

    def ask(paths: list[tuple[str, str]]) -> None:
        behind = MARK + json.dumps(options) if options else ""
        answer.append(serve(scheduler, {uuid: handle + behind for uuid, handle in paths}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_ENGINE_SLOT_MIB", str(slot_nbytes / 2**20))
        with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
            ps.register_checkpoint("new", named_tensors=tensors, digests=verify != "off")
            ps.gather_metas("new")
            ps.update("new", ask, timeout=60, verify=verify)
    return answer[0]


def drawn(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
