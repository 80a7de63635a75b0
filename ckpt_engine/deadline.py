"""A point in time by which something must have happened. Every wait takes one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

from ckpt_engine.errors import ConfigError

Timeout = timedelta | float
"""A duration, or seconds."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """On the monotonic clock, in seconds."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    @property
    def remaining(self) -> float:
        """Seconds left, 0 when passed."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.at

    def or_after(self, seconds: float) -> Deadline:
        """The earlier of this one and `seconds` from now."""
        return Deadline(min(self.at, time.monotonic() + seconds))


def deadline_of(timeout: Timeout) -> Deadline:
    """A caller's timeout, from now on. Raises ConfigError: it is not positive."""
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not seconds > 0:
        raise ConfigError(f"timeout={timeout}: must be a positive number of seconds")
    return Deadline.after(seconds)
