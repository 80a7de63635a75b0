"""Keeps a server from answering with weights that nobody meant it to have (CKPT_ENGINE_GUARD).

SGLang answers /generate while it waits for its first weights, with dummy ones; when its wait times out it
gets ready with them; and after an update that failed half-way it goes on. With the guard such requests get
status 503 and the reason, until an update has succeeded. Updates, and all that does not generate, are let
through.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ckpt_engine.settings import load_settings

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

SERVER = "sglang.srt.entrypoints.http_server"
UPDATE = "_ckpt_engine_update"
"""Attribute of the tokenizer manager: set at the end of the update that is under way."""
_GUARDED = (
    *("/generate", "/encode", "/classify", "/invocations", "/vertex_generate", "/v1/"),
    *("/api/chat", "/api/generate"),  # Ollama's
)
_METHODS = ("POST", "PUT")
_SAY_AGAIN_SECONDS = 60.0
HTTP_UNAVAILABLE = 503


def wanted() -> bool:
    return load_settings().guard


class Guard:
    """ASGI middleware; `reason` says why nothing may be generated now, or None."""

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        reason: Callable[[], Awaitable[str | None]],
    ) -> None:
        self._app = app
        self._reason = reason

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        guarded = (
            scope["type"] == "http" and scope["method"] in _METHODS and scope["path"].startswith(_GUARDED)
        )
        reason = await self._reason() if guarded else None
        if reason is None:
            await self._app(scope, receive, send)
            return
        body = json.dumps({"error": {"message": reason, "code": HTTP_UNAVAILABLE}}).encode()
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": HTTP_UNAVAILABLE, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def install(_result: object, manager: Any, *_: Any) -> None:  # noqa: ANN401 - SGLang's TokenizerManager
    """After the tokenizer manager was made: before the HTTP server, if there is to be one, starts."""
    server = sys.modules.get(SERVER)
    if server is None:
        return  # SGLang without HTTP
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    server.app.add_middleware(Guard, reason=lambda: reason_of(manager))
    # Not at the plugin's start: this module is imported after it.
    HookRegistry.register(f"{SERVER}._wait_weights_ready", wait_for_weights, HookType.REPLACE)
    HookRegistry.apply_hooks()


async def reason_of(manager: Any) -> str | None:  # noqa: ANN401
    """Why this server must not generate now; known at the end of an update that is under way."""
    from ckpt_engine_sglang.versions import served_weight_version
    from ckpt_engine_sglang.worker_update import INCOMPLETE, INCOMPLETE_NOTE

    while (update := getattr(manager, UPDATE, None)) is not None:
        await update.wait()
    if getattr(manager, "initial_weights_loaded", True) is False:
        return "this server still has its dummy weights, and waits for its first update"
    if served_weight_version(manager) == INCOMPLETE:
        return f"an update failed. {INCOMPLETE_NOTE}"
    return None


def wait_for_weights() -> None:
    """In place of SGLang's own wait, which gives up after a while and lets the server get ready."""
    server = sys.modules[SERVER]
    said = time.monotonic()
    while not server._global_state.tokenizer_manager.initial_weights_loaded:
        if time.monotonic() - said > _SAY_AGAIN_SECONDS:
            said = time.monotonic()
            logger.warning("still waiting for the first weights")
        time.sleep(0.2)
