"""A worker that leaves early waits for its own reloads before it unmaps what they read."""

from __future__ import annotations

import time
from typing import Protocol

DRAIN_SECONDS = 5.0
"""How long it waits."""


class _Event(Protocol):
    def query(self) -> bool: ...


def drained(done: _Event) -> bool:
    """Whether `done`, recorded behind the reloads enqueued so far, happens in time; the engine's own work
    before them may take long."""
    until = time.monotonic() + DRAIN_SECONDS
    while not done.query():
        if time.monotonic() > until:
            return False
        time.sleep(0.0005)
    return True
