"""The engine's HTTP routes, and the process that serves them.

    GET  /health           {"status": "ok", ...}                          never waits for the model; 503 while
                                                                          the weights are incomplete
    POST /collective_rpc   {"method", "args", "kwargs", "timeout"}    ->  {"results": [one per worker]}
    POST /generate         {"prompt_token_ids", "max_tokens"}         ->  {"token_ids": [...]}

Errors: `{"error", "traceback"}` with status 400 (the request's fault), 504 (its `timeout` passed while
the worker is still at it) or 500.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import stat
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from ckpt_engine.embedded_engine import missing_extra
from ckpt_engine.embedded_engine.engine import EmbeddedEngine, UnknownMethod
from ckpt_engine.errors import MAX_TEXT, ConfigError

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
except ImportError as error:
    raise missing_extra(error) from error

T = TypeVar("T")
SHUTDOWN_SECONDS = 5
"""How long SIGTERM waits for requests that are being answered."""


class RpcRequest(BaseModel):  # type: ignore[no-redef]  # pydantic's plugin: its own **kwargs
    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    timeout: float | None = Field(None, gt=0)


class GenerateRequest(BaseModel):
    prompt_token_ids: list[int]
    max_tokens: int = 16


def create_app(engine: EmbeddedEngine) -> FastAPI:
    """The routes over one engine."""
    app = FastAPI(title="ckpt-engine embedded engine", openapi_url=None)
    # Threads of our own: the model's lock may hold several requests, and /health must not queue there.
    threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="engine")

    async def in_thread(work: Callable[[], T], timeout: float | None = None) -> T:
        future = asyncio.get_running_loop().run_in_executor(threads, work)
        # A thread cannot be cancelled: the shield lets the work end while the request does not wait.
        return await asyncio.wait_for(asyncio.shield(future), timeout)

    @app.get("/health")
    async def health() -> JSONResponse:
        told = engine.health()
        return JSONResponse(told, status_code=200 if told["status"] == "ok" else 503)

    @app.post("/collective_rpc")
    async def collective_rpc(request: RpcRequest) -> dict[str, Any]:
        work = in_thread(lambda: engine.call(request.method, request.args, request.kwargs), request.timeout)
        return {"results": await work}

    @app.post("/generate")
    async def generate(request: GenerateRequest) -> dict[str, Any]:
        work = in_thread(lambda: engine.generate(request.prompt_token_ids, request.max_tokens))
        return {"token_ids": await work}

    @app.exception_handler(UnknownMethod)
    @app.exception_handler(ConfigError)
    async def bad_request(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=400)

    @app.exception_handler(asyncio.TimeoutError)
    async def too_late(_: Request, error: Exception) -> JSONResponse:
        message = "the request's timeout passed; the worker is still at work"
        return JSONResponse({"error": message}, status_code=504)

    @app.middleware("http")
    async def failures(request: Request, call_next: Callable[[Request], Any]) -> Any:  # noqa: ANN401 - a response
        # Not an exception handler: Starlette would answer and then raise the error again.
        try:
            return await call_next(request)
        except Exception as error:  # noqa: BLE001 - the border of the process: the client gets it all
            text = "".join(traceback.format_exception(error))
            return JSONResponse(
                {"error": f"{type(error).__name__}: {error}", "traceback": text[-MAX_TEXT:]},
                status_code=500,
            )

    return app


class _AnnouncingServer(uvicorn.Server):
    """Writes where it listens, as one JSON line on stdout, once it does."""

    def __init__(self, config: uvicorn.Config, announcement: dict[str, Any]) -> None:
        super().__init__(config)
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sys.stdout.write(json.dumps(self._announcement) + "\n")
        sys.stdout.flush()


def serve(engine: EmbeddedEngine, *, host: str, port: int, uds: Path | None) -> None:
    """Serves until SIGTERM or SIGINT, then returns.

    Args:
        port: 0 chooses a free one.
        uds: serve on this Unix socket (mode 0600) instead of TCP.
    """
    if uds is not None:
        listener = _bind_unix(uds)
        announcement: dict[str, Any] = {"uds": str(uds)}
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
        announcement = {"port": listener.getsockname()[1]}
    config = uvicorn.Config(
        create_app(engine),
        log_level="warning",
        access_log=False,
        loop="asyncio",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    server = _AnnouncingServer(config, announcement)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        server.should_exit = True

    # uvicorn sends itself the signal again when it is done; with these that is not a death by signal.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        if uds is not None:
            uds.unlink(missing_ok=True)


def _bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket that only this user can connect to; a dead one in its place is removed."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"--uds {path}: something that is not a socket is there")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise ConfigError(f"--uds {path}: another process serves there")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    # The mode must be right from the start, not after a chmod.
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--uds {path}: {error}") from None
    finally:
        os.umask(mask)
    return listener


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ckpt_engine.embedded_engine`: the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ckpt_engine.embedded_engine", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, required=True, help="directory with a config.json")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="0 (default) chooses one; see stdout")
    parser.add_argument("--uds", type=Path, help="serve on this Unix socket instead of TCP")
    parser.add_argument("--seed", type=int, default=0, help="of the dummy weights (default: %(default)s)")
    parser.add_argument("--device-index", type=int, default=0, help="this engine's CPU device")
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").is_file():
        raise ConfigError(f"--model {options.model}: no config.json there")

    import torch

    # One thread: results do not depend on the machine's cores, and test machines run several engines.
    torch.set_num_threads(1)
    engine = EmbeddedEngine(options.model, seed=options.seed, device_index=options.device_index)
    serve(engine, host=options.host, port=options.port, uds=options.uds)
    if engine.busy:
        # A thread that is still inside an update would keep the interpreter from ending.
        sys.stdout.flush()
        os._exit(0)
    return 0
