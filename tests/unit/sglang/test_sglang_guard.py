from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ckpt_engine_sglang.guard import Guard


def status_of(method: str, path: str, reason: str | None) -> int:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI's
        await send({"type": "http.response.start", "status": 200})

    async def reason_now() -> str | None:
        return reason

    async def send(message: Any) -> None:  # noqa: ANN401
        sent.append(message)

    async def receive() -> Any:  # noqa: ANN401
        return {}

    scope = {"type": "http", "method": method, "path": path}
    asyncio.run(Guard(app, reason_now)(scope, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/api/chat", "/api/generate"])
def test_what_generates_waits_for_the_weights(method: str, path: str) -> None:
    assert status_of(method, path, "no weights yet") == 503
    assert status_of(method, path, None) == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/update_weights_from_ipc")])
def test_other_routes_are_answered(method: str, path: str) -> None:
    assert status_of(method, path, "no weights yet") == 200
