"""The parameter server's HTTP API: one rank's `ParameterServer` behind routes.

    POST   /v1/checkpoints/{name}/files         register this rank's share
    DELETE /v1/checkpoints/{name}               free it
    POST   /v1/checkpoints/{name}/gather-metas  meet the other ranks
    POST   /v1/checkpoints/{name}/update        put it into the engines' workers
    GET    /v1/metas, POST /v1/metas            what the ranks hold, out and in
    GET    /v1/healthz, /v1/checkpoints, /v1/operations, /v1/events, /metrics
                                                what there is and what goes on, answered at any time
    POST   /v1/cancel                           end what the rank is at (`looking_on`)

As with `ParameterServer`, every rank must be asked: a gather or an update that only some are asked for
waits for the others, to its timeout. `?all_ranks=true`, on rank 0, asks them all, and answers with every
rank's answer. A rank does one long operation at a time; a second one gets 409.

Failures: an error status with `{error_type, message, record, traceback, committed}` (`failures`).

Typical usage: `ckpt-engine serve` (`serving`), or inside a process that has a `ParameterServer`:

    app = create_app(ps)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel

from ckpt_engine.checkpoint import files_of, split_files
from ckpt_engine.errors import CkptEngineError
from ckpt_engine.metadata import fleets_to_json
from ckpt_engine.server.access import Access
from ckpt_engine.server.all_ranks import RankServers
from ckpt_engine.server.api_models import (
    AllRanksAnswer,
    ErrorBody,
    FilesRequest,
    Gathered,
    GatherRequest,
    MetasLoaded,
    Registered,
    Unregistered,
    Updated,
    UpdateRequest,
)
from ckpt_engine.server.drive import Call, Driver, NotAllRanks
from ckpt_engine.server.failures import body_of, status_of, to_json
from ckpt_engine.server.guard import Guard
from ckpt_engine.server.looking_on import add_looking_on
from ckpt_engine.server.metrics import Metrics
from ckpt_engine.server.operations import Operations
from ckpt_engine.server.rank_work import InvalidMetas, RankWork

try:
    from fastapi import FastAPI, Path, Query, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
except ImportError as error:
    from ckpt_engine.server import missing_extra

    raise missing_extra(error) from error

if TYPE_CHECKING:
    from ckpt_engine.parameter_server import ParameterServer

AllRanks = Annotated[
    bool, Query(description="Ask every rank, and answer with every rank's answer. Rank 0 only.")
]
Force = Annotated[bool, Query(description="Also free the shared memory pool; then 404 is not given.")]
Name = Annotated[str, Path(description="The checkpoint's name; it may hold slashes.")]

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "An argument is wrong (`ConfigError`)."},
    403: {"model": ErrorBody, "description": "A file or an engine that must not be named here."},
    404: {"model": ErrorBody, "description": "Nothing has this name (`UnknownCheckpointError`)."},
    409: {"model": ErrorBody, "description": "The name is taken, or the rank is busy."},
    408: {"model": ErrorBody, "description": "The body came too slowly."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    422: {"model": ErrorBody, "description": "The body is not what this route takes."},
    500: {
        "model": ErrorBody,
        "description": "Any other failure; after `all_ranks` with `ranks`, every rank's answer.",
    },
    502: {"model": ErrorBody, "description": "The engine, or another rank's server, failed or refused."},
    503: {"model": ErrorBody, "description": "The server is ending."},
    504: {"model": ErrorBody, "description": "A deadline passed (`UpdateTimeout`)."},
    507: {"model": ErrorBody, "description": "The host has too little memory (`HostMemoryError`)."},
}


def create_app(
    ps: ParameterServer,
    *,
    servers: RankServers | None = None,
    executor: Executor | None = None,
    token: str | None = None,
    access: Access | None = None,
    local_only: bool = False,
) -> FastAPI:
    """The routes over one rank.

    Args:
        servers: every rank's server, for `all_ranks`; None: rank 0 cannot reach the others.
        executor: where long operations run; None: a thread of the app's own.
        token: what every request must carry (`Authorization: Bearer`); None: nothing.
        access: which files and engines requests may name; None: those that the settings allow to others
            than this process's own user.
        local_only: refuse requests whose `Host` is not the loopback's: a page in a browser may have had its
            own name point there.
    """
    own = ThreadPoolExecutor(1, thread_name_prefix="ckpt-engine-operation") if executor is None else None
    metrics = Metrics()
    operations = Operations(executor or own, [metrics.watch])  # type: ignore[arg-type]  # one of them is there
    metrics.show(ps, operations)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if own is not None:
            own.shutdown(wait=False)

    app = FastAPI(
        title="ckpt-engine parameter server",
        summary="Puts the weights of a checkpoint into running inference engines.",
        # The pages that show the document would load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Guard, token=token, local_only=local_only)
    _add_failures(app)
    work = RankWork(ps, access or Access.of(ps.settings, own_user=False), operations.progress)
    _add_checkpoints(app, work, Driver(ps.rank, ps.world_size, operations, servers))
    _add_metas(app, work, operations)

    add_looking_on(app, work, operations, metrics)
    return app


def _add_checkpoints(app: FastAPI, here: RankWork, driver: Driver) -> None:
    # Not `{name}`: a name may hold slashes.
    route = "/v1/checkpoints/{name:path}"

    @app.post(f"{route}/files", summary="Register files", responses=_ERRORS)
    async def files(
        name: Name, request: FilesRequest, all_ranks: AllRanks = False
    ) -> Registered | AllRanksAnswer:
        """Loads files into this rank's host memory.

        With `all_ranks` the files are dealt to the ranks, whole and balanced by bytes; a directory stands
        for its files. If a rank fails, those that had registered theirs in this request free it again, unless
        the files were taken in place: what they held is nowhere else.
        """
        shares = [request.paths]
        if all_ranks:
            driver.check()
            found = await run_in_threadpool(lambda: files_of(here.access.files(request.paths)))
            shares = [list(map(str, share)) for share in split_files(found, here.ps.world_size)]
        return await driver.run(
            Call(
                operation="registration",
                checkpoint=name,
                method="POST",
                route="files",
                work=lambda: here.register(name, request, shares[0]),
                body=lambda rank: request.model_copy(update={"files": shares[rank]}),
                seconds=request.timeout,
                undo=None if here.takes_files_in_place(request) else lambda: here.unregister(name, False),
            ),
            all_ranks,
        )

    @app.delete(route, summary="Free a checkpoint", responses=_ERRORS)
    async def delete(
        name: Name, force: Force = False, all_ranks: AllRanks = False
    ) -> Unregistered | AllRanksAnswer:
        """Frees this rank's share. With `all_ranks`, 404 only when no rank had anything under the name."""
        return await driver.run(
            Call(
                operation="unregistration",
                checkpoint=name,
                method="DELETE",
                route="",
                query="?force=true" if force else "",
                work=lambda: here.unregister(name, force),
                seconds=60,
                lenient=404,
            ),
            all_ranks,
        )

    @app.post(f"{route}/gather-metas", summary="Gather what all ranks hold", responses=_ERRORS)
    async def gather(
        name: Name, request: GatherRequest | None = None, all_ranks: AllRanks = False
    ) -> Gathered | AllRanksAnswer:
        """All ranks exchange what each holds. Every rank must be asked."""
        asked = request or GatherRequest()
        return await driver.run(
            Call(
                operation="gather",
                checkpoint=name,
                method="POST",
                route="gather-metas",
                work=lambda: here.gather(name, asked),
                body=lambda _: asked,
                seconds=asked.timeout,
            ),
            all_ranks,
        )

    @app.post(f"{route}/update", summary="Update the engines' workers", responses=_ERRORS)
    async def update(
        name: Name, request: UpdateRequest, all_ranks: AllRanks = False
    ) -> Updated | AllRanksAnswer:
        """Puts the checkpoint into every rank's worker, or into none. Every rank must be asked."""
        here.check(request)
        return await driver.run(
            Call(
                operation="update",
                checkpoint=name,
                method="POST",
                route="update",
                work=lambda: here.update(name, request),
                body=lambda _: request,
                seconds=request.timeout * (2 if request.on_failure == "restore" else 1),
            ),
            all_ranks,
        )


