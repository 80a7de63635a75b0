"""What the tests of leases share: leases that are released at their end, and processes that read or own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ckpt_engine.deadline import Deadline
from ckpt_engine.transport.lease_server import LeaseServer
from ckpt_engine.transport.leases import Lease, Share

SESSION, NAME, EPOCH, LAYOUT = "d7" * 16, "step-100", "e1", "a layout's digest"
LIMIT = 60.0
"""Seconds for what should happen at once, on a loaded machine."""


_TAKEN: list[Lease] = []


def release_all() -> None:
    """What `take` took; the thread that renews leases ends with them."""
    while _TAKEN:
        _TAKEN.pop().release()
    until(lambda: not thread_count("ckpt-engine-lease-keeper"), "the keeper ends with the last lease")


def take(
    server: LeaseServer | str,
    reader: str = "r",
    *,
    session: str = SESSION,
    name: str = NAME,
    epoch: str = EPOCH,
    layout: str = LAYOUT,
    seconds: float = LIMIT,
) -> Lease:
    share = share_at(server, session=session, checkpoint=name, epoch=epoch, layout=layout)
    lease = Lease.take(share, Deadline.after(seconds), reader=reader)
    _TAKEN.append(lease)
    return lease


def share_at(server: LeaseServer | str, **other: str) -> Share:
    address = server if isinstance(server, str) else server.address
    return Share(
        **{"address": address, "session": SESSION, "checkpoint": NAME, "epoch": EPOCH, "layout": LAYOUT}
        | other
    )


def publish(server: LeaseServer, name: str = NAME, epoch: str = EPOCH, **other: int) -> None:
    server.publish(name, epoch, lambda: LAYOUT, **other)


def until(done: Callable[[], bool], what: str, seconds: float = LIMIT) -> None:
    deadline = Deadline.after(seconds)
    while not done():
        assert not deadline.passed, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def asked(server: LeaseServer) -> int:
    """Connections that have a lease, or wait for one."""
    return sum(one.ask is not None for one in server._connections)


def thread_count(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


@contextmanager
def process(code: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Python code in a process of its own, and the first line that it says."""
    modules = ("transport.leases", "transport.lease_server", "deadline")
    head = "".join(f"from ckpt_engine.{module} import *\n" for module in modules)
    command = [sys.executable, "-c", head + code + "\nimport sys; sys.stdin.read()"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as child:
        try:
            assert child.stdout is not None
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


def reading_process(address: str) -> str:
    return (
        f"lease = Lease.take({share_at(address)!r}, Deadline.after({LIMIT}), "
        "reader='the other process')\nprint('taken', flush=True)"
    )
