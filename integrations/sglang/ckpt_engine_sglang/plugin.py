"""What runs in each of SGLang's processes: the entry point `ckpt_engine` of the group `sglang.srt.plugins`.

It replaces SGLang's `update_weights_from_ipc` in the schedulers by ours, by SGLang's own hook registry. No
file of SGLang is changed. SGLang logs a plugin that fails and goes on without it: so where this one does not
know the layout of the installed SGLang, it leaves behind a handler that refuses updates and says why.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import logging
import sys
import types
from typing import Any

from ckpt_engine_sglang import guard

logger = logging.getLogger(__name__)

MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_NEEDED = ("_select_runners", "flush_cache_after_weight_update", "record_weight_version_after_update")
ARGUMENTS = "sglang.srt.server_args.prepare_server_args"
WAIT_FLAG = "--checkpoint-engine-wait-weights-before-ready"
OTHER_WAIT_FLAG = "--wait-for-initial-weights"
"""What the reference's documents call it."""
TOKENIZER = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"


def register() -> None:
    """Registers the hooks. Called by SGLang in its main, scheduler and detokenizer processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    problem = _unknown_layout()
    if problem is not None:
        logger.error("ckpt-engine cannot update this SGLang: %s", problem)
        _serve_refusal(problem)
        return
    HookRegistry.register(f"{MANAGER}.update_weights_from_ipc", update_weights_from_ipc, HookType.REPLACE)
    HookRegistry.register(f"{TOKENIZER}.update_weights_from_ipc", note_outcome, HookType.AROUND)
    HookRegistry.register(ARGUMENTS, accept_other_flag, HookType.BEFORE)
    if guard.wanted():
        HookRegistry.register(f"{TOKENIZER}.init_communicators", guard.install, HookType.AFTER)


def update_weights_from_ipc(manager: Any, request: Any) -> Any:  # noqa: ANN401 - SGLang's
    """In each scheduler, in place of SGLang's own: receives one update for all of this rank's models."""
    from sglang.srt.managers.io_struct import UpdateWeightsFromIPCReqOutput

    from ckpt_engine_sglang.worker_update import WorkerUpdate

    with manager._observe_weight_load("ipc"):
        success, message = WorkerUpdate(manager, request).serve()
    return UpdateWeightsFromIPCReqOutput(success=success, message=message)


async def note_outcome(original: Any, manager: Any, request: Any, *rest: Any) -> tuple[bool, str]:  # noqa: ANN401
    """In the HTTP server's process: the weight version that answers carry must not be the old one when an
    update may have left the weights incomplete."""
    from ckpt_engine_sglang.worker_update import INCOMPLETE, INCOMPLETE_NOTE

    ended = asyncio.Event()
    setattr(manager, guard.UPDATE, ended)
    try:
        success, message = await original(manager, request, *rest)
        if not success and INCOMPLETE_NOTE in message:
            manager._update_weight_version_if_provided(INCOMPLETE)
        return success, message
    finally:
        setattr(manager, guard.UPDATE, None)
        ended.set()


def accept_other_flag(argv: list[str]) -> tuple[tuple[list[str]], dict[str, Any]]:
    """Before SGLang reads its command line."""
    return ([WAIT_FLAG if argument == OTHER_WAIT_FLAG else argument for argument in argv],), {}


def _unknown_layout() -> str | None:
    """Why this plugin does not fit the installed SGLang; None: it does."""
    module, _, name = MANAGER.rpartition(".")
    try:
        manager = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return f"it has no {MANAGER} ({error})"
    missing = [each for each in (*_NEEDED, "update_weights_from_ipc") if not hasattr(manager, each)]
    if missing:
        return f"its {name} has no {', '.join(missing)}"
    parameters = list(inspect.signature(manager.update_weights_from_ipc).parameters)
    if parameters != ["self", "recv_req"]:
        return f"its {name}.update_weights_from_ipc takes {parameters}"
    return None


def _serve_refusal(problem: str) -> None:
    """SGLang's own handler imports `checkpoint_engine.worker`: gives it one that refuses every update."""
    if importlib.util.find_spec("checkpoint_engine") is not None:
        return  # another package, which the user may mean to use

    def refuse(*_: Any, **__: Any) -> None:  # noqa: ANN401
        raise RuntimeError(f"ckpt-engine cannot update this SGLang: {problem}")

    package, worker = types.ModuleType("checkpoint_engine"), types.ModuleType("checkpoint_engine.worker")
    package.__path__ = []
    package.worker = worker  # type: ignore[attr-defined]
    worker.update_weights_from_ipc = refuse  # type: ignore[attr-defined]
    sys.modules["checkpoint_engine"], sys.modules["checkpoint_engine.worker"] = package, worker
