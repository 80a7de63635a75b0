"""Leases on another rank's share of a checkpoint: its memory stays while this process reads it by P2P.

A reader has one connection for each lease, whose end is the lease's. A lease names the owner's session
(unguessable, from its metas), the checkpoint, its epoch and the digest of its layout: other memory than the
metas tell of is never granted. A reader that is stopped, or cut off, does not renew its lease, and has lost
it after LEASE_SECONDS.

    lease = Lease.take(Share.of(metas[0]), deadline, reader="update 7 of fleet b")
    lease.check()       # after a read: what it brought was read while the lease held
    lease.release()

An owner's lease server (`lease_server`) is also a directory of those who hold the same weights:

    announcement, found = Announcement.seek(Share.of(metas[0]), deadline, announces=True)
    announcement.announce("update 7 of fleet b", text)      # stands until it is released
"""

from __future__ import annotations

import ipaddress
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import P2PError, ProtocolError
from ckpt_engine.metadata import RankMetas, layout_digest
from ckpt_engine.transport import lease_messages as messages
from ckpt_engine.transport.framing import FrameBuffer
from ckpt_engine.transport.lease_messages import LEASE_SECONDS, RENEW_SECONDS

CONNECT_SECONDS = 10.0
"""How long an owner's host may take to accept a connection."""
CHECK_SECONDS = 10.0
"""How long an owner may take to say that a lease holds."""


def _nothing() -> None:
    """No question while waiting."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Share:
    """What a reader knows of an owner's share. `address`: of the lease server, `host:port`; `session`: the
    owner's; `layout`: the digest of the share's host buffers (`metadata.layout_digest`)."""

    address: str
    session: str
    checkpoint: str
    epoch: str
    layout: str

    @classmethod
    def of(cls, held: RankMetas) -> Share:
        """By the owner's metas, all of them. Raises P2PError: it grants no leases."""
        if held.lease_address is None:
            raise P2PError(f"rank {held.rank} on host {held.host} grants no leases: it cannot be read by P2P")
        return cls(
            address=held.lease_address,
            session=held.session,
            checkpoint=held.checkpoint,
            epoch=held.epoch,
            layout=layout_digest(held.buffers),
        )


class _ToOwner:
    """A connection to an owner's lease server. One thread uses it; another renews it."""

    def __init__(self, sock: socket.socket, who: str, limit: int = messages.MAX_NBYTES) -> None:
        self._sock = sock
        self._who = who
        self._frames = FrameBuffer(limit)
        self._sending = threading.Lock()

    @staticmethod
    def _connect(address: str, deadline: Deadline) -> tuple[socket.socket, str]:
        who = f"the owner's lease server at {address}"
        host, port = messages.parts_of(address)
        try:
            patience = deadline.or_after(CONNECT_SECONDS).remaining
            sock = socket.create_connection((host, port), timeout=max(0.001, patience))
        except OSError as error:
            raise P2PError(f"{who} cannot be reached: {error}{_what_to_do(host)}") from error
        return sock, who

    def _open(
        self,
        opening: messages.Ask | messages.Seek,
        deadline: Deadline,
        problem: str,
        poll: Callable[[], object],
    ) -> messages.OwnerMessage:
        """Asks, and waits for the answer; the connection is kept alive, or ends with the error."""
        try:
            messages.notice_death(self._sock)
            self._send(opening)
            _KEEPER.keep(self)
            answer = self._receive(deadline, problem, poll)
            if isinstance(answer, messages.Refused):
                raise P2PError(f"{self._who} refuses: {answer.why}")
        except BaseException:
            self.release()
            raise
        return answer

    def release(self) -> None:
        """Idempotent."""
        _KEEPER.forget(self)
        self._sock.close()

    def renew(self) -> bool:
        """For the thread that keeps leases. False: it has ended, as the next check will tell."""
        try:
            self._send(messages.Renew())
        except P2PError:
            return False
        return True

    def _send(self, message: messages.ReaderMessage) -> None:
        try:
            with self._sending:
                self._sock.settimeout(CHECK_SECONDS)
                self._sock.sendall(messages.frame(message))
        except (OSError, ProtocolError) as error:
            raise P2PError(f"{self._who} has ended the lease, or died: {error}") from error

    def _receive(
        self, deadline: Deadline, problem: str, poll: Callable[[], object] = lambda: None
    ) -> messages.OwnerMessage:
        """What the owner says next, but for signs of life."""
        began = heard = time.monotonic()
        while True:
            poll()
            try:
                while (body := self._frames.next()) is not None:
                    message = messages.owner_message(body)
                    if not isinstance(message, messages.Renew):
                        return message
                if deadline.passed:
                    raise P2PError(f"{self._who} {problem} (waited {time.monotonic() - began:.1f} s)")
                if time.monotonic() - heard > LEASE_SECONDS:
                    raise P2PError(f"{self._who} has not been heard for {LEASE_SECONDS:g} s: is it stopped?")
                if data := self._read(min(0.1, deadline.remaining)):
                    heard = time.monotonic()
                    self._frames.feed(data)
            except (OSError, ProtocolError) as error:
                raise P2PError(f"{self._who} has ended the lease, or died: {error}") from error

    def _read(self, seconds: float) -> bytes:
        """What has come within `seconds`; nothing if nothing has."""
        readable = selectors.DefaultSelector()
        with readable:
            readable.register(self._sock, selectors.EVENT_READ)
            if not readable.select(seconds):
                return b""
        data = self._sock.recv(messages.MAX_NBYTES)
        if not data:
            raise ConnectionError("the connection ended")
        return data


