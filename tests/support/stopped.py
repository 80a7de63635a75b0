"""A signal stops a process some time after it was sent."""

from __future__ import annotations

import time
from pathlib import Path

SECONDS = 30.0


def wait_until_stopped(pid: int) -> None:
    """Until the kernel says that SIGSTOP has been heard."""
    stat, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + SECONDS
    while stat.read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < deadline, f"pid {pid} does not stop"
        time.sleep(0.001)
