"""What all ranks say to one and one to all: it does not grow with the world where it need not."""

from __future__ import annotations

import random
import socket
import threading
import zlib
from pathlib import Path

import msgspec
import pytest

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ProtocolError
from ckpt_engine.transport import control_messages as messages
from ckpt_engine.transport.bootstrap import MeetingPoint
from ckpt_engine.transport.control import Control

SEED = 20261128


def test_what_was_packed_comes_back() -> None:
    generator = random.Random(SEED)
    for nbytes in (0, 1, 4095, 4096, 100_000):
        for payload in (bytes(nbytes), generator.randbytes(nbytes)):
            assert messages.unpack(messages.pack(payload)) == payload
    brought = [b"", None, b"x" * 5000, generator.randbytes(300)]
    met = messages.Met.of(7, [None if one is None else messages.pack(one) for one in brought], {1: "gone"})
    assert met.brought() == brought


@pytest.mark.parametrize(
    "blob",
    [b"z", b"zgarbage", b"z" + zlib.compress(b"x" * 9000)[:-8], b"z" + zlib.compress(bytes(2000))],
    ids=["nothing", "garbage", "cut", "too large"],
)
def test_what_cannot_be_unpacked(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_FRAME_NBYTES", 1000)
    with pytest.raises(ProtocolError, match="what a rank brought"):
        messages.unpack(blob)
    with pytest.raises(ProtocolError, match="what a rank brought"):
        messages.Met(1, messages.pack(msgspec.msgpack.encode([blob])), {}).brought()


def test_what_is_no_list_of_what_ranks_brought() -> None:
    with pytest.raises(ProtocolError, match="not what ranks brought"):
        messages.Met(1, messages.pack(b"\xff"), {}).brought()


def test_what_is_alike_in_thousands_is_sent_once() -> None:
    brought = [messages.pack(b"as everybody's, and rank %d" % rank + b"." * 500) for rank in range(4096)]
    told = messages.encode_frame(messages.Met.of(1, [*brought], {}))
    assert len(told) < 30 * 4096


@pytest.mark.parametrize("size", [2, 4096])
def test_who_calls_all_ranks_does_not_name_them(size: int, tmp_path: Path) -> None:
    """What rank 1 sends, read where rank 0 would be."""
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(20)
        welcome = messages.encode_frame(messages.Welcome())

        def no_store() -> object:
            raise AssertionError("nobody needs one")

        point = MeetingPoint(no_store, "127.0.0.1", path)  # type: ignore[arg-type]
        accepted: list[socket.socket] = []

        def accept() -> None:
            sock, _ = listener.accept()
            sock.settimeout(20)
            sock.recv(1 << 16)
            sock.sendall(welcome)
            accepted.append(sock)

        thread = threading.Thread(target=accept)
        thread.start()
        control = Control(point, rank=1, world_size=size, deadline=Deadline.after(20))
        thread.join(20)
        (sock,) = accepted
        try:
            control.send(
                messages.Enter(1, control.open_round("meet")._told_members, "meet", b"-", False, True)
            )
            assert len(sock.recv(1 << 20)) < 40
            some = control.open_round("meet", [0, 1])
            assert some._told_members == (None if size == 2 else (0, 1))
        finally:
            control.close()
            sock.close()
