"""Leases on a rank's share of a checkpoint, so that its memory stays while others read it by P2P.

The owner serves them on a TCP port, in a thread of its own; a reader has one connection for each lease,
whose end is the lease's. A lease names the owner's session (unguessable, from its metas), the checkpoint and
its epoch: other memory than the metas tell of is never granted. At most `max_readers` read at the same time,
others wait in the order in which they came; leases of one reader count once. A reader that is stopped, or cut
off, does not renew its lease, and has lost it after LEASE_SECONDS.

    server = LeaseServer("10.0.0.1", 0, session, max_readers=4)
    server.publish("step-100", epoch)

    lease = Lease.take(server.address, session, "step-100", epoch, deadline, reader="update 7 of fleet b")
    lease.check()       # after a read: what it brought was read while the lease held
    lease.release()
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, P2PError, ProtocolError
from ckpt_engine.transport import lease_messages as messages
from ckpt_engine.transport.framing import FrameBuffer
from ckpt_engine.transport.lease_messages import LEASE_SECONDS, RENEW_SECONDS, address_of

logger = logging.getLogger(__name__)

MAX_LEASES = 1024
MAX_STRANGERS = 64
"""Connections that have not asked for a lease yet: the oldest goes when one too many comes."""
ASK_SECONDS = 10.0
"""How long one of those may take to ask."""
CONNECT_SECONDS = 10.0
"""How long an owner's host may take to accept a connection."""
CHECK_SECONDS = 10.0
"""How long an owner may take to say that a lease holds."""


@dataclass(eq=False)
class _Connection:
    """`ask`: what it wants a lease on, once it has said so; `granted`: it has it."""

    sock: socket.socket
    peer: str
    heard: float
    frames: FrameBuffer = field(default_factory=lambda: FrameBuffer(messages.MAX_NBYTES))
    ask: messages.Ask | None = None
    granted: bool = False

    def is_for(self, checkpoint: str) -> bool:
        return self.ask is not None and self.ask.checkpoint == checkpoint

    @property
    def name(self) -> str:
        return f"{self.ask.reader} ({self.peer})" if self.ask else self.peer


