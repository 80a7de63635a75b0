"""What differs between versions of SGLang, told by its form, not by its number. From 0.5.15 to 0.5.23.

Everything else in this package asks here for what was renamed, moved or added between those versions.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_engine.errors import ConfigError

MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
TOKENIZER = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"
PIPELINE = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin"
MAKE_MODEL = "sglang.srt.model_loader.loader._initialize_model"
_NEEDED = {
    MANAGER: ("_observe_weight_load", "update_weights_from_ipc", "flush_cache_after_weight_update"),
    TOKENIZER: ("init_communicators", "update_weights_from_ipc", "_update_weight_version_if_provided"),
    LOADER: ("load_weights_and_postprocess",),
    MAKE_MODEL: (),
    PIPELINE: ("_pp_send_pyobj_to_next_stage",),
    "sglang.srt.runtime_context.get_parallel": (),
}
_PARAMETERS = {
    "update_weights_from_ipc": [["self", "recv_req"]],
    "flush_cache_after_weight_update": [["self", "recv_req"], ["self", "recv_req", "success", "message"]],
    "record_weight_version_after_update": [["self", "weight_version"]],
    "_select_runners": [["self", "selector"]],
}
"""Of the manager's methods, in any of the versions that are known; the last two are not in all of them."""


def unknown_layout() -> str | None:
    """Why this package does not fit the installed SGLang; None: it does."""
    found: dict[str, Any] = {}
    for path, names in _NEEDED.items():
        module, _, name = path.rpartition(".")
        try:
            found[path] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            return f"it has no {path} ({error})"
        missing = [each for each in names if not hasattr(found[path], each)]
        if missing:
            return f"its {name} has no {', '.join(missing)}"
    for name, known in _PARAMETERS.items():
        method = getattr(found[MANAGER], name, None)
        parameters = list(inspect.signature(method).parameters) if method is not None else known[0]
        if parameters not in known:
            return f"its {name} takes {parameters}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How many ranks share a model; `tp` of them a tensor, `pp` its layers, `ep` its experts. `attention_dp`:
    groups of them whose attention is data parallel."""

    tp: int
    pp: int
    ep: int
    attention_dp: int


def parallel() -> Parallel:
    from sglang.srt.runtime_context import get_parallel

    found = get_parallel()
    return Parallel(
        tp=found.tp_size,
        pp=found.pp_size,
        ep=found.moe_ep_size,
        attention_dp=getattr(found, "attn_dp_size", 1),
    )


def model_runners(manager: Any) -> list[tuple[str, Any]]:  # noqa: ANN401 - SchedulerWeightUpdaterManager
    """`(role, ModelRunner)` of the target ("target") and of each draft model.

    Raises:
        ConfigError: there is a draft model, of a form that is not known.
    """
    if hasattr(manager, "_select_runners"):
        return list(manager._select_runners())
    runners = [("target", manager.tp_worker.model_runner)]
    if manager.draft_worker is None:
        return runners
    drafter = getattr(manager.draft_worker, "draft_worker", None)
    drafts = getattr(drafter, "draft_runners", None) or getattr(drafter, "draft_runner_list", None)
    if not drafts:
        single = getattr(drafter, "draft_runner", None)
        drafts = [] if single is None else [single]
    if not drafts:
        kind = type(manager.draft_worker).__name__
        raise ConfigError(f"this version cannot update the draft model of SGLang's {kind}")
    return runners + [("draft", runner) for runner in drafts]


def is_idle(scheduler: Any) -> bool:  # noqa: ANN401 - SGLang's Scheduler
    """Whether SGLang would flush its caches now."""
    if "ignore_waiting" in inspect.signature(scheduler.is_fully_idle).parameters:
        return bool(scheduler.is_fully_idle(ignore_waiting=scheduler._engine_paused))
    return bool(scheduler.is_fully_idle())


def state_problem(manager: Any) -> str | None:  # noqa: ANN401 - SchedulerWeightUpdaterManager
    """Why this engine's weights cannot be written as it is now, and what to do about it; None: they can."""
    if "weights" in getattr(manager, "offload_tags", ()):
        return (
            "its weights are released (/release_memory_occupation), so that there is nothing to write to: "
            'first POST {"tags": ["weights"]} to /resume_memory_occupation'
        )
    if getattr(manager, "_session", None) is not None:
        return (
            "another weight update is open (/begin_weight_update), whose end would process these weights "
            "once more: first POST to /end_weight_update"
        )
    groups = parallel().attention_dp
    if groups > 1:
        return (
            f"its attention is data parallel in {groups} groups (--attn-dp-size, --enable-dp-attention), "
            "which cannot be updated in place yet: start it without"
        )
    return None


