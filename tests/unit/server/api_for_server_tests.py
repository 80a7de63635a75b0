"""A stub in place of the `ParameterServer`, and real HTTP servers in front of it."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from ckpt_engine.checkpoint import Share
from ckpt_engine.checkpoint.progress import Progress
from ckpt_engine.errors import CheckpointExistsError, ErrorRecord, UnknownCheckpointError, UpdateError
from ckpt_engine.metadata import HostBufferMeta, RankMetas, TensorMeta
from ckpt_engine.server.access import Access
from ckpt_engine.server.all_ranks import RankAddress, RankServers
from ckpt_engine.server.app import create_app
from ckpt_engine.settings import Settings, load_settings
from ckpt_engine.state import Weights
from ckpt_engine.update.session import UpdateReport

SECONDS = 20.0
EVERYTHING = Access.of(Settings(), own_user=True)
"""What requests may name where only this user can send any."""
REPORT: dict[str, Any] = {
    "checkpoint": "a",
    "version": "v-1",
    "tensors": 2,
    "nbytes": 24,
    "buckets": 1,
    "ring_nbytes": 512,
    "seconds": 0.25,
    "stages": {"begin": 0.1},
}


def metas_of(world_size: int) -> dict[int, RankMetas]:
    tensor = TensorMeta(name="w", dtype="float32", shape=(3,), offset=0, nbytes=12)
    buffer = HostBufferMeta(address=4096, nbytes=256, tensors=(tensor,))
    return {
        rank: RankMetas(
            rank=rank,
            host="h",
            host_ip="127.0.0.1",
            device_uuid=f"CPU-h-{rank}",
            epoch="e",
            buffers=(buffer,),
        )
        for rank in range(world_size)
    }


class StubServer:
    """What the API uses of a `ParameterServer`.

    `fail`: operation -> what it raises; `gates`: operation -> what it waits for.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.settings = load_settings()
        self.registered: dict[str, list[str]] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.fail: dict[str, Exception] = {}
        self.gates: dict[str, threading.Event] = {}
        self.begun: dict[str, threading.Event] = {}
        self.metas: dict[int, RankMetas] = {}
        self.joined: list[dict[int, RankMetas]] = []
        self.weights = Weights("unknown")

    def hold(self, operation: str) -> threading.Event:
        """The operation waits until the event is set; `begun[operation]` tells that it has begun."""
        self.begun[operation] = threading.Event()
        self.gates[operation] = threading.Event()
        return self.gates[operation]

    def _do(self, operation: str, *arguments: object) -> None:
        self.calls.append((operation, *arguments))
        if operation in self.gates:
            self.begun[operation].set()
            assert self.gates[operation].wait(SECONDS)
        if operation in self.fail:
            raise self.fail[operation]

    @property
    def checkpoint_names(self) -> list[str]:
        return sorted(self.registered)

    @property
    def remote_topology(self) -> dict[str, set[int]]:
        return {"tcp@h": set(self.metas)}

    @property
    def checkpoints(self) -> list[Share]:
        return [Share(name=name, nbytes=24, tensors=2, digests=False) for name in self.checkpoint_names]

    def register_checkpoint(
        self,
        name: str,
        *,
        files: list[str],
        digests: bool | None = None,
        on_progress: Progress,
        **options: bool,
    ) -> None:
        if name in self.registered:
            raise CheckpointExistsError(f"{name!r} is registered already")
        on_progress(8, 24)
        self._do("register", name, list(files), options | ({"digests": digests} if digests else {}))
        self.registered[name] = list(files)

    def unregister_checkpoint(self, name: str, force: bool = False) -> None:
        self._do("unregister", name, force)
        self.registered.pop(name, None)

    def gather_metas(self, name: str, timeout: float) -> None:
        self._do("gather", name, timeout)
        if name not in self.registered:
            raise UnknownCheckpointError(f"no rank has registered anything as {name!r}")
        self.metas = metas_of(self.world_size)

    def get_metas(self) -> dict[int, RankMetas]:
        return dict(self.metas)

    def get_fleets(self) -> list[dict[int, RankMetas]]:
        return [self.metas, *self.joined] if self.metas else []

    def load_metas(self, fleets: list[dict[int, RankMetas]]) -> None:
        self._do("load", [sorted(fleet) for fleet in fleets])
        self.metas, *self.joined = fleets

    def update(
        self,
        name: str,
        req_func: Any,  # noqa: ANN401
        *,
        timeout: float,
        ranks: list[int] | None,
        keep: bool = False,
        version: str | None = None,
        on_failure: str = "raise",
        verify: str | None = None,
        on_progress: Progress,
    ) -> UpdateReport:
        on_progress(6, 24)
        asked = [*(["keep"] if keep else []), *([version, on_failure, verify] if version else [])]
        self._do("update", name, timeout, ranks, *asked)
        try:
            req_func([(f"CPU-h-{rank}", f"ipc:///h{rank}") for rank in range(self.world_size)])
        except Exception as error:  # noqa: BLE001 - as the update does
            raise UpdateError(ErrorRecord.from_exception(error, rank=self.rank, stage="request")) from None
        return UpdateReport(**REPORT)


def update_error(kind: type[UpdateError] = UpdateError, **fields: Any) -> UpdateError:  # noqa: ANN401
    record = {"error_type": "RuntimeError", "message": "boom", "rank": 1, "stage": "buckets", "bucket": 3}
    return kind(ErrorRecord(**(record | {"traceback": "Traceback: over there"} | fields)), touched=True)


@contextmanager
def served(
    app: Any,  # noqa: ANN401 - any ASGI app
    path: Path,
    config: Callable[[Any], uvicorn.Config] = lambda app: uvicorn.Config(app, log_level="error"),
) -> Iterator[None]:
    """`app` on a Unix socket, in a thread."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(128)  # who connects at once waits
        settled = config(app)
        settled.timeout_graceful_shutdown = 1
        server = uvicorn.Server(settled)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


class World:
    """Ranks with a stub and a real server each; `client` speaks to rank 0."""

    def __init__(self, stubs: list[StubServer], directory: Path, client: httpx.Client) -> None:
        self.stubs = stubs
        self.directory = directory
        self.client = client

    def path(self, rank: int) -> Path:
        return self.directory / f"{rank}.sock"


@contextmanager
def world(size: int, *, token: str | None = None, absent: tuple[int, ...] = ()) -> Iterator[World]:
    stubs = [StubServer(rank, size) for rank in range(size)]
    # pytest's own directories may be longer than a Unix socket's path may be.
    directory = Path(tempfile.mkdtemp(prefix="api-", dir="/tmp"))
    addresses = [RankAddress("http://localhost", str(directory / f"{rank}.sock")) for rank in range(size)]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        for rank, stub in enumerate(stubs):
            if rank not in absent:
                app = create_app(
                    stub,  # type: ignore[arg-type]
                    servers=RankServers(addresses, token),
                    token=token,
                    access=EVERYTHING,
                )
                stack.enter_context(served(app, directory / f"{rank}.sock"))
        transport = httpx.HTTPTransport(uds=str(directory / "0.sock"))
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = httpx.Client(
            transport=transport, base_url="http://localhost", timeout=SECONDS, headers=headers
        )
        yield World(stubs, directory, stack.enter_context(client))


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server on the loopback that answers with `handler`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