def _add_metas(app: FastAPI, here: RankWork, operations: Operations) -> None:
    schema = {"type": "object", "description": "Metas, as GET gives them: an object whose keys are ranks."}
    several = {"type": "array", "items": schema, "description": "Of fleets that hold the same weights."}
    either = {"application/json": {"schema": {"oneOf": [schema, several]}}}

    @app.get(
        "/v1/metas",
        summary="What was gathered or loaded last",
        response_class=Response,
        responses={
            200: {
                "content": either,
                "description": "Metas, or an array: of this fleet, if it holds the weights, and of those "
                "that it has joined. It is all that is needed to join.",
            }
        },
    )
    async def get_metas() -> Response:
        # Many megabytes in a large world: not on the event loop.
        text = await run_in_threadpool(lambda: fleets_to_json(here.ps.get_fleets()))
        return Response(text, media_type="application/json")

    @app.post(
        "/v1/metas",
        summary="Load another fleet's metas",
        responses=_ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": either}},
    )
    async def post_metas(request: Request) -> MetasLoaded:
        """Replaces the senders' side by another fleet's metas, or an array of several's. Ask each rank."""
        text = await request.body()
        return await operations.exclusive(
            "loading of metas", "", lambda: operations.blocking(lambda: here.load_metas(text))
        )


def _add_failures(app: FastAPI) -> None:
    """Errors in our own form; those that nobody expected are the guard's."""

    @app.exception_handler(CkptEngineError)
    async def ours(_: Request, error: Exception) -> Response:
        return _json(body_of(error), status_of(error))

    @app.exception_handler(NotAllRanks)
    async def some_rank(_: Request, error: Exception) -> Response:
        assert isinstance(error, NotAllRanks)
        return _json(error.error, error.status)

    @app.exception_handler(InvalidMetas)
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        message = str(error)
        if isinstance(error, RequestValidationError):
            message = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors()
            )
        return _json(ErrorBody(error_type=type(error).__name__, message=message), 422)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = ErrorBody(error_type=type(error).__name__, message=str(error.detail))
        return _json(body, error.status_code, error.headers)


def _json(body: BaseModel, status: int, headers: Any = None) -> Response:  # noqa: ANN401 - as Response takes them
    return Response(to_json(body.model_dump()), status, headers, media_type="application/json")