def flush_caches(manager: Any, request: Any, success: bool, message: str) -> str:  # noqa: ANN401
    """What SGLang says then; up to 0.5.21 it asserts that no request is in the way, and says nothing."""
    flush = manager.flush_cache_after_weight_update
    if len(inspect.signature(flush).parameters) == 1:
        flush(request)
        return message
    return str(flush(request, success, message)[1])


def record_weight_version(manager: Any, version: str | None) -> None:  # noqa: ANN401
    """In the scheduler, which tells it with a request's tokens from 0.5.19 on."""
    record = getattr(manager, "record_weight_version_after_update", None)
    if record is not None:
        record(version)


def served_weight_version(tokenizer: Any) -> str:  # noqa: ANN401 - SGLang's TokenizerManager
    if hasattr(tokenizer, "config_value"):
        return str(tokenizer.config_value("weight_version"))
    return str(tokenizer.server_args.weight_version)


def cache_problem(model: torch.nn.Module, updater: Any) -> str | None:  # noqa: ANN401 - its WeightUpdater
    """What of SGLang's own would keep serving the old weights, or share them with other engines."""
    inactive = getattr(updater, "_assert_weight_cache_inactive", None)
    if inactive is not None:
        try:
            inactive("an update")
        except RuntimeError as error:
            return str(error)
    try:
        from sglang.srt.model_executor.model_runner_components import weight_updater
    except ImportError:
        return None
    derived = getattr(weight_updater, "_unsupported_derived_weight_cache_error", None)
    if derived is None:
        return None
    reason: str | None = derived(model) if inspect.signature(derived).parameters else derived()
    return reason


def has_cuda_graphs(runner: Any) -> bool:  # noqa: ANN401 - ModelRunner
    """Whether it has captured its forward pass; a runner without graphs may have another's place."""
    found = (getattr(runner, f"{phase}_cuda_graph_runner", None) for phase in ("decode", "prefill"))
    return any("Graph" in type(each).__name__ for each in found)


# How SGLang loads a model from disk, in its three steps


def restore(model: torch.nn.Module, device: torch.device) -> None:
    """Back to the layout in which weights are loaded; before 0.5.21 SGLang knows no way back."""
    loader = _loader()
    if hasattr(loader, "restore_weights_before_loading"):
        loader.restore_weights_before_loading(model, device)


def load(model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> None:
    loader = _loader()
    if hasattr(loader, "load_weights_only"):
        loader.load_weights_only(model, iter(tensors), device)
    else:
        model.load_weights(iter(tensors))  # type: ignore[operator]


def post_process(model: torch.nn.Module, device: torch.device) -> None:
    """Into the layout that the kernels want."""
    loader = _loader()
    if hasattr(loader, "postprocess_weights"):
        loader.postprocess_weights(model, device)
    else:  # 0.5.19: only together with the load
        from sglang.srt.model_loader.loader import device_loading_context

        for _, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if method is not None:
                with device_loading_context(module, device):
                    method.process_weights_after_loading(module)


def _loader() -> Any:  # noqa: ANN401
    from sglang.srt.model_loader.loader import DefaultModelLoader

    return DefaultModelLoader
