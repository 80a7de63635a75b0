"""The control server: one thread in rank 0's process, where ranks meet and rounds are decided.

Being one thread it serialises every write, so a round (`rounds`) is decided once: by the last vote, or by
the first error, whatever comes first. A rank whose connection ends, or that is not heard for `stall_seconds`,
is *lost*: the rounds it has a part in are decided against, at once, by name.
"""

from __future__ import annotations

import hmac
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_engine.errors import ProtocolError
from ckpt_engine.ipc.sockets import check_peer, listen
from ckpt_engine.transport import control_messages as messages
from ckpt_engine.transport.framing import OUT_OF_DESCRIPTORS, FrameBuffer
from ckpt_engine.transport.rounds import Rounds

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.05
"""Between two looks at the clock, at least."""
JOIN_SECONDS = 10.0
"""How long a new connection may take to show the token."""
MAX_STRANGERS = 64
"""Connections that have not shown it yet, or as many as there are ranks: the oldest goes when one too many
comes, for each takes a descriptor of a process that an update needs descriptors of."""
BACKLOG = 1024


@dataclass(eq=False)
class _Client:
    sock: socket.socket
    heard: float
    rank: int | None = None
    frames: FrameBuffer = field(default_factory=lambda: FrameBuffer(messages.MAX_JOIN_NBYTES))
    out: deque[memoryview] = field(default_factory=deque)


