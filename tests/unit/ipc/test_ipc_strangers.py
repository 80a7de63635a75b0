"""Strangers, processes of this user that found the sockets, are neither heard nor answered."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest
import torch
import zmq
from ends_for_ipc_tests import TENSORS, UUID, RawWorker, Receiver, Sender, connect

from ckpt_engine.ipc import messages
from ckpt_engine.ipc.messages import BucketDone, Finished, Goodbye, Hello, Ready

Context = zmq.Context[zmq.Socket[bytes]]
HELLO = Hello(messages.PROTOCOL_VERSION, UUID, 1)


class Strangers:
    """Every kind of them, and what they got."""

    def __init__(self, context: Context, handle: str) -> None:
        self.context = context
        self.handle = handle
        self.dealers: list[zmq.Socket[bytes]] = []
        self.streams: list[socket.socket] = []

    def disturb(self) -> None:
        words: list[list[bytes]] = [
            [b"garbage"],
            [b"", b"", b""],
            [b"\xc1" * (messages.MAX_WORKER_MESSAGE_NBYTES + 1)],
            *(
                [messages.encode(message)]
                for message in (HELLO, Ready(), BucketDone(0), Finished(), Goodbye())
            ),
            [messages.encode(messages.Failure("buckets", "Stranger", "I say no", "", UUID, True))],
        ]
        for frames in words:
            dealer = self.context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(self.handle)
            dealer.send_multipart(frames)
            self.dealers.append(dealer)
        for path in (self.handle, f"{self.handle}.life"):
            for data in (b"", b"\xff" * 5, b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00" * 20_000):
                sock = connect(path)
                sock.setblocking(False)
                if data:
                    sock.send(data)
                self.streams.append(sock)
            closed = connect(path)
            closed.send(b"x")
            closed.close()

    def got(self) -> list[object]:
        """What our end said to them, apart from ZeroMQ's greeting."""
        heard: list[object] = [dealer.recv_multipart() for dealer in self.dealers if dealer.poll(0)]
        for sock in self.streams:
            try:
                data, descriptors, _, _ = socket.recv_fds(sock, 4096, 8)
            except (BlockingIOError, ConnectionResetError):
                continue
            heard += descriptors
            if not sock.getpeername().endswith(
                b".life" if isinstance(sock.getpeername(), bytes) else ".life"
            ):
                data = data.removeprefix(GREETING[: len(data)])
            if data:
                heard.append(data)
        return heard

    def close(self) -> None:
        for dealer in self.dealers:
            dealer.close(0)
        for sock in self.streams:
            sock.close()


GREETING = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x01NULL" + bytes(48)


def test_strangers_neither_disturb_an_update_nor_get_anything(context: Context, base: Path) -> None:
    with Sender(context, base) as sender:
        strangers = Strangers(context, sender.handle)
        seen = 0

        def disturb() -> None:
            nonlocal seen
            strangers.disturb()
            seen += 1
            # All that came was read: the last one's words, too.
            wanted = sum(1 for sock in strangers.streams if str(sock.getpeername()).endswith(".life"))
            sender.until(lambda: len(sender.channel._lifelines) >= wanted, "the strangers")

        sender.between = disturb
        disturb()
        end = Receiver(context, sender.handle)
        sender.update()
        end.join()
        assert end.threw is None
        assert end.loaded.keys() == TENSORS.keys()
        assert all(torch.equal(end.loaded[name], tensor) for name, tensor in TENSORS.items())
        assert seen == 6
        assert strangers.got() == []
        strangers.close()
    assert list(base.iterdir()) == []


def test_a_strangers_words_are_bounded_in_memory(context: Context, base: Path) -> None:
    with Sender(context, base) as sender:
        stranger = connect(f"{sender.handle}.life")
        stranger.settimeout(0)
        sent = 0
        while sent < 4_000_000:
            sender.reactor.turn(0)
            with contextlib.suppress(BlockingIOError):
                sent += stranger.send(b"x" * 65536)
        sender.until(lambda: sender.channel._lifelines, "the stranger")
        assert len(sender.channel._lifelines[0].identity) <= 64
        stranger.close()
        sender.until(lambda: not sender.channel._lifelines, "its end")


def test_nothing_is_told_to_a_process_of_another_user(
    context: Context, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Sender(context, base) as sender:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        monkeypatch.setattr("ckpt_engine.ipc.sockets.peer_credentials", lambda _: (77, 54321))
        raw = RawWorker(context, sender.handle)
        sender.channel.begin(sender.plan, sender.ring)
        assert raw.lifeline is not None
        raw.lifeline.setblocking(False)

        def refused() -> bool:
            assert raw.lifeline is not None
            try:
                return raw.lifeline.recv(1) == b""
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True

        sender.until(refused, "the end of its lifeline")
        assert sender.channel._lifelines == []
        assert not raw.zmq.poll(0)
        assert not sender.channel.connected
        raw.close()
