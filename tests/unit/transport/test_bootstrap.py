"""Which address of its own a host takes: found by its routes, and without a packet to anybody. How rank 0 is
waited for."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import TCPStore

from ckpt_engine.deadline import Deadline
from ckpt_engine.settings import Settings
from ckpt_engine.termination import ends_in_order
from ckpt_engine.transport.bootstrap import MeetingPoint, host_ip, own_store
from ckpt_engine.transport.control import Control

LIMIT = 60.0


class Watched(socket.socket):
    """Keeps what sockets were connected to, or sent to."""

    connected: list[tuple[int, Any]]

    def connect(self, address: Any) -> None:  # noqa: ANN401
        self.connected.append((self.type, address))
        super().connect(address)

    def send(self, *_: object) -> int:
        raise AssertionError("a packet was sent")

    sendto = sendmsg = send  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("towards", "own"),
    [(None, "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("127.8.9.1", "127."), ("::1", "::1")],
)
def test_the_interface_that_faces_the_others(
    towards: str | None, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Watched.connected = []
    monkeypatch.setattr(socket, "socket", Watched)
    assert host_ip(towards).startswith(own)
    ((kind, address),) = Watched.connected
    assert kind == socket.SOCK_DGRAM  # of which the kernel only looks up the route
    assert address[0] == (towards or "127.0.0.1")


def test_a_host_name() -> None:
    assert host_ip("localhost") in ("127.0.0.1", "::1")


def test_a_name_that_nobody_knows() -> None:
    assert host_ip("no-such-host.invalid") == "127.0.0.1"


def when_it_sleeps(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Once this process has begun to wait."""
    pause = time.sleep

    def sleep(seconds: float) -> None:
        act()
        pause(seconds)

    monkeypatch.setattr(time, "sleep", sleep)


@pytest.mark.parametrize("port_is_open", [False, True])
def test_sigterm_ends_the_wait_for_rank_0(monkeypatch: pytest.MonkeyPatch, port_is_open: bool) -> None:
    """A launcher's ranks on other hosts wait like that while rank 0 waits for its engine."""
    rank_0 = own_store(0, 2, "127.0.0.1", 0, Settings(), Deadline.after(LIMIT))
    assert isinstance(rank_0.store, TCPStore)
    port = rank_0.store.port
    if not port_is_open:
        del rank_0
    when_it_sleeps(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    began = time.monotonic()
    with pytest.raises(SystemExit), ends_in_order():
        point = own_store(1, 2, "127.0.0.1", port, Settings(), Deadline.after(LIMIT))
        assert port_is_open  # ... and rank 0 has not said where its control server is
        Control(point, rank=1, world_size=2, deadline=Deadline.after(LIMIT))
    assert time.monotonic() - began < LIMIT / 2


def test_the_wait_for_rank_0_ends_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    made: list[MeetingPoint] = []

    def come() -> None:
        if not made:
            made.append(own_store(0, 2, "127.0.0.1", port, Settings(), Deadline.after(LIMIT)))

    when_it_sleeps(monkeypatch, come)
    point = own_store(1, 2, "127.0.0.1", port, Settings(), Deadline.after(LIMIT))
    made[0].store.set("a", "b")
    assert point.store.get("a") == b"b"
