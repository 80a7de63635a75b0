"""One long operation at a time, off the event loop, and run to its end even when nobody waits any more."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar

from ckpt_engine.server.api_models import Running
from ckpt_engine.server.failures import RankBusy

T = TypeVar("T")


class Operations:
    """The rank's long operations.

    Args:
        executor: where they block. One worker is enough, since they exclude each other.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._lock = threading.Lock()
        self._running: tuple[str, str, float] | None = None

    @property
    def running(self) -> Running | None:
        """What this rank is at."""
        running = self._running
        if running is None:
            return None
        operation, checkpoint, since = running
        return Running(operation=operation, checkpoint=checkpoint, seconds=time.monotonic() - since)

    async def exclusive(self, operation: str, checkpoint: str, job: Callable[[], Awaitable[T]]) -> T:
        """`await job()`, unless another is running.

        Raises:
            RankBusy: another is.
        """
        self._begin(operation, checkpoint)

        async def run() -> T:
            try:
                return await job()
            finally:
                self._running = None

        # A request that is given up must not free the place while its work goes on in a thread.
        return await asyncio.shield(asyncio.ensure_future(run()))

    async def blocking(self, work: Callable[[], T]) -> T:
        """`work()`, in the executor; for jobs."""
        return await asyncio.wrap_future(self._executor.submit(work))

    def _begin(self, operation: str, checkpoint: str) -> None:
        with self._lock:
            now = time.monotonic()
            if self._running is not None:
                other, name, since = self._running
                raise RankBusy(
                    f"this rank has been at the {other} of {name!r} for {now - since:.1f} s, and does one "
                    f"thing at a time: ask for the {operation} of {checkpoint!r} when that has ended"
                )
            self._running = (operation, checkpoint, now)