class ControlServer:
    """Serves `world_size` ranks until closed."""

    def __init__(
        self, address: str | Path, world_size: int, token: str, stall_seconds: float, port: int = 0
    ) -> None:
        self._world_size = world_size
        self._token = token
        self._stall = stall_seconds
        self._local = isinstance(address, Path)
        if isinstance(address, Path):
            self._listener = listen(str(address), BACKLOG)
            self.port = 0
        else:
            self._listener = socket.create_server((address, port), family=_family(address), backlog=BACKLOG)
            self._listener.setblocking(False)
            self.port = self._listener.getsockname()[1]
        self._deaf_until = 0.0
        self._clients: dict[int, _Client] = {}
        self._strangers: dict[_Client, None] = {}  # in the order in which they came
        self._rounds = Rounds(self._tell, world_size)
        self._beaten = self._looked = time.monotonic()
        self._idle = threading.Condition()
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._serve, name="ckpt-engine-control-server", daemon=True)
        self._thread.start()

    def close(self, patience: float) -> None:
        """Waits, `patience` seconds at most, until every rank knows how its rounds ended; then ends."""
        with self._idle:
            self._idle.wait_for(lambda: not self._rounds.waiting(), patience)
            self._closing = True
        os.write(self._wake_write, b"x")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # The thread

    def _serve(self) -> None:
        try:
            while not self._closing:
                for key, events in self._selector.select(BEAT_SECONDS / 2):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.data, _Client):
                        self._attend(key.data, events)
                self._look_at_the_clock()
                with self._idle:
                    self._idle.notify_all()
        finally:
            for client in [*self._clients.values(), *self._strangers]:
                client.sock.close()
            self._listener.close()
            self._selector.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                logger.warning("control server: no connections are accepted for a second: %s", error)
                self._selector.unregister(self._listener)
                self._deaf_until = time.monotonic() + 1.0
            return
        try:
            if self._local:
                check_peer(sock)
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, ProtocolError) as error:
            logger.warning("control server: %s", error)
            sock.close()
            return
        if len(self._strangers) >= max(MAX_STRANGERS, self._world_size):
            self._drop(next(iter(self._strangers)), "")  # the oldest
        sock.setblocking(False)
        client = _Client(sock, time.monotonic())
        self._strangers[client] = None
        self._selector.register(sock, selectors.EVENT_READ, client)

    def _attend(self, client: _Client, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(client)
            if events & selectors.EVENT_READ:
                data = client.sock.recv(1 << 20)
                if not data:
                    raise ConnectionError("it closed its connection")
                client.heard = time.monotonic()
                client.frames.feed(data)
                while client.sock.fileno() >= 0 and (body := client.frames.next()) is not None:
                    self._take(client, messages.decode_rank_frame(body))
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(client, f"its process ended or its connection broke ({error})")
        except ProtocolError as error:
            logger.warning("control server: closing a connection: %s", error)
            self._drop(client, f"it broke the protocol: {error}")

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return  # Each look is at every rank, and every message would bring one.
        self._looked = now
        for client in list(self._clients.values()):
            if now - client.heard > self._stall:
                self._drop(client, f"it has not been heard for {now - client.heard:.1f} s (stopped?)")
        for client in list(self._strangers):
            if now - client.heard > JOIN_SECONDS:
                self._drop(client, "")
        if self._deaf_until and now > self._deaf_until:
            self._deaf_until = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._rounds.look_at_the_clock()
        if now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            for client in list(self._clients.values()):
                self._send(client, messages.Beat())

    # Connections

    def _send(self, client: _Client, message: messages.ServerFrame) -> None:
        self._send_bytes(client, messages.encode_frame(message))

    def _send_bytes(self, client: _Client, frame: bytes) -> None:
        client.out.append(memoryview(frame))
        try:
            self._flush(client)
        except OSError as error:
            self._drop(client, f"its connection broke ({error})")

    def _flush(self, client: _Client) -> None:
        while client.out:
            try:
                sent = client.sock.send(client.out[0])
            except BlockingIOError:
                break
            if sent == len(client.out[0]):
                client.out.popleft()
            else:
                client.out[0] = client.out[0][sent:]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.out else 0)
        if self._selector.get_key(client.sock).events != wanted:
            self._selector.modify(client.sock, wanted, client)

    def _drop(self, client: _Client, reason: str) -> None:
        if client.sock.fileno() < 0:
            return
        self._selector.unregister(client.sock)
        client.sock.close()
        self._strangers.pop(client, None)
        if client.rank is None or self._clients.get(client.rank) is not client:
            return
        del self._clients[client.rank]
        logger.info("control server: rank %d is lost: %s", client.rank, reason)
        self._rounds.lose(client.rank, reason)

    def _tell(self, ranks: Iterable[int], message: messages.ServerFrame) -> None:
        frame = messages.encode_frame(message)
        for rank in ranks:
            if (client := self._clients.get(rank)) is not None:
                self._send_bytes(client, frame)

    # What ranks say

    def _take(self, client: _Client, message: messages.RankFrame) -> None:
        if isinstance(message, messages.Join):
            self._join(client, message)
        elif client.rank is None:
            raise ProtocolError(f"{type(message).__name__} before Join")
        elif isinstance(message, messages.Goodbye):
            self._drop(client, "it has closed its parameter server")
        elif not isinstance(message, messages.Beat):
            self._rounds.hear(client.rank, message)

    def _join(self, client: _Client, join: messages.Join) -> None:
        if not hmac.compare_digest(join.token.encode(), self._token.encode()):
            raise ProtocolError("a connection with another token")
        if join.protocol == messages.CONTROL_PROTOCOL and join.world_size != self._world_size:
            reason = (
                f"rank 0 there has a world of {self._world_size} ranks, this rank {join.rank} one of "
                f"{join.world_size}: give each job a MASTER_PORT of its own, and all its ranks one WORLD_SIZE"
            )
            self._send(client, messages.Refused(reason))
            raise ProtocolError(f"rank {join.rank} of another world (pid {join.pid}): {reason}")
        if join.protocol != messages.CONTROL_PROTOCOL or not 0 <= join.rank < self._world_size:
            raise ProtocolError(f"rank {join.rank} of another world or version (pid {join.pid})")
        if join.rank in self._clients or join.rank in self._rounds.lost:
            raise ProtocolError(f"a second rank {join.rank} (pid {join.pid})")
        client.rank = join.rank
        client.frames.limit = messages.MAX_FRAME_NBYTES
        self._strangers.pop(client, None)
        self._clients[join.rank] = client
        self._send(client, messages.Welcome())


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