def _what_to_do(host: str) -> str:
    """Ranks that are all on one host find no other address of their own than the loopback's."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        return ""
    return ". That is this host itself: an owner on another one must have PS_HOST_IP set, and gather again"


class Lease(_ToOwner):
    """`present`: how many of the share's host buffers could be read at the last look, or `ALL`."""

    present: int = messages.ALL

    @classmethod
    def take(
        cls,
        share: Share,
        deadline: Deadline,
        *,
        reader: str = "",
        poll: Callable[[], object] = _nothing,
    ) -> Lease:
        """Waits until the owner grants it.

        Args:
            reader: who reads; leases of the same reader count once.
            poll: called while waiting for others who read; what it raises ends the wait.

        Raises:
            P2PError: the owner is gone, refuses, or has not granted it at the deadline.
        """
        lease = cls(*cls._connect(share.address, deadline))
        asked = messages.Ask(
            messages.LEASE_PROTOCOL, share.session, share.checkpoint, share.epoch, share.layout, reader
        )
        answer = lease._open(asked, deadline, "has not granted a lease: others are reading", poll)
        if isinstance(answer, messages.Granted):
            lease.present = answer.present
        return lease

    def check(self, deadline: Deadline | None = None) -> None:
        """Raises P2PError: the lease has ended; what was read since the last check may be anything."""
        self._send(messages.Check())
        patience = deadline or Deadline.after(CHECK_SECONDS)
        answer = self._receive(patience, "does not answer: it is stopped, or cut off")
        if not isinstance(answer, messages.Held):
            raise P2PError(f"{self._who} answers {answer} where it should say that the lease holds")
        self.present = answer.present


class Announcement(_ToOwner):
    """Of one rank that holds what the owner does, or will, in the owner's directory."""

    @classmethod
    def seek(
        cls,
        share: Share,
        deadline: Deadline,
        *,
        announces: bool,
        waits: bool = True,
    ) -> tuple[Announcement, messages.Found]:
        """Asks who else holds it.

        Args:
            announces: whether `announce` is to follow, soon: others wait for that.
            waits: for those others; else nothing is found.

        Raises:
            P2PError: the owner is gone, refuses, or has not answered at the deadline.
        """
        made = cls(*cls._connect(share.address, deadline), messages.MAX_FOUND_NBYTES)
        asked = messages.Seek(
            messages.LEASE_PROTOCOL,
            share.session,
            share.checkpoint,
            share.epoch,
            share.layout,
            announces,
            waits,
        )
        answer = made._open(asked, deadline, "has not said who else holds it", _nothing)
        if not isinstance(answer, messages.Found):
            made.release()
            raise P2PError(f"{made._who} answers {answer} where it should say who else holds it")
        return made, answer

    def announce(self, group: str, metas: bytes) -> None:
        """Until it is released others are told of this rank. Raises P2PError: the owner is gone."""
        self._send(messages.Announce(group, metas))


class _Keeper:
    """Renews this process's leases and announcements, in one thread, which lives while there are any."""

    def __init__(self) -> None:
        self._leases: weakref.WeakSet[_ToOwner] = weakref.WeakSet()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def keep(self, lease: _ToOwner) -> None:
        with self._changed:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="ckpt-engine-lease-keeper", daemon=True
                )
                self._thread.start()

    def forget(self, lease: _ToOwner) -> None:
        with self._changed:
            self._leases.discard(lease)
            thread = None if self._leases else self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)  # so that no thread is left behind an update

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: not self._leases, RENEW_SECONDS):
                    self._thread = None
                    return
                kept = list(self._leases)
            for lease in kept:
                if not lease.renew():
                    self.forget(lease)
            del kept, lease  # nobody else may keep them


_KEEPER = _Keeper()
