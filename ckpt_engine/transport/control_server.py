"""The control server: one thread in rank 0's process, where ranks meet and rounds are decided.

Being one thread it serialises every write, so a round is decided once: by the last vote, or by the first
error, whatever comes first. A rank whose connection ends, or that is not heard for `stall_seconds`, is
*lost*: the rounds it has a part in are decided against, at once, by name.
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
from dataclasses import dataclass, field, replace

from ckpt_engine.errors import ErrorRecord, ProtocolError
from ckpt_engine.transport import control_messages as messages
from ckpt_engine.transport.control_messages import FrameBuffer, RoundKey, Verdict

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
JOIN_SECONDS = 10.0
"""How long a new connection may take to show the token."""


@dataclass(eq=False)
class _Client:
    sock: socket.socket
    heard: float
    rank: int | None = None
    frames: FrameBuffer = field(default_factory=lambda: FrameBuffer(messages.MAX_JOIN_NBYTES))
    out: deque[memoryview] = field(default_factory=deque)


@dataclass(eq=False)
class _Round:
    key: RoundKey
    purpose: str | None = None
    without_lost: bool = False
    brought: dict[int, bytes] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)
    met: bool = False
    missing: set[int] = field(default_factory=set)
    votes: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    verdict: Verdict | None = None


class ControlServer:
    """Serves `world_size` ranks until closed."""

    def __init__(self, address: str, world_size: int, token: str, stall_seconds: float) -> None:
        self._world_size = world_size
        self._token = token
        self._stall = stall_seconds
        self._listener = socket.create_server((address, 0), family=_family(address), backlog=1024)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._clients: dict[int, _Client] = {}
        self._strangers: set[_Client] = set()
        self._lost: dict[int, str] = {}
        self._rounds: dict[RoundKey, _Round] = {}
        self._serial = 0
        self._beaten = time.monotonic()
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
            self._idle.wait_for(lambda: not self._open_rounds(), patience)
            self._closing = True
        os.write(self._wake_write, b"x")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _open_rounds(self) -> bool:
        return any(self._waiting(round_) for round_ in list(self._rounds.values()))

    def _waiting(self, round_: _Round) -> bool:
        """Whether a rank that is still there has yet to learn, or to say that it learnt, how this ended."""
        return any(rank not in round_.left and rank in self._clients for rank in tuple(round_.entered))

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
        except OSError:
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = _Client(sock, time.monotonic())
        self._strangers.add(client)
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
        for client in list(self._clients.values()):
            if now - client.heard > self._stall:
                self._drop(client, f"it has not been heard for {now - client.heard:.1f} s (stopped?)")
        for client in list(self._strangers):
            if now - client.heard > JOIN_SECONDS:
                self._drop(client, "")
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
        self._strangers.discard(client)
        if client.rank is None or self._clients.get(client.rank) is not client:
            return
        del self._clients[client.rank]
        self._lost[client.rank] = reason
        logger.info("control server: rank %d is lost: %s", client.rank, reason)
        for round_ in list(self._rounds.values()):
            if client.rank in round_.key.members:
                self._consider(round_)
                self._forget_if_over(round_)

    # Rounds

    def _take(self, client: _Client, message: messages.RankFrame) -> None:
        if isinstance(message, messages.Join):
            self._join(client, message)
        elif client.rank is None:
            raise ProtocolError(f"{type(message).__name__} before Join")
        elif isinstance(message, messages.Goodbye):
            self._drop(client, "it has closed its parameter server")
        elif isinstance(message, messages.Enter | messages.Vote | messages.Abandon | messages.Left):
            self._take_of_round(client, client.rank, message)

    def _join(self, client: _Client, join: messages.Join) -> None:
        if not hmac.compare_digest(join.token.encode(), self._token.encode()):
            raise ProtocolError("a connection with another token")
        if join.protocol != messages.CONTROL_PROTOCOL or not 0 <= join.rank < self._world_size:
            raise ProtocolError(f"rank {join.rank} of another world or version (pid {join.pid})")
        if join.rank in self._clients or join.rank in self._lost:
            raise ProtocolError(f"a second rank {join.rank} (pid {join.pid})")
        client.rank = join.rank
        client.frames.limit = messages.MAX_FRAME_NBYTES
        self._strangers.discard(client)
        self._clients[join.rank] = client
        self._send(client, messages.Welcome())

    def _take_of_round(
        self,
        client: _Client,
        rank: int,
        message: messages.Enter | messages.Vote | messages.Abandon | messages.Left,
    ) -> None:
        if rank not in message.round.members:
            raise ProtocolError(f"rank {rank} is no member of its round {message.round}")
        round_ = self._rounds.setdefault(message.round, _Round(message.round))
        first = rank not in round_.entered
        round_.entered.add(rank)
        if isinstance(message, messages.Left):
            round_.left.add(rank)
            self._forget_if_over(round_)
            return
        if round_.verdict is not None:
            if first and isinstance(message, messages.Enter) and self._move(client, rank, message):
                return
            if first or isinstance(message, messages.Abandon):
                # Late: it learns what was decided without it, or that another's error came first.
                self._send(client, messages.Decided(round_.key, round_.verdict))
            return
        if isinstance(message, messages.Abandon):
            self._decide(round_, Verdict(record=self._with_missing(round_, message.record)))
        elif isinstance(message, messages.Vote):
            round_.votes.add(rank)
            if round_.votes == set(round_.key.members):
                self._decide(round_, Verdict(version=message.version))
        else:
            if round_.purpose is not None and round_.purpose != message.purpose:
                problem = f"rank {rank} does {message.purpose}, another rank {round_.purpose}"
                self._decide(round_, _against("ProtocolError", f"ranks are not doing the same: {problem}"))
                return
            round_.purpose, round_.without_lost = message.purpose, message.without_lost
            round_.brought[rank] = message.payload
            self._consider(round_)

    def _move(self, client: _Client, rank: int, enter: messages.Enter) -> bool:
        """Takes a rank for which the others waited in vain to where they are now, doing what it does.

        Such a rank left a call out, for an error of its own, and would be behind for ever. One that is late
        for something else stays: it is to learn how that ended.
        """
        missed = enter.round
        alike = [round_ for round_ in self._rounds.values() if round_.key.members == missed.members]
        newest = max(alike, key=lambda round_: round_.key.number)
        if rank not in self._rounds[missed].missing or newest.key == missed:
            return False
        if newest.verdict is None and newest.purpose != enter.purpose:
            return False
        for round_ in alike:
            if missed.number <= round_.key.number < newest.key.number:
                round_.left.add(rank)
                self._forget_if_over(round_)
        self._send(client, messages.Moved(missed, newest.key.number))
        return True

    def _forget_if_over(self, round_: _Round) -> None:
        if set(round_.key.members) <= round_.left | self._lost.keys():
            self._rounds.pop(round_.key, None)

    def _with_missing(self, round_: _Round, record: ErrorRecord) -> ErrorRecord:
        """Only the server knows for whom a rank waited in vain."""
        missing = set(round_.key.members) - round_.brought.keys()
        if round_.met or not missing or record.error_type != "UpdateTimeout":
            return record
        round_.missing = missing
        return replace(record, message=f"{record.message}: ranks {sorted(missing)} did not arrive")

    def _consider(self, round_: _Round) -> None:
        """Lets the members meet if all that can come have come, or gives up if one that must is lost."""
        if round_.verdict is not None:
            return
        members = set(round_.key.members)
        lost = (members & self._lost.keys()) - round_.left
        if lost and (round_.met or round_.purpose is not None) and not round_.without_lost:
            rank = min(lost)
            what = "left" if "closed its parameter server" in self._lost[rank] else "died or stopped"
            record = _against("PeerLost", f"rank {rank} {what}: {self._lost[rank]}")
            self._decide(round_, record)
        elif not round_.met and round_.brought and members <= round_.brought.keys() | lost:
            round_.met = True
            self._serial += 1
            payloads = tuple(round_.brought.get(rank) for rank in round_.key.members)
            frame = messages.encode_frame(
                messages.Met(
                    round_.key, self._serial, payloads, {rank: self._lost[rank] for rank in sorted(lost)}
                )
            )
            round_.brought.clear()
            self._tell(round_, frame)

    def _decide(self, round_: _Round, verdict: Verdict) -> None:
        round_.verdict = verdict
        round_.brought.clear()
        self._tell(round_, messages.encode_frame(messages.Decided(round_.key, verdict)))

    def _tell(self, round_: _Round, frame: bytes) -> None:
        for rank in sorted(round_.entered):
            client = self._clients.get(rank)
            if client is not None and rank not in round_.left:
                self._send_bytes(client, frame)


def _against(error_type: str, message: str) -> Verdict:
    return Verdict(record=ErrorRecord(error_type=error_type, message=message))


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
