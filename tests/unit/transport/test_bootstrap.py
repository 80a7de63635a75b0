"""Which address of its own a host takes: found by its routes, and without a packet to anybody."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from ckpt_engine.transport.bootstrap import host_ip


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