class LeaseServer:
    """Grants leases, from a thread of its own, until it is closed.

    Args:
        host_ip: where it listens.
        port: 0: any free one.
        session: the owner's; who does not know it gets nothing.
        max_readers: that read at the same time; the others wait.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(self, host_ip: str, port: int, session: str, *, max_readers: int = 4) -> None:
        self._session = session.encode()
        self._max_readers = max_readers
        self._published: dict[str, str] = {}
        self._connections: list[_Connection] = []
        self._closing = False
        # Held by whoever looks at the state; told when a lease ends.
        self._changed = threading.Condition()
        try:
            family = socket.AF_INET6 if ":" in host_ip else socket.AF_INET
            self._listener = socket.create_server((host_ip, port), family=family, backlog=256)
        except OSError as error:
            raise ConfigError(f"cannot serve leases at {host_ip}, port {port}: {error}") from error
        self._listener.setblocking(False)
        self.address = address_of(self._listener.getsockname())
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, lambda: None)
        self._deaf_until = 0.0
        self._thread = threading.Thread(target=self._serve, name="ckpt-engine-leases", daemon=True)
        self._thread.start()

    # The owner's side

    def publish(self, checkpoint: str, epoch: str) -> None:
        """From now on leases on this share are granted; those on another epoch of it end."""
        with self._changed:
            if self._published.get(checkpoint) != epoch:
                self._end_leases(checkpoint)
            self._published[checkpoint] = epoch

    def withdraw(self, checkpoint: str, deadline: Deadline) -> tuple[str, ...]:
        """Grants no more leases on a checkpoint, and waits for those that there are.

        Returns:
            Who still has one at the deadline (reader and address).
        """
        with self._changed:
            self._published.pop(checkpoint, None)
            for connection in list(self._connections):
                if connection.is_for(checkpoint) and not connection.granted:
                    self._refuse(connection, f"{checkpoint!r} is being unregistered")
            self._changed.wait_for(lambda: not self._readers_of(checkpoint), deadline.remaining)
            return tuple(self._readers_of(checkpoint))

    def end_leases(self, checkpoint: str) -> None:
        """Ends those that `withdraw` waited for in vain: their readers' next check fails."""
        with self._changed:
            self._end_leases(checkpoint)

    def close(self) -> None:
        """Ends all leases, and the thread. Idempotent."""
        if self._closing:
            return
        self._closing = True
        os.write(self._wake_write, b"\0")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _readers_of(self, checkpoint: str) -> list[str]:
        return [one.name for one in self._connections if one.granted and one.is_for(checkpoint)]

    def _end_leases(self, checkpoint: str) -> None:
        for connection in list(self._connections):
            if connection.is_for(checkpoint):
                self._drop(connection)

    # The thread

    def _serve(self) -> None:
        while not self._closing:
            events = self._selector.select(1.0)
            with self._changed:
                for key, _ in events:
                    key.data()
                self._look_at_the_clock()
        with self._changed:
            for connection in list(self._connections):
                self._drop(connection)
        self._selector.close()
        self._listener.close()

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections):
            limit = ASK_SECONDS if connection.ask is None else LEASE_SECONDS
            if now - connection.heard > limit:
                if connection.ask is not None:
                    logger.warning("%s has not been heard for %g s: its lease ends", connection.name, limit)
                self._drop(connection)
        if self._deaf_until and now > self._deaf_until:
            self._deaf_until = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            sock, peer = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                logger.warning("readers' connections are not accepted for a second: %s", error)
                self._selector.unregister(self._listener)
                self._deaf_until = time.monotonic() + 1.0
            return
        strangers = [one for one in self._connections if one.ask is None]
        if len(strangers) >= MAX_STRANGERS:
            self._drop(strangers[0])
        sock.setblocking(False)
        messages.notice_death(sock)
        connection = _Connection(sock, address_of(peer), time.monotonic())
        self._connections.append(connection)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._read(connection))

    def _read(self, connection: _Connection) -> None:
        if connection not in self._connections:  # dropped by an earlier event of this turn
            return
        try:
            data = connection.sock.recv(messages.MAX_NBYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return
        connection.frames.feed(data)
        try:
            while connection in self._connections and (body := connection.frames.next()) is not None:
                self._take(connection, messages.reader_message(body))
        except ProtocolError as error:
            logger.warning("%s speaks no language of this version: %s", connection.name, error)
            self._drop(connection)

    def _take(self, connection: _Connection, message: messages.ReaderMessage) -> None:
        if isinstance(message, messages.Ask) and connection.ask is None:
            self._ask(connection, message)
        elif isinstance(message, messages.Renew) and connection.ask is not None:
            self._say(connection, messages.Renew())
        elif isinstance(message, messages.Check) and connection.granted:
            self._say(connection, messages.Held())
        else:
            raise ProtocolError(f"{type(message).__name__} out of turn")
        # Only who has asked may speak for as long as it likes.
        connection.heard = time.monotonic()

    def _ask(self, connection: _Connection, ask: messages.Ask) -> None:
        connection.ask = ask
        if ask.protocol != messages.LEASE_PROTOCOL:
            self._refuse(connection, f"it speaks version {messages.LEASE_PROTOCOL} of this protocol")
        elif not hmac.compare_digest(ask.session.encode(), self._session):
            self._refuse(connection, "another process has taken the owner's place: its metas are out of date")
        elif ask.checkpoint not in self._published:
            self._refuse(connection, f"{ask.checkpoint!r} is not registered there any more")
        elif ask.epoch != self._published[ask.checkpoint]:
            self._refuse(connection, f"{ask.checkpoint!r} was registered anew: its metas are out of date")
        elif sum(one.ask is not None for one in self._connections) > MAX_LEASES:
            self._refuse(connection, f"it has given {MAX_LEASES} leases: ask again later")
        else:
            self._grant()

    def _grant(self) -> None:
        """To whom it can be granted now."""
        reading = {one.ask.reader for one in self._connections if one.granted and one.ask}
        for connection in list(self._connections):
            ask = connection.ask
            if (
                ask is not None
                and not connection.granted
                and (ask.reader in reading or len(reading) < self._max_readers)
            ):
                connection.granted = True
                reading.add(ask.reader)
                self._say(connection, messages.Granted())

    def _refuse(self, connection: _Connection, why: str) -> None:
        self._say(connection, messages.Refused(why))
        self._drop(connection)

    def _say(self, connection: _Connection, message: messages.OwnerMessage) -> None:
        frame = messages.frame(message)
        try:
            sent = connection.sock.send(frame)
        except OSError:
            sent = 0
        if sent < len(frame):  # gone, or it does not read what it is told
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._selector.unregister(connection.sock)
            connection.sock.close()
            if connection.granted:
                self._changed.notify_all()
                if not self._closing:
                    self._grant()


class Lease:
    """A reader's. One thread uses it; another renews it."""

    def __init__(self, sock: socket.socket, who: str) -> None:
        self._sock = sock
        self._who = who
        self._frames = FrameBuffer(messages.MAX_NBYTES)
        self._sending = threading.Lock()

    @classmethod
    def take(
        cls,
        address: str,
        session: str,
        checkpoint: str,
        epoch: str,
        deadline: Deadline,
        *,
        reader: str = "",
        poll: Callable[[], object] = lambda: None,
    ) -> Lease:
        """Waits until the owner grants it.

        Args:
            address: the owner's lease server, `host:port`.
            reader: who reads; leases of the same reader count once.
            poll: called while waiting for others who read; what it raises ends the wait.

        Raises:
            P2PError: the owner is gone, refuses, or has not granted it at the deadline.
        """
        who = f"the owner's lease server at {address}"
        try:
            patience = deadline.or_after(CONNECT_SECONDS).remaining
            sock = socket.create_connection(messages.parts_of(address), timeout=max(0.001, patience))
        except OSError as error:
            raise P2PError(f"{who} cannot be reached: {error}") from error
        lease = cls(sock, who)
        try:
            messages.notice_death(sock)
            lease._send(messages.Ask(messages.LEASE_PROTOCOL, session, checkpoint, epoch, reader))
            _KEEPER.keep(lease)
            answer = lease._receive(deadline, "has not granted a lease: others are reading", poll)
            if isinstance(answer, messages.Refused):
                raise P2PError(f"{who} refuses: {answer.why}")
        except BaseException:
            lease.release()
            raise
        return lease

    def check(self, deadline: Deadline | None = None) -> None:
        """Raises P2PError: the lease has ended; what was read since the last check may be anything."""
        self._send(messages.Check())
        patience = deadline or Deadline.after(CHECK_SECONDS)
        answer = self._receive(patience, "does not answer: it is stopped, or cut off")
        if not isinstance(answer, messages.Held):
            raise P2PError(f"{self._who} answers {answer} where it should say that the lease holds")

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


class _Keeper:
    """Renews this process's leases, in one thread, which lives while there are any."""

    def __init__(self) -> None:
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def keep(self, lease: Lease) -> None:
        with self._changed:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="ckpt-engine-lease-keeper", daemon=True
                )
                self._thread.start()

    def forget(self, lease: Lease) -> None:
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
