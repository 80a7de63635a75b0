"""Which faults were tried, and how soon the last survivor had reported each."""

from __future__ import annotations

KILLED_SECONDS = 20.0
"""A death is reported at once; so long on a machine that has more to do. The update's timeout is 120 s."""
STOPPED_SECONDS = 45.0
"""Silence is noticed after 3 or 4 s here; a worker's rank then waits 10 s for it to leave, and 5 s for
req_func."""
MISTAKE_SECONDS = 20.0
"""What nobody has to wait for: an error that a rank or a worker raises."""


class Reports:
    """Fault -> after how many seconds the last survivor had reported it; the most, if it happened again."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, fault: str, seconds: float, limit: float) -> None:
        self.seconds[fault] = max(seconds, self.seconds.get(fault, 0.0))
        assert seconds < limit, f"{fault}: the last survivor reported it after {seconds:.1f} s"

    def table(self) -> list[str]:
        lines = [f"{seconds:8.2f} s  {fault}" for fault, seconds in self.seconds.items()]
        slowest = max(self.seconds, key=self.seconds.__getitem__)
        return [
            *lines,
            f"{len(lines)} faults; the slowest report took {self.seconds[slowest]:.2f} s: {slowest}",
        ]
