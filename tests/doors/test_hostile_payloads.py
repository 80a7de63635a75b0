"""Hostile bytes through every socket that ranks listen on, in the middle of an update: it passes, and so does
the next; nothing in them is carried out; no process, thread or connection stays behind.

HTTP's share is in tests/unit/server/test_server_connections.py, that of leases in
tests/unit/transport/test_leases_strangers.py.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.doors.conftest import HeldWorld
from tests.integration.conftest import free_port
from tests.support.listening_sockets import doors_of

HANG_UP_SECONDS = 30.0


class Bomb:
    """A pickle that makes a file, where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def by_zmq(words: bytes) -> bytes:
    """As ZeroMQ frames a long message."""
    return b"\x02" + len(words).to_bytes(8, "big") + words


def payloads(marker: Path) -> dict[str, bytes]:
    bombs = [pickle.dumps(Bomb(marker), protocol) for protocol in (0, 2, 5)]
    framed = [struct.pack("<I", len(bomb)) + bomb for bomb in bombs]
    zmtp = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x01NULL" + bytes(48)
    ready = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
    script = f"__import__('os').mkdir({str(marker)!r})".encode()
    return {
        "nothing": b"",
        "a byte": b"\0",
        "ones": b"\xff" * 4096,
        "random-like": bytes(i * 167 & 255 for i in range(1 << 16)),
        "http": b"POST /v1/checkpoints/a/update HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
        "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        **{f"pickle {n}": bomb for n, bomb in enumerate(bombs)},
        **{f"framed pickle {n}": bomb for n, bomb in enumerate(framed)},
        **{
            f"pickle by ZeroMQ {n}": zmtp + ready + b"\x02" + (len(b)).to_bytes(8, "big") + b
            for n, b in enumerate(bombs)
        },
        "python": script + b"\n",
        "json python": b'{"rank": 1, "token": "' + script + b'", "nbytes": 1}\n',
        "json class": b'{"__class__": "os.system", "py/object": "os.system", "rank": 0}\n',
        "json deep": b"[" * 4000 + b"\n",
        "json long": b"{" + b" " * 100_000,
        "hello of a rank": b'{"rank": 1, "token": "x", "nbytes": 4096}\n',
        "hello of no size": b'{"rank": 1, "token": "", "nbytes": -1}\n',
        "a length of 4 GiB": struct.pack("<I", 0xFFFFFFFF) + b"x" * 100,
        "a length of 0": struct.pack("<I", 0) * 100,
        "msgpack of 4 G items": struct.pack("<I", 5) + b"\xdd\xff\xff\xff\xff",
        "msgpack deep": struct.pack("<I", 1000) + b"\x91" * 1000,
        "msgpack extension": struct.pack("<I", 6) + b"\xc7\x03\x01abc",
        "zmtp 9.9": b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x09\x09NULL" + bytes(48),
        "zmtp curve": b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x01CURVE" + bytes(47),
        "zmtp 8 EiB": zmtp + ready + b"\x02" + b"\x7f" + b"\xff" * 7 + b"x" * 100,
        "zmtp garbage": zmtp + b"\xfe" * 1000,
        "identity of 64 KiB": b"a" * 65536,
    }


def connected(door: str | int) -> socket.socket:
    if isinstance(door, int):
        return socket.create_connection(("127.0.0.1", door), timeout=HANG_UP_SECONDS)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(HANG_UP_SECONDS)
    try:
        sock.connect(door)
    except OSError:
        sock.close()
        raise
    return sock


def attack(doors: list[str | int], marker: Path) -> list[socket.socket]:
    """Says everything at every door, each on a connection of its own; half of them are kept open."""
    kept = []
    for door in doors:
        for number, words in enumerate(payloads(marker).values()):
            sock = connected(door)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                sent = 0
                while sent < len(words):
                    sent += sock.send(words[sent:])
            if number % 2:
                sock.close()
            else:
                kept.append(sock)
        # With descriptors that nobody asked for.
        if isinstance(door, str):
            sock = connected(door)
            with contextlib.suppress(OSError), open(os.devnull) as null:
                socket.send_fds(sock, [b"x" * 32], [null.fileno()] * 8)
            kept.append(sock)
    return kept


