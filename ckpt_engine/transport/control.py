"""The control plane: where ranks meet, exchange what they know, and decide.

Ranks act in *rounds* (a gather or an update). In a round every member brings something and gets what all
brought; a round of an update ends with one verdict, written by the control server in rank 0's process
(`control_server`). Each rank has one connection to it: its end is death, on either side.

torch's store stands beside it (`bootstrap`): torch's process groups meet on it, and it tells the ranks of
several hosts where the control server is. On one host that is a Unix socket in this user's own directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from torch._C._distributed_c10d import Store

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import (
    ConfigError,
    ErrorRecord,
    OutcomeUnknown,
    PeerLost,
    ProtocolError,
    UpdateError,
)
from ckpt_engine.transport import control_messages as messages
from ckpt_engine.transport.bootstrap import MeetingPoint, wait_until
from ckpt_engine.transport.control_messages import Verdict
from ckpt_engine.transport.control_server import BEAT_SECONDS, ControlServer
from ckpt_engine.transport.framing import LENGTH, FrameBuffer, receive

__all__ = ["Control", "Round", "Verdict", "error_of"]

ANSWER_SECONDS = 10.0
"""How long the control server may take to say how a round was decided."""
CONNECT_SECONDS = 0.02
"""Between two tries to reach rank 0 on a Unix socket."""
EXIT_SECONDS = 10.0
"""How long rank 0, which serves the others, waits at its end for them to have read the last verdict."""


class Control:
    """This rank's place on the control plane. Rank 0 serves it.

    Args:
        meeting_point: where rank 0 says how the control server is reached.
        stall_seconds: after how long without a sign of life a rank counts as lost.

    Raises:
        ConfigError: rank 0 cannot serve there, or cannot be reached.
    """

    def __init__(
        self,
        meeting_point: MeetingPoint,
        *,
        rank: int,
        world_size: int,
        deadline: Deadline,
        stall_seconds: float = 30.0,
        port: int = 0,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._meeting_point = meeting_point
        self._stall = stall_seconds
        self._calls = 0
        self._by_call: dict[int, Round] = {}
        self._by_number: dict[int, Round] = {}
        self._lost: str | None = None
        self._news = threading.Condition()
        self._sending = threading.Lock()
        self._closing = False
        self._server: ControlServer | None = None
        try:
            if rank == 0:
                self._serve(port)
            self._sock = self._join(deadline)
        except (OSError, RuntimeError) as error:
            if self._server is not None:
                self._server.close(0)
            where = f"address {meeting_point.address}, {f'port {port}' if port else 'any port'}"
            if meeting_point.path is not None:
                where = f"{meeting_point.path}: all ranks of this host need the same CKPT_ENGINE_SOCKET_DIR"
            raise ConfigError(
                f"rank {rank} cannot {'serve' if rank == 0 else 'reach'} the control server of rank 0 "
                f"({where}): {error}"
            ) from error
        self._thread = threading.Thread(target=self._listen, name="ckpt-engine-control", daemon=True)
        self._thread.start()

    @property
    def store(self) -> Store:
        """Where torch's groups meet."""
        return self._meeting_point.store

    def _serve(self, port: int) -> None:
        point = self._meeting_point
        if point.path is not None:
            self._server = ControlServer(point.path, self.world_size, "", self._stall)
            return
        token = secrets.token_hex(16)
        self._server = ControlServer(point.address, self.world_size, token, self._stall, port)
        where = {"address": point.address, "port": self._server.port, "token": token}
        self.store.set("control", json.dumps(where))

    def _connect(self, deadline: Deadline) -> tuple[socket.socket, str]:
        """A connection to the control server, and what it wants to be shown."""
        if self._meeting_point.path is not None:
            # The kernel tells both sides who the other one is.
            return _connect_to(self._meeting_point.path, deadline), ""
        if not wait_until(lambda: self.store.check(["control"]), deadline):
            raise TimeoutError("it has not said where it is")
        where = json.loads(self.store.get("control"))
        address = (where["address"], where["port"])
        sock = socket.create_connection(address, timeout=max(0.001, deadline.remaining))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock, where["token"]

    def _join(self, deadline: Deadline) -> socket.socket:
        sock, token = self._connect(deadline)
        try:
            join = messages.Join(messages.CONTROL_PROTOCOL, token, self.rank, os.getpid(), self.world_size)
            sock.sendall(messages.encode_frame(join))
            _welcomed(sock)
        except BaseException:
            sock.close()
            raise
        # Only sends block: reads wait for news first.
        sock.settimeout(self._stall)
        return sock

    def open_round(
        self, purpose: str, members: Sequence[int] | None = None, *, decides: bool = False
    ) -> Round:
        """A call of this rank, that meets those of the other `members` (default: all ranks).

        Args:
            purpose: what this rank is doing; all members must be doing the same.
            decides: the round ends with a vote of all.
        """
        ranks = tuple(range(self.world_size)) if members is None else tuple(sorted(set(members)))
        with self._news:
            self._calls += 1
            round_ = self._by_call[self._calls] = Round(self, self._calls, purpose, ranks, decides)
        return round_

    def tell_mistake(self, purpose: str, record: ErrorRecord) -> None:
        """Tells the ranks that wait for this one in such a call that it cannot come: it was called wrong."""
        with contextlib.suppress(PeerLost):
            self.send(messages.Mistake(purpose, record.travelling()))

    @property
    def lost(self) -> str | None:
        """Why the control server can no longer be reached, if so."""
        return self._lost

    def close(self) -> None:
        """Says goodbye. Rank 0 first waits for the others to have read the last verdict. Idempotent."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(UpdateError):
            self.send(messages.Goodbye())
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._server.close(EXIT_SECONDS)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()

    # For rounds

    def send(self, message: messages.RankFrame) -> None:
        """Raises PeerLost: the control server is gone."""
        frame = messages.encode_frame(message)
        with self._sending:
            try:
                if self._lost is None:
                    self._sock.sendall(frame)
            except OSError as error:
                self._lose(f"its connection broke ({error})")
        if self._lost is not None:
            raise self.gone()

    def gone(self) -> PeerLost:
        message = f"rank 0, which serves the control plane, is gone: {self._lost}"
        return PeerLost(ErrorRecord(error_type="PeerLost", message=message))

    def wait(self, round_: Round, deadline: Deadline) -> bool:
        """Waits until the round met, was decided, or the server is lost; False at the deadline."""
        with self._news:
            return self._news.wait_for(
                lambda: round_.met is not None or round_.verdict is not None or self._lost is not None,
                deadline.remaining,
            )

    def wait_for_verdict(self, round_: Round, deadline: Deadline) -> None:
        with self._news:
            self._news.wait_for(
                lambda: round_.verdict is not None or self._lost is not None, deadline.remaining
            )

    def forget(self, round_: Round) -> None:
        with self._news:
            self._by_call.pop(round_.call, None)
            self._by_number.pop(round_.number, None)

    # The thread that listens

    def _listen(self) -> None:
        frames = FrameBuffer(messages.MAX_FRAME_NBYTES)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        heard = beaten = time.monotonic()
        while self._lost is None and not self._closing:
            try:
                if poll.poll(BEAT_SECONDS / 2 * 1000):
                    data = self._sock.recv(1 << 20)
                    if not data:
                        raise ConnectionError("it ended, or closed its parameter server")
                    heard = time.monotonic()
                    frames.feed(data)
                    while (body := frames.next()) is not None:
                        self._take(messages.decode_server_frame(body))
            except (OSError, ProtocolError, ValueError) as error:
                self._lose(str(error))
                return
            now = time.monotonic()
            if now - heard > self._stall:
                self._lose(f"it has not been heard for {now - heard:.1f} s (stopped?)")
                return
            if now - beaten >= BEAT_SECONDS:
                beaten = now
                # A send at work is a sign of life too.
                if self._sending.acquire(blocking=False):
                    self._sending.release()
                    with contextlib.suppress(UpdateError):
                        self.send(messages.Beat())

    def _take(self, message: messages.ServerFrame) -> None:
        with self._news:
            if isinstance(message, messages.Entered):
                if (round_ := self._by_call.get(message.call)) is not None:
                    round_.number = message.round
                    self._by_number[message.round] = round_
            elif isinstance(message, messages.Met | messages.Decided):
                if (round_ := self._by_number.get(message.round)) is None:
                    return
                if isinstance(message, messages.Met):
                    round_.met = message
                else:
                    round_.verdict = message.verdict
                    round_.wake()
                self._news.notify_all()

    def _lose(self, reason: str) -> None:
        with self._news:
            if self._lost is None and not self._closing:
                self._lost = reason
            for round_ in self._by_call.values():
                round_.wake()
            self._news.notify_all()
        # Rank 0 may be alive, as when its words made no sense: it hears now that this rank is at an end.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def _welcomed(sock: socket.socket) -> None:
    """Reads the control server's first words. Raises ConnectionError: it refuses this rank."""
    head = receive(sock, LENGTH.size)
    nbytes = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else 0
    try:
        answer = messages.decode_server_frame(receive(sock, min(nbytes, messages.MAX_JOIN_NBYTES)))
    except ProtocolError:
        answer = None
    if isinstance(answer, messages.Refused):
        raise ConnectionError(f"the control server refused this rank: {answer.reason}")
    if not isinstance(answer, messages.Welcome):
        raise ConnectionError(
            "the control server refused this rank: another process has its number, or is of another "
            "version of ckpt-engine"
        )


