"""Lease servers: where they listen, and who speaks to them in another way, too slowly, or too often."""

from __future__ import annotations

import errno
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from leases_for_transport_tests import (
    EPOCH,
    LAYOUT,
    LIMIT,
    NAME,
    SESSION,
    publish,
    take,
    until,
)

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, P2PError
from ckpt_engine.transport import lease_messages as messages
from ckpt_engine.transport import lease_server
from ckpt_engine.transport.framing import LENGTH, FrameBuffer
from ckpt_engine.transport.lease_server import LeaseServer

pytestmark = pytest.mark.usefixtures("releases_leases")


# Addresses


def test_ipv6() -> None:
    server = LeaseServer("::1", 0, SESSION)
    try:
        assert server.address.startswith("[::1]:")
        publish(server)
        lease = take(server, "six")
        assert server.withdraw(NAME, Deadline.after(0))[0].startswith("six ([::1]:")
        lease.release()
    finally:
        server.close()


def test_a_port_of_choice_and_one_that_is_taken(server: LeaseServer) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot serve leases at 127.0.0.1, port {port}"):
        LeaseServer("127.0.0.1", port, SESSION)
    server.close()
    again = LeaseServer("127.0.0.1", port, SESSION)
    assert again.address == f"127.0.0.1:{port}"
    again.close()


@pytest.mark.parametrize("address", ["", "nowhere", "nowhere:", ":80", "host:port", "host:65536"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(P2PError, match="is no address of a lease server"):
        take(address)


# Strangers, and what is malformed


def connect(server: LeaseServer) -> socket.socket:
    host, port = messages.parts_of(server.address)
    return socket.create_connection((host, port), timeout=LIMIT)


def ask(**other: str) -> bytes:
    fields = {"session": SESSION, "checkpoint": NAME, "epoch": EPOCH, "layout": LAYOUT, "reader": "r"} | other
    return messages.frame(messages.Ask(messages.LEASE_PROTOCOL, **fields))


def answer(sock: socket.socket) -> messages.OwnerMessage:
    frames = FrameBuffer(messages.MAX_NBYTES)
    while (body := frames.next()) is None:
        data = sock.recv(4096)
        assert data
        frames.feed(data)
    return messages.owner_message(body)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        LENGTH.pack(messages.MAX_NBYTES + 1),
        LENGTH.pack(4) + b"\xff\xff\xff\xff",
        LENGTH.pack(3) + b'{"a',
        messages.frame(messages.Check()),
        messages.frame(messages.Renew()),
        ask() + ask(),
        messages.frame(messages.Held()),
    ],
)
def test_who_speaks_otherwise_is_hung_up_on(server: LeaseServer, said: bytes) -> None:
    with connect(server) as sock:
        sock.sendall(said)
        while data := sock.recv(4096):  # to the end of the connection, at once
            assert data == messages.frame(messages.Granted())
    take(server).release()


def test_another_version_is_told(server: LeaseServer) -> None:
    with connect(server) as sock:
        sock.sendall(messages.frame(messages.Ask(0, SESSION, NAME, EPOCH, LAYOUT, "old")))
        assert answer(sock) == messages.Refused("it speaks version 3 of this protocol")


def test_a_message_may_come_byte_by_byte(server: LeaseServer) -> None:
    with connect(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in ask():
            sock.sendall(bytes([byte]))
        assert answer(sock) == messages.Granted()


def test_who_is_silent_or_slow_is_hung_up_on(server: LeaseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_server, "ASK_SECONDS", 0.5)
    with connect(server) as silent, connect(server) as slow:
        began = time.monotonic()
        slow.settimeout(0.1)
        data = None
        while data is None:
            assert time.monotonic() - began < LIMIT
            try:
                slow.sendall(b"\x20")  # a length that is never whole keeps nobody on the line
                data = slow.recv(1)
            except TimeoutError:
                data = None
            except ConnectionError:
                data = b""
        assert data == b""
        assert silent.recv(1) == b""
        assert time.monotonic() - began >= 0.5


def test_strangers_never_keep_readers_out(server: LeaseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_server, "MAX_STRANGERS", 4)
    lease = take(server)
    crowd = [connect(server) for _ in range(9)]
    try:
        take(server).release()
        lease.check()
        assert len([one for one in server._connections if one.ask is None]) <= 4
        assert crowd[0].recv(1) == b""  # the oldest went first
    finally:
        for sock in crowd:
            sock.close()


def test_leases_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_server, "MAX_LEASES", 2)
    server = LeaseServer("127.0.0.1", 0, SESSION)
    publish(server)
    try:
        kept = [take(server), take(server)]
        with pytest.raises(P2PError, match="it has given 2 leases: ask again later"):
            take(server)
        kept[0].release()
        until(lambda: len(server._connections) == 1, "it is released")
        take(server).release()
    finally:
        server.close()


def test_without_descriptors_it_waits_and_goes_on(
    server: LeaseServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exhausted:
        tries = 0

        def accept(self) -> None:
            self.tries += 1
            raise OSError(errno.EMFILE, "too many open files")

        def fileno(self) -> int:
            return listener.fileno()

    listener = server._listener
    exhausted = Exhausted()
    with server._changed:
        server._selector.unregister(listener)
        server._listener = exhausted  # type: ignore[assignment]
        server._selector.register(exhausted, 1, server._accept)
    with ThreadPoolExecutor() as pool:
        taken = pool.submit(take, server)
        until(lambda: exhausted.tries == 1, "it cannot accept")
        server._listener = listener
        taken.result(LIMIT).release()
    assert exhausted.tries == 1  # it did not spin