@pytest.fixture(params=[1, 2], ids=["one host", "two hosts"])
def world(request: pytest.FixtureRequest, new_world: Callable[..., HeldWorld]) -> HeldWorld:
    if request.param == 1:
        return new_world(2, 1)
    return new_world(2, 2, CKPT_ENGINE_CONTROL_PORT=str(free_port()))


@pytest.fixture
def kept() -> Iterator[list[socket.socket]]:
    kept: list[socket.socket] = []
    yield kept
    for sock in kept:
        sock.close()


def doors_that_are_ours(world: HeldWorld) -> list[str | int]:
    """Every Unix socket, and the control server's port; of torch's and gloo's SECURITY.md tells."""
    control = world.fleet.ranks[0]
    found: list[str | int] = [path for rank in world.fleet.ranks for path in doors_of(rank.pid).paths]
    ports = doors_of(control.pid).ports
    return found + [port for port in ports if port == world.control_port]


def test_an_update_passes_while_every_door_is_tried(
    world: HeldWorld, kept: list[socket.socket], tmp_path: Path
) -> None:
    marker = tmp_path / "carried-out"
    world.update()
    world.update()
    threads = world.threads()
    before = [len(rank.descriptors()) for rank in world.fleet.ranks]

    def meanwhile() -> None:
        doors = doors_that_are_ours(world)
        kinds = {Path(str(door)).name.split("-")[0].split(".")[0] for door in doors if isinstance(door, str)}
        assert "w" in kinds
        assert ("control" in kinds) or any(isinstance(door, int) for door in doors)
        kept.extend(attack(doors, marker))

    world.update(meanwhile)
    assert not marker.exists()
    # Who got in nowhere is hung up on, at the latest when the update's sockets go.
    deadline = time.monotonic() + HANG_UP_SECONDS
    for sock in kept:
        if sock.family == socket.AF_UNIX:
            sock.settimeout(max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(ConnectionError):
                while sock.recv(65536):
                    pass
    for sock in kept:
        sock.close()
    world.update()
    assert world.threads() == threads
    deadline = time.monotonic() + HANG_UP_SECONDS
    while any(
        len(rank.descriptors()) > most + 4 for rank, most in zip(world.fleet.ranks, before, strict=True)
    ):
        assert time.monotonic() < deadline, [rank.descriptors() for rank in world.fleet.ranks]
        time.sleep(0.05)


def test_links_between_ranks_are_made_while_strangers_knock(
    new_world: Callable[..., HeldWorld], kept: list[socket.socket], tmp_path: Path
) -> None:
    """A rank listens for the others of its host only while an update begins: strangers are there first."""
    world = new_world(2, 1)
    world.update()
    marker = tmp_path / "carried-out"
    (first,) = {Path(path).parent for path in doors_of(world.fleet.ranks[0].pid).paths}
    peer = str(first / "peer")  # rank 1 will connect there
    ended = threading.Event()
    tried = 0

    def knock() -> None:
        nonlocal tried
        while not ended.is_set():
            # Few at a time: a crowd that fills the backlog would only keep rank 1 waiting.
            for words in list(payloads(marker).values())[::9]:
                with contextlib.suppress(OSError), connected(peer) as sock:
                    sock.sendall(words)
                    tried += 1
            ended.wait(0.001)

    thread = threading.Thread(target=knock)
    thread.start()
    try:
        updates = 0
        while not tried or updates < 3:
            world.update()
            updates += 1
            assert updates < 30, "no door was found open"
    finally:
        ended.set()
        thread.join()
    assert not marker.exists()
    world.update()
