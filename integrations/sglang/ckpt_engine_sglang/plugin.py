"""What runs in each of SGLang's processes: the entry point `ckpt_engine` of the group `sglang.srt.plugins`.

It replaces SGLang's `update_weights_from_ipc` in the schedulers by ours, by SGLang's own hook registry. No
file of SGLang is changed. Where it does not know the layout of the installed SGLang, it leaves SGLang's own
handler in place, and serves it the module that it imports (`stock_worker`): updates work, with less checked.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ckpt_engine.compat import DIRECTORY
from ckpt_engine_sglang import guard, layouts, pipeline
from ckpt_engine_sglang.versions import MAKE_MODEL, MANAGER, TOKENIZER, unknown_layout

logger = logging.getLogger(__name__)

STOCK_PACKAGE = "checkpoint_engine"
"""What SGLang's own handler imports."""
ARGUMENTS = "sglang.srt.server_args.prepare_server_args"
WAIT_FLAG = "--checkpoint-engine-wait-weights-before-ready"
OTHER_WAIT_FLAG = "--wait-for-initial-weights"
"""What the reference's documents call it."""


def register() -> None:
    """Registers the hooks. Called by SGLang in its main, scheduler and detokenizer processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(ARGUMENTS, accept_other_flag, HookType.BEFORE)
    problem = unknown_layout()
    if problem is not None:
        serve_stock_handler(problem)
        return
    other = other_package()
    if other is not None:
        logger.warning(
            "ckpt-engine takes this SGLang's updates, not %s: they must come from ckpt-engine's parameter "
            "servers. To update from those of that package, set SGLANG_PLUGINS to a list without ckpt_engine",
            other,
        )
    HookRegistry.register(f"{MANAGER}.update_weights_from_ipc", update_weights_from_ipc, HookType.REPLACE)
    HookRegistry.register(pipeline.PASS_ON, pipeline.after_sending, HookType.AFTER)
    HookRegistry.register(MAKE_MODEL, layouts.remember, HookType.AFTER)
    HookRegistry.register(f"{TOKENIZER}.update_weights_from_ipc", note_outcome, HookType.AROUND)
    if guard.wanted():
        HookRegistry.register(f"{TOKENIZER}.init_communicators", guard.install, HookType.AFTER)


def update_weights_from_ipc(manager: Any, request: Any) -> Any:  # noqa: ANN401 - SGLang's
    """In each scheduler, in place of SGLang's own: receives one update for all of this rank's models. None,
    to which SGLang sends no answer: not yet."""
    from sglang.srt.managers.io_struct import UpdateWeightsFromIPCReqOutput

    from ckpt_engine_sglang.worker_update import WorkerUpdate

    if pipeline.put_off(manager.scheduler, request):
        return None
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


def serve_stock_handler(problem: str) -> None:
    """SGLang's own handler imports `checkpoint_engine.worker`: gives it ours, where there is no other.

    Args:
        problem: why this plugin's handler does not serve.
    """
    other = other_package()
    if other is not None:
        logger.warning(
            "ckpt-engine does not take this SGLang's updates: %s. SGLang's own handler does, with %s, which "
            "cannot talk to ckpt-engine's parameter servers. Either update from its own, or `pip uninstall "
            "checkpoint-engine` and restart the server, which then updates with ckpt-engine's worker",
            *(problem, other),
        )
        return
    logger.warning(
        "ckpt-engine does not take this SGLang's updates: %s. SGLang's own handler does, with our "
        "worker: what fails after the last tensor is only logged, and a rank's failure may end the server",
        problem,
    )
    from ckpt_engine.compat import checkpoint_engine
    from ckpt_engine_sglang import stock_worker

    setattr(checkpoint_engine, "worker", stock_worker)  # noqa: B010 - the module has one of its own
    sys.modules[STOCK_PACKAGE], sys.modules[f"{STOCK_PACKAGE}.worker"] = checkpoint_engine, stock_worker


def other_package() -> str | None:
    """Which package SGLang's own handler would import, and where it is; None: there is none but ours."""
    spec = importlib.util.find_spec(STOCK_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places or Path(places[0]).is_relative_to(DIRECTORY):
        return None
    try:
        release = version("checkpoint-engine")
    except PackageNotFoundError:
        release = "of an unknown version"
    return f"the package checkpoint-engine {release} ({places[0]})"