def _connect_to(path: Path, deadline: Deadline) -> socket.socket:
    """Connects to a Unix socket, once it is there. Raises OSError: it is not, at the deadline."""
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(0.001, deadline.remaining))
            sock.connect(str(path))
            return sock
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            # Rank 0 has not come yet, what is there is of a dead one, or too many knock at once.
            sock.close()
            if deadline.passed:
                raise
            time.sleep(CONNECT_SECONDS)
        except BaseException:
            sock.close()
            raise


class Round:
    """One meeting of some ranks. `number`: the same on all, and unlike any other's; 0 until it is known."""

    def __init__(
        self, control: Control, call: int, purpose: str, members: tuple[int, ...], decides: bool
    ) -> None:
        self.call = call
        self.number = 0
        self.purpose = purpose
        self.members = members
        self.met: messages.Met | None = None
        self.verdict: Verdict | None = None
        self._control = control
        self._told_members = None if len(members) == control.world_size else members
        self._decides = decides
        self._voted = False
        self._wake_read = self._wake_write = -1

    @property
    def name(self) -> str:
        """Unique among all rounds of all members; known once they have met."""
        assert self.number
        return str(self.number)

    def exchange(self, payload: bytes, deadline: Deadline, *, without_lost: bool = False) -> dict[int, bytes]:
        """What every member brought, by rank.

        Args:
            payload: any bytes.
            without_lost: meet without members that are gone, instead of giving up.

        Raises:
            UpdateTimeout: members are missing at the deadline (they are named).
            PeerLost: a member, or rank 0, is gone.
            UpdateError: a member gave the round up, or members disagree about the purpose.
        """
        packed = messages.pack(payload)
        self._control.send(
            messages.Enter(self.call, self._told_members, self.purpose, packed, without_lost, self._decides)
        )
        if not self._control.wait(self, deadline):
            message = f"waited for all ranks in {self.purpose}"
            record = ErrorRecord(error_type="UpdateTimeout", message=message, stage="begin")
            raise error_of(self._decided_against(record))
        self._raise_verdict()
        if self.met is None:
            raise self._control.gone()
        return {
            rank: payload
            for rank, payload in zip(self.members, self.met.brought(), strict=True)
            if payload is not None
        }

    def _decided_against(self, record: ErrorRecord) -> ErrorRecord:
        """The server's record of this rank's own error: it knows more, or another's came first."""
        return self.abort(record).record or record

    @property
    def lost(self) -> dict[int, str]:
        """Members that did not come because they are gone, and why."""
        return dict(self.met.lost) if self.met is not None else {}

    # Deciding

    def watch(self) -> int:
        """A descriptor that is readable once the verdict is known, or can no longer be."""
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.verdict is not None or self._control.lost is not None:
            self.wake()
        return self._wake_read

    def wake(self) -> None:
        """For the thread that listens."""
        if self._wake_write >= 0:
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake_write, b"v")

    def peek(self) -> Verdict | None:
        """The verdict, if it is known.

        Raises:
            PeerLost: rank 0 is gone, and this rank had not voted: nothing can have been committed.
            OutcomeUnknown: rank 0 is gone after this rank's vote.
        """
        if self.verdict is None and self._control.lost is not None:
            if self._voted:
                raise _unknown(self._control.gone().record.message)
            raise self._control.gone()
        return self.verdict

    def wait_for_verdict(self, deadline: Deadline) -> None:
        """Until it is known, or can no longer be, or the deadline."""
        self._control.wait_for_verdict(self, deadline)

    def vote(self, version: str) -> None:
        """This rank is finished; the last vote decides."""
        self._voted = True
        self._control.send(messages.Vote(self.call, version))

    def abort(self, record: ErrorRecord) -> Verdict:
        """Decides against, unless it is decided already; returns what was decided.

        Raises:
            OutcomeUnknown: this rank has voted, and rank 0 cannot say what came of it.
        """
        if self.verdict is None:
            with contextlib.suppress(PeerLost):
                self._control.send(
                    messages.Abandon(self.call, self._told_members, self.purpose, record.travelling())
                )
                self._control.wait_for_verdict(self, Deadline.after(ANSWER_SECONDS))
        if self.verdict is not None:
            return self.verdict
        if self._voted:
            lost = self._control.lost or f"rank 0 did not answer within {ANSWER_SECONDS:g} s"
            raise _unknown(f"this rank had voted, and cannot learn the outcome: {lost}")
        # Without this rank's vote nothing can be committed.
        return Verdict(record=record)

    def _raise_verdict(self) -> None:
        if self.verdict is not None and self.verdict.record is not None:
            raise error_of(self.verdict.record)

    def leave(self) -> None:
        """This rank has learnt all it needs of this round. Idempotent."""
        self._control.forget(self)
        with contextlib.suppress(PeerLost):
            self._control.send(messages.Left(self.call))
        for fd in (self._wake_read, self._wake_write):
            if fd >= 0:
                os.close(fd)
        self._wake_read = self._wake_write = -1


def error_of(record: ErrorRecord, touched: bool | None = None) -> UpdateError:
    """The exception that stands for a record."""
    kinds: dict[str, type[UpdateError]] = {kind.__name__: kind for kind in UpdateError.__subclasses__()}
    return kinds.get(record.error_type, UpdateError)(record, touched=touched)


def _unknown(message: str) -> OutcomeUnknown:
    return OutcomeUnknown(ErrorRecord(error_type="OutcomeUnknown", message=message, stage="decide"))
