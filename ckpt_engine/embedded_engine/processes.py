"""Child processes that do not outlive their parent's work, whatever ends it: for the demo."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

from ckpt_engine.deadline import Deadline

GRACE_SECONDS = 10.0
"""How long a child may take to end after SIGTERM."""
_TOKEN_VARIABLE = "CKPT_ENGINE_DEMO_TOKEN"  # noqa: S105 - a mark, not a secret
_NOT_FOR_CHILDREN = (
    "CKPT_ENGINE_CPU_DEVICES",
    "CKPT_ENGINE_DEVICE_UUID",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""What a surrounding launcher may have set, and what would give both engines one identity."""


class Child:
    def __init__(self, name: str, process: subprocess.Popen[bytes], out: Path) -> None:
        self.name = name
        self.process = process
        self._out = out

    def announcement(self) -> dict[str, Any] | None:
        """The JSON line that the engine wrote when it began to listen."""
        line, newline, _ = self._out.read_text().partition("\n")
        return cast("dict[str, Any]", json.loads(line)) if newline else None


class Children:
    """Child processes that do not outlive the demo.

    torchrun puts its workers into sessions of their own, so neither a process group nor the launcher's
    death ends them. All descendants inherit a random mark in their environment instead, by which
    `end` finds those that are left.
    """

    def __init__(self, directory: Path, signals: Signals) -> None:
        self._directory = directory
        self._signals = signals
        self._token = secrets.token_hex(16)
        self._children: list[Child] = []

    def start(self, name: str, arguments: Sequence[str], **environment: str) -> Child:
        env = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_CHILDREN}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
        env[_TOKEN_VARIABLE] = self._token
        out = self._directory / f"{name}.out.log"
        # No signal may come between the child's birth and its entry in the list.
        with (
            self._signals.deferred(),
            out.open("wb") as stdout,
            (self._directory / f"{name}.err.log").open("wb") as stderr,
        ):
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                # The terminal's Ctrl-C comes to us alone; we end the children in order.
                start_new_session=True,
            )
            child = Child(name, process, out)
            self._children.append(child)
        return child

    def end(self) -> None:
        """SIGTERM, a grace period, SIGKILL; returns when all are reaped and no descendant is left."""
        for child in self._children:
            child.process.terminate()
        deadline = Deadline.after(GRACE_SECONDS)
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(deadline.remaining)
            # Does nothing to a child that is reaped.
            child.process.kill()
            child.process.wait()
        deadline = Deadline.after(GRACE_SECONDS)
        while (left := self._marked()) and not deadline.passed:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _marked(self) -> list[int]:
        mark = f"{_TOKEN_VARIABLE}={self._token}".encode()
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                # Other users' processes, and those that end meanwhile.
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found


class Interrupted(BaseException):
    def __init__(self, signum: int) -> None:
        self.signum = signum


class Signals:
    """SIGINT and SIGTERM as one exception, raised only where the demo can take it, and once."""

    def __init__(self) -> None:
        self._raises = False
        self._pending: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        # Python takes signal handlers from the main thread only.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def raising(self) -> Iterator[None]:
        self._raises = True
        try:
            self._check()
            yield
        finally:
            self._raises = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        before, self._raises = self._raises, False
        try:
            yield
        finally:
            self._raises = before
        self._check()

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self._pending = signum
        self._check()

    def _check(self) -> None:
        if self._raises and self._pending is not None:
            # A second signal must not break off the clean-up that the first one began.
            self._raises = False
            raise Interrupted(self._pending)
