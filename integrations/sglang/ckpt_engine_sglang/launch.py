"""A command that runs in this one's place, such as torchrun, and ends when this one is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOOK_SECONDS = 0.1
_GRACE_SECONDS = 45.0
"""For the command and what it started; torchrun gives its ranks 30 s of them."""


def run_in_place(command: Sequence[str], grace: float = _GRACE_SECONDS) -> int:
    """Runs `command`; its exit status, or 128 + the signal that ended this process's part.

    SIGTERM, SIGINT and SIGHUP go on to the command. After `grace` seconds, or a second signal, it and all
    that it started are killed. Only for the main thread.
    """
    told: list[int] = []
    before = {each: signal.signal(each, lambda signum, _: told.append(signum)) for each in _FORWARDED}
    try:
        # A session of its own: a terminal's Ctrl-C would reach it twice, once past us.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            while not told and process.poll() is None:
                time.sleep(_LOOK_SECONDS)
            if process.returncode is not None:
                return process.returncode
            _end(process, told, grace)
            return 128 + told[0]
        finally:
            if process.poll() is None:
                _kill({process.pid: _born(process.pid), **_descendants(process.pid)})
                process.wait()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end(process: subprocess.Popen[bytes], told: Sequence[int], grace: float) -> None:
    started = _descendants(process.pid)
    process.send_signal(told[0])
    deadline = time.monotonic() + grace
    while process.poll() is None and time.monotonic() < deadline and len(told) == 1:
        started |= _descendants(process.pid)
        time.sleep(_LOOK_SECONDS)
    if process.poll() is None:
        started |= _descendants(process.pid)
        process.kill()
        process.wait()
    _kill(started)


def _descendants(pid: int) -> dict[int, str]:
    """What the process started, and they: each one's time of birth, since numbers are used again."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        fields = _stat(int(entry.name)) if entry.name.isdigit() else []
        if fields:
            parents[int(entry.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {each: _born(each) for each in found - {pid}}


def _kill(processes: dict[int, str]) -> None:
    for pid, born in processes.items():
        if born and _born(pid) == born:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _born(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields else ""


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on (proc(5)); empty: the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
