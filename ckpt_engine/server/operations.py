"""One long operation at a time, off the event loop, and run to its end even when nobody waits any more.

What has ended is remembered for a while: for those who look on (`GET /v1/operations`, `/v1/events`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from ckpt_engine.server.api_models import AllRanksAnswer, Ended, Running
from ckpt_engine.server.failures import CannotCancel, NothingRuns, RankBusy, body_of

T = TypeVar("T")

REMEMBERED = 100
"""Operations that have ended."""
LOOK_SECONDS = 0.2
"""Between two looks at what runs, for those who watch."""


@dataclass
class _AtWork:
    number: int
    operation: str
    checkpoint: str
    since: float
    done: int = 0
    total: int = 0


class Operations:
    """The rank's long operations.

    Args:
        executor: where they block. One worker is enough, since they exclude each other. It may have a
            `cancel()` that ends what it is at, and says whether there was anything.
        watchers: called with each operation that has ended.
    """

    def __init__(self, executor: Executor, watchers: Iterable[Callable[[Ended], object]] = ()) -> None:
        self._executor = executor
        self._watchers = list(watchers)
        self._lock = threading.Lock()
        self._running: _AtWork | None = None
        self._ended: deque[Ended] = deque(maxlen=REMEMBERED)
        self._count = 0

    @property
    def running(self) -> Running | None:
        """What this rank is at."""
        running = self._running
        if running is None:
            return None
        seconds = time.monotonic() - running.since
        return Running(
            number=running.number,
            operation=running.operation,
            checkpoint=running.checkpoint,
            seconds=seconds,
            bytes_done=running.done,
            bytes_total=running.total,
            eta_seconds=seconds * (running.total - running.done) / running.done if running.done else None,
        )

    @property
    def ended(self) -> list[Ended]:
        """The last ones, the oldest first."""
        return list(self._ended)

    def progress(self, done: int, total: int) -> None:
        """For the operation at work, from any thread."""
        running = self._running
        if running is not None:
            running.done, running.total = done, total

    async def exclusive(self, operation: str, checkpoint: str, job: Callable[[], Awaitable[T]]) -> T:
        """`await job()`, unless another is running.

        Raises:
            RankBusy: another is.
        """
        running = self._begin(operation, checkpoint)

        async def run() -> T:
            try:
                result = await job()
            except BaseException as error:
                self._remember(running, None, error)
                raise
            else:
                self._remember(running, result, None)
                return result
            finally:
                self._running = None

        # A request that is given up must not free the place while its work goes on in a thread.
        return await asyncio.shield(asyncio.ensure_future(run()))

    async def blocking(self, work: Callable[[], T]) -> T:
        """`work()`, in the executor; for jobs."""
        return await asyncio.wrap_future(self._executor.submit(work))

    def cancel(self) -> Running:
        """Ends the operation at work, which then fails on all of its ranks; returns what it was.

        Raises:
            NothingRuns: there is none.
            CannotCancel: the executor cannot end what it is at.
        """
        running = self.running
        if running is None:
            raise NothingRuns("this rank is at nothing that could be cancelled")
        cancel = getattr(self._executor, "cancel", None)
        if cancel is None:
            raise CannotCancel(
                "operations of this server run in a thread, which nothing can end: serve it with "
                "`ckpt-engine serve`, or `ckpt_engine.server.serving.serve`"
            )
        if not cancel():
            raise NothingRuns("what this rank was at has just ended")
        return running

    async def events(self, after: int) -> AsyncIterator[tuple[str, Ended | Running]]:
        """("ended", an operation with a number above `after`), and ("running", ...) whenever that changed.

        It never ends by itself.
        """
        told: Running | None = None
        while True:
            for ended in self.ended:
                if ended.number > after:
                    after = ended.number
                    yield "ended", ended
            running = self.running
            if running is not None and (
                told is None or (told.number, told.bytes_done) != (running.number, running.bytes_done)
            ):
                told = running
                yield "running", running
            await asyncio.sleep(LOOK_SECONDS)

    def _begin(self, operation: str, checkpoint: str) -> _AtWork:
        with self._lock:
            now = time.monotonic()
            if self._running is not None:
                other = self._running
                raise RankBusy(
                    f"this rank has been at the {other.operation} of {other.checkpoint!r} for "
                    f"{now - other.since:.1f} s, and does one thing at a time: ask for the {operation} of "
                    f"{checkpoint!r} when that has ended"
                )
            self._count += 1
            self._running = _AtWork(self._count, operation, checkpoint, now)
            return self._running

    def _remember(self, running: _AtWork, result: object, error: BaseException | None) -> None:
        figures = _figures(result)
        ended = Ended(
            number=running.number,
            operation=running.operation,
            checkpoint=running.checkpoint,
            ended_at=time.time(),
            seconds=time.monotonic() - running.since,
            nbytes=figures.get("nbytes", running.done),
            version=figures.get("version") or None,
            stages=figures.get("stages") or {},
            error=None if error is None else body_of(error),
        )
        self._ended.append(ended)
        for watcher in self._watchers:
            watcher(ended)


def _figures(result: object) -> dict[str, Any]:
    """Of this rank's answer, which is one of several where all ranks were asked."""
    if isinstance(result, AllRanksAnswer):
        return result.ranks[0].answer
    return result.model_dump() if isinstance(result, BaseModel) else {}
