"""How far a registration, or an update, has come."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[int, int], object]
"""Is called with (bytes done, bytes in all)."""


class Meter:
    """Adds up what tasks in several threads have done, and tells it; `tell` is called by one at a time."""

    def __init__(self, total: int, tell: Progress | None) -> None:
        self._total = total
        self._done = 0
        self._tell = tell
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        if self._tell is not None:
            with self._lock:
                self._done += nbytes
                self._tell(self._done, self._total)
