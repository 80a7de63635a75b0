"""The health middleware before engines that a server would not have for long: without our extension, with
replies that are out of step, dead, or busy."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from ckpt_engine_vllm import health
from ckpt_engine_vllm.health import WeightsHealth

EXTENSION = "ckpt_engine_vllm.VllmColocateWorkerExtension"
WHOLE = {"weights": "serving"}


class Engine:
    """Answers as a server's `engine_client`: with `replies`, one after the other."""

    def __init__(self, *replies: Any, extension: str = EXTENSION) -> None:  # noqa: ANN401 - of workers
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(worker_extension_cls=extension))
        self.replies = list(replies)
        self.calls = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def collective_rpc(self, method: str) -> list[Any]:
        assert method == "ckpt_engine_status"
        self.calls += 1
        await self.go_on.wait()
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return list(reply)


async def route(scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI's
    """vLLM's own."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"vLLM's"})


async def get(
    middleware: WeightsHealth, engine: Engine | None, path: str = "/health", root: str = ""
) -> tuple[int, Any]:
    sent = []

    async def send(message: Any) -> None:  # noqa: ANN401 - ASGI's
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "root_path": root}
    scope["app"] = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
    await middleware(scope, lambda: asyncio.sleep(0), send)
    body = sent[1]["body"]
    return sent[0]["status"], None if body == b"vLLM's" else json.loads(body)


def told(*replies: Any, path: str = "/health", root: str = "", extension: str = EXTENSION) -> tuple[int, Any]:  # noqa: ANN401
    """One request; its status, and what the middleware says, if it does not pass the request on."""

    async def ask() -> tuple[int, Any]:
        return await get(WeightsHealth(route), Engine(*replies, extension=extension), path, root)

    return asyncio.run(ask())


def test_an_engine_of_whole_weights_answers_itself() -> None:
    assert told([WHOLE, WHOLE]) == (200, None)
    assert told([WHOLE, {"weights": "updating"}]) == (200, None)


@pytest.mark.parametrize("path", ["/health", "/ping", "/base/health"])
def test_incomplete_weights_of_one_worker(path: str) -> None:
    root = "/base" if path.startswith("/base") else ""
    status, body = told([WHOLE, {"weights": "incomplete", "reason": "bucket 3"}], path=path, root=root)
    assert status == 503
    assert body["weights"] == "incomplete"
    assert "worker 1" in body["error"]
    assert "bucket 3" in body["error"]


def test_other_routes_are_not_looked_at() -> None:
    assert told([{"weights": "incomplete"}], path="/v1/completions") == (200, None)


def test_replies_that_are_out_of_step() -> None:
    status, body = told([WHOLE, "42"])
    assert (status, body["weights"]) == (503, "unknown")
    assert "worker 1" in body["error"]
    assert "restart the engine (42)" in body["error"]


@pytest.mark.parametrize("extension", ["", "collections.OrderedDict"])
def test_workers_that_could_not_answer_are_not_asked(extension: str) -> None:
    status, body = told(AssertionError("asked"), extension=extension)
    assert (status, body["weights"]) == (503, "unknown")
    assert "--worker-extension-cls" in body["error"]


def test_of_an_engine_that_is_dead_vllms_own_route_tells() -> None:
    assert told(RuntimeError("EngineCore died")) == (200, None)


def test_a_server_without_an_engine_answers_itself() -> None:
    assert asyncio.run(get(WeightsHealth(route), None)) == (200, None)


def test_a_busy_engine_is_asked_once_and_what_it_said_before_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its late reply then counts for the next request."""
    monkeypatch.setattr(health, "ANSWER_SECONDS", 0.01)

    async def run() -> None:
        engine = Engine([{"weights": "incomplete", "reason": "before"}], [WHOLE])
        middleware = WeightsHealth(route)
        assert (await get(middleware, engine))[0] == 503
        engine.go_on.clear()
        for _ in range(3):
            assert (await get(middleware, engine))[0] == 503
        assert engine.calls == 2
        engine.go_on.set()
        while (await get(middleware, engine))[0] == 503:
            assert engine.calls < 10
        assert (await get(middleware, engine)) == (200, None)

    asyncio.run(asyncio.wait_for(run(), 30))
