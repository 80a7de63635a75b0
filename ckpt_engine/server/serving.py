"""Serves one rank's HTTP API until SIGTERM or SIGINT.

The event loop runs in a thread; long operations run in the main thread, because a signal can only end what
the main thread does: an update that is interrupted aborts on all ranks with that reason, and at once.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from ckpt_engine.server import missing_extra
from ckpt_engine.server.access import Access
from ckpt_engine.server.all_ranks import RankServers
from ckpt_engine.server.app import create_app
from ckpt_engine.server.failures import Cancelled, ServerStopping

try:
    import uvicorn

    from ckpt_engine.server.connections import BoundedConnection
except ImportError as error:
    raise missing_extra(error) from error

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ckpt_engine.parameter_server import ParameterServer

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

ANSWER_SECONDS = 5
"""How long the end waits for requests that are being answered."""
GRACE_SECONDS = 20.0
"""How long everything may take to end: less than a launcher waits before it kills."""


CANCEL_SIGNAL = signal.SIGUSR1
"""What the event loop's thread sends to the main thread."""


class Interrupted(BaseException):
    """A signal, raised inside the operation at work."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"the parameter server was ended by {signal.Signals(signum).name}")


class CancelledByRequest(BaseException):
    """Raised inside the operation that somebody wants to end."""

    def __init__(self) -> None:
        super().__init__("it was cancelled by a request")


class MainThread(Executor):
    """Runs what is submitted in the thread that calls `run`, until a signal."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._working = False
        self._ended = False
        self._cancels = False
        self.signum: int | None = None

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._interruptible(lambda: fn(*args, **kwargs)))
            except Interrupted as interrupt:
                future.set_exception(ServerStopping(str(interrupt)))
            except CancelledByRequest as cancel:
                future.set_exception(Cancelled(str(cancel)))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it
                future.set_exception(error)

        if self._ended:
            future.set_exception(ServerStopping("the parameter server is ending"))
        else:
            self._work.put(work)
        return future

    def run(self) -> None:
        """Works until `stop` or a signal; then what is still waiting fails."""
        while (work := self._work.get()) is not None:
            work()
        self._ended = True
        with suppress(queue.Empty):
            while True:
                if (left := self._work.get_nowait()) is not None:
                    left()

    def stop(self) -> None:
        self._work.put(None)

    def cancel(self) -> bool:
        """Ends what is at work in the main thread, from another one; false if nothing is."""
        if not self._working:
            return False
        self._cancels = True
        signal.pthread_kill(threading.main_thread().ident or 0, CANCEL_SIGNAL)
        return True

    def _interruptible(self, work: Callable[[], T]) -> T:
        if self._ended:
            raise ServerStopping("the parameter server is ending")
        self._cancels = False
        self._working = True
        try:
            # A signal that came just before is not lost.
            if self.signum is not None:
                raise Interrupted(self.signum)
            return work()
        finally:
            self._working = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end `run`, and what runs in it."""

        def handle(signum: int, _: FrameType | None) -> None:
            first = self.signum is None
            self.signum = signum
            self.stop()
            # Once: a second signal must not break off the clean-up that the first one began.
            if first and self._working:
                raise Interrupted(signum)

        def cancel(_signum: int, _: FrameType | None) -> None:
            # Once, as above; and a signal from elsewhere means nothing.
            if self._cancels and self._working and self.signum is None:
                self._cancels = False
                raise CancelledByRequest

        before = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
        before[CANCEL_SIGNAL] = signal.signal(CANCEL_SIGNAL, cancel)
        try:
            yield
        finally:
            # After a signal the process is about to end: another one changes nothing.
            for signum, handler in before.items():
                signal.signal(signum, signal.SIG_IGN if self.signum is not None else handler)


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        loop="asyncio",
        http=BoundedConnection,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=ANSWER_SECONDS,
    )


class Listener(Protocol):
    """An address that is listened on."""

    sock: socket.socket

    def close(self) -> None: ...


class _Server(uvicorn.Server):
    """Tells when it has begun."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.begun = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.begun.set()


def serve(
    ps: ParameterServer,
    listen: Callable[[], Listener],
    *,
    servers: RankServers | None = None,
    token: str | None = None,
    access: Access | None = None,
    local_only: bool = False,
    announce: Callable[[Listener], None] = lambda _: None,
) -> int | None:
    """Serves `ps` until a signal, in the main thread; then closes it and the listener.

    Args:
        listen: makes the listener.
        servers, token, access, local_only: as of `create_app`.
        announce: called with the listener once requests are answered.

    Returns:
        The signal that ended it; None: the event loop ended by itself.

    Raises:
        ConfigError: of `listen`.
    """
    main = MainThread()
    # Signals first: what is made from here on is taken back.
    with main.signals(), closing(ps), closing(listen()) as listener, _bounded_end(listener):
        server = _Server(
            uvicorn_config(
                create_app(
                    ps, servers=servers, executor=main, token=token, access=access, local_only=local_only
                )
            )
        )

        def loop() -> None:
            try:
                server.run(sockets=[listener.sock])
            finally:
                server.begun.set()
                main.stop()

        thread = threading.Thread(target=loop, name="ckpt-engine-http", daemon=True)
        thread.start()
        try:
            server.begun.wait()
            announce(listener)
            main.run()
        finally:
            server.should_exit = True
            thread.join()
            # Inside the bound: it tells the other ranks goodbye.
            ps.close()
    return main.signum


@contextmanager
def _bounded_end(listener: Listener) -> Iterator[None]:
    """After a signal the process ends within GRACE_SECONDS, whatever the main thread waits in.

    A signal's handler runs in the main thread between two steps of Python; a wait inside a library, such
    as for the control store, may hold it for minutes. The descriptor is written by the signal itself.
    """
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(read, True)
    ended = threading.Event()

    def watch() -> None:
        number = os.read(read, 1)
        while number == bytes([CANCEL_SIGNAL]):  # that ends an operation, not the process
            number = os.read(read, 1)
        if number in (b"", b"\0") or ended.wait(GRACE_SECONDS):
            return
        logger.error("not ended %.0f s after signal %d: ending at once", GRACE_SECONDS, number[0])
        with suppress(OSError):
            listener.close()
        os._exit(128 + number[0])

    thread = threading.Thread(target=watch, name="ckpt-engine-end", daemon=True)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)
