"""vLLM's health routes, which say 503 while the weights of a worker are incomplete.

    vllm serve MODEL --worker-extension-cls ckpt_engine_vllm.VllmColocateWorkerExtension \\
        --middleware ckpt_engine_vllm.health.WeightsHealth ...

vLLM itself is healthy as long as its processes live, whatever their weights are.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from importlib import import_module
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

ROUTES = ("/health", "/ping")
ANSWER_SECONDS = 2.0
"""How long a request waits for the workers. In an update they answer after it: till then what they said
before counts."""
STATUS_CHARACTERS = 500
"""How much of an answer that is no status is repeated."""


class WeightsHealth:
    """ASGI middleware for vLLM's `--middleware`.

    A 503's body is JSON: `weights` is `incomplete`, and `error` has the rank and the reason, until a full
    update succeeds; or `weights` is `unknown`, where the workers' replies are out of step (restart the
    engine) or the engine runs without our worker extension. Else the route answers as vLLM has it.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self._asking: asyncio.Task[None] | None = None
        self._problem: dict[str, str] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _route_of(scope) in ROUTES:
            engine = getattr(scope["app"].state, "engine_client", None)
            problem = None if engine is None else await self._problem_of(engine)
            if problem is not None:
                await _refuse(send, problem)
                return
        await self._app(scope, receive, send)

    async def _problem_of(self, engine: Any) -> dict[str, str] | None:  # noqa: ANN401 - vLLM's AsyncLLM
        """What the workers say now, or said last, if they do not answer in ANSWER_SECONDS."""
        if not _has_extension(engine):
            return {
                "weights": "unknown",
                "error": "start the engine with --worker-extension-cls "
                "ckpt_engine_vllm.VllmColocateWorkerExtension: its workers cannot tell of their weights",
            }
        # One call at a time, and none with a limit of vLLM's: a reply that came after it would be given out
        # to the next call.
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._ask(engine))
        await asyncio.wait({self._asking}, timeout=ANSWER_SECONDS)
        return self._problem

    async def _ask(self, engine: Any) -> None:  # noqa: ANN401 - vLLM's AsyncLLM
        try:
            self._problem = _problem_in(await engine.collective_rpc("ckpt_engine_status"))
        except Exception:  # noqa: BLE001 - of an engine that is dead, which vLLM's own route tells
            self._problem = None
        finally:
            self._asking = None


def _problem_in(statuses: Sequence[object]) -> dict[str, str] | None:
    for index, status in enumerate(statuses):
        if not isinstance(status, Mapping) or "weights" not in status:
            return {
                "weights": "unknown",
                "error": f"worker {index} answered something else than its status, so replies are out of "
                f"step: restart the engine ({str(status)[:STATUS_CHARACTERS]})",
            }
        if status["weights"] == "incomplete":
            return {
                "weights": "incomplete",
                "error": f"the weights of worker {index} are neither the old ones nor new ones, a full "
                f"update mends them: {status.get('reason')}",
            }
    return None


def _route_of(scope: Message) -> str:
    return str(scope["path"]).removeprefix(str(scope.get("root_path", "")))


def _has_extension(engine: Any) -> bool:  # noqa: ANN401 - vLLM's AsyncLLM
    """Else a worker would raise, which puts the replies of several out of step."""
    name = getattr(engine.vllm_config.parallel_config, "worker_extension_cls", "")
    module, _, kind = str(name or "").rpartition(".")
    return bool(module) and hasattr(getattr(import_module(module), kind, None), "ckpt_engine_status")


async def _refuse(send: Send, problem: Mapping[str, str]) -> None:
    body = json.dumps(problem).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
