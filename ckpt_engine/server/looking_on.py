"""Routes for those who look on: what a rank is at, what it has done, what it holds. And one that ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

from ckpt_engine.server.api_models import (
    CheckpointHeld,
    Ended,
    ErrorBody,
    Health,
    History,
    Running,
    WeightsHeld,
)
from ckpt_engine.server.failures import to_json
from ckpt_engine.server.metrics import Metrics
from ckpt_engine.server.operations import Operations

try:
    from fastapi import FastAPI, Header, Response
    from fastapi.responses import StreamingResponse
except ImportError as error:
    from ckpt_engine.server import missing_extra

    raise missing_extra(error) from error

if TYPE_CHECKING:
    from ckpt_engine.server.rank_work import RankWork

LastEventId = Annotated[
    str | None, Header(description="Number of the last operation that is known: what ended since is told.")
]
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_NOT_CANCELLED: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorBody, "description": "The rank is at nothing."},
    501: {"model": ErrorBody, "description": "What it is at runs in a thread, which nothing can end."},
}


def add_looking_on(app: FastAPI, here: RankWork, operations: Operations, metrics: Metrics) -> None:
    ps = here.ps

    @app.get("/v1/healthz", summary="Who this rank is, and what it is at")
    async def healthz() -> Health:
        return Health(
            rank=ps.rank,
            world_size=ps.world_size,
            checkpoints=ps.checkpoint_names,
            running=operations.running,
            last_update=here.last_update,
            weights=WeightsHeld.model_validate(ps.weights.to_dict()),
        )

    @app.get("/v1/checkpoints", summary="What is registered on this rank")
    async def checkpoints() -> list[CheckpointHeld]:
        return [CheckpointHeld.model_validate(share, from_attributes=True) for share in ps.checkpoints]

    @app.get("/v1/operations", summary="What this rank is at, and what it has done")
    async def history() -> History:
        return History(running=operations.running, ended=operations.ended)

    @app.get(
        "/v1/events",
        summary="The same, as it happens",
        response_class=Response,
        responses={
            200: {
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
                "description": "Server-sent events: `running` (as in /v1/operations, whenever bytes were "
                "done) and `ended`, whose ids are the operations' numbers. It does not end.",
            }
        },
    )
    async def events(last_event_id: LastEventId = None) -> Response:
        """Without `Last-Event-ID`, what has ended before is left out."""
        known = last_event_id or ""
        before = operations.ended
        after = int(known) if known.isdecimal() and len(known) < 18 else before[-1].number if before else 0
        return StreamingResponse(_stream(operations, after), media_type="text/event-stream")

    @app.post("/v1/cancel", summary="End what this rank is at", responses=_NOT_CANCELLED)
    async def cancel() -> Running:
        """An update that is cancelled ends on every rank, like one that failed, unless it is committed
        already: the answer to its own request says so. A registration frees what it had loaded."""
        return operations.cancel()

    @app.get(
        "/metrics",
        summary="For Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=PROMETHEUS)


async def _stream(operations: Operations, after: int) -> AsyncIterator[bytes]:
    async for kind, what in operations.events(after):
        number = f"id: {what.number}\n" if isinstance(what, Ended) else ""
        yield f"event: {kind}\n{number}data: ".encode() + to_json(what.model_dump()) + b"\n\n"
