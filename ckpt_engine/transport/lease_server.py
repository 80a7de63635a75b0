"""An owner's end of leases: grants them, and is a directory of others who hold the same weights.

It serves them on a TCP port, in a thread of its own. At most `max_readers` read at the same time, others wait
in the order in which they came; leases of one reader count once.

    server = LeaseServer("10.0.0.1", 0, session, max_readers=4)
    server.publish("step-100", epoch, lambda: layout_digest(buffers))
"""

from __future__ import annotations

import hmac
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, ProtocolError
from ckpt_engine.transport import lease_messages as messages
from ckpt_engine.transport.directory import Directory
from ckpt_engine.transport.framing import OUT_OF_DESCRIPTORS, FrameBuffer
from ckpt_engine.transport.lease_messages import LEASE_SECONDS, address_of

logger = logging.getLogger(__name__)

MAX_LEASES = 1024
MAX_STRANGERS = 64
"""Connections that have not asked for a lease yet: the oldest goes when one too many comes."""
ASK_SECONDS = 10.0
"""How long one of those may take to ask."""


@dataclass(eq=False)
class _Connection:
    """`ask`: what it wants a lease on, or whose others it seeks, once it has said so; `granted`: it has a
    lease. `out`: what it is still to be sent."""

    sock: socket.socket
    peer: str
    heard: float
    frames: FrameBuffer = field(default_factory=lambda: FrameBuffer(messages.MAX_NBYTES))
    ask: messages.Ask | messages.Seek | None = None
    granted: bool = False
    out: bytearray = field(default_factory=bytearray)

    def is_for(self, checkpoint: str) -> bool:
        return self.ask is not None and self.ask.checkpoint == checkpoint

    @property
    def name(self) -> str:
        return f"{self.ask.reader} ({self.peer})" if isinstance(self.ask, messages.Ask) else self.peer


@dataclass(kw_only=True)
class _Published:
    """A share. The digest of its layout is only made when somebody asks."""

    epoch: str
    layout_of: Callable[[], str]

    @cached_property
    def layout(self) -> str:
        return self.layout_of()


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
        self._published: dict[str, _Published] = {}
        self._present: dict[str, int] = {}
        self._directory: Directory[_Connection] = Directory(self._say)
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

    def publish(
        self, checkpoint: str, epoch: str, layout_of: Callable[[], str], present: int = messages.ALL
    ) -> None:
        """From now on leases on this share are granted; those on another epoch of it end.

        Args:
            layout_of: the digest of its layout; called at most once, by the thread that serves.
            present: so many of its host buffers can be read by now, the first ones.
        """
        with self._changed:
            self._present[checkpoint] = present
            known = self._published.get(checkpoint)
            if known is None or known.epoch != epoch:
                self._end_leases(checkpoint)
                self._published[checkpoint] = _Published(epoch=epoch, layout_of=layout_of)

    def withdraw(self, checkpoint: str, deadline: Deadline) -> tuple[str, ...]:
        """Grants no more leases on a checkpoint, and waits for those that there are.

        Returns:
            Who still has one at the deadline (reader and address).
        """
        with self._changed:
            self._published.pop(checkpoint, None)  # what is present stays so for those who still read it
            for connection in list(self._connections):
                if connection.is_for(checkpoint) and not connection.granted:
                    self._refuse(connection, f"{checkpoint!r} is being unregistered")
            self._changed.wait_for(lambda: not self._readers_of(checkpoint), deadline.remaining)
            readers = tuple(self._readers_of(checkpoint))
            if not readers:
                self._present.pop(checkpoint, None)
            return readers

    def came(self, checkpoint: str, present: int) -> None:
        """So many of its host buffers can be read by now."""
        with self._changed:
            self._present[checkpoint] = present

    def end_leases(self, checkpoint: str) -> None:
        """Ends those that `withdraw` waited for in vain: their readers' next check fails."""
        with self._changed:
            self._present.pop(checkpoint, None)
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
        self._directory.look_at_the_clock()
        if self._deaf_until and now > self._deaf_until:
            self._deaf_until = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            sock, peer = self._listener.accept()
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
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
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._attend(connection))

    def _attend(self, connection: _Connection) -> None:
        if connection in self._connections and connection.out:
            self._flush(connection)
        if connection not in self._connections:  # dropped just now, or by an earlier event of this turn
            return
        try:
            data = connection.sock.recv(64 * 1024)
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
        if isinstance(message, messages.Ask | messages.Seek) and connection.ask is None:
            self._ask(connection, message)
        elif isinstance(message, messages.Announce) and isinstance(connection.ask, messages.Seek):
            self._directory.announce(connection, message)
        elif isinstance(message, messages.Renew) and connection.ask is not None:
            self._say(connection, messages.Renew())
        elif isinstance(message, messages.Check) and connection.granted:
            self._say(connection, messages.Held(self._present_of(connection)))
        else:
            raise ProtocolError(f"{type(message).__name__} out of turn")
        # Only who has asked may speak for as long as it likes.
        connection.heard = time.monotonic()

    def _ask(self, connection: _Connection, ask: messages.Ask | messages.Seek) -> None:
        connection.ask = ask
        if ask.protocol != messages.LEASE_PROTOCOL:
            self._refuse(connection, f"it speaks version {messages.LEASE_PROTOCOL} of this protocol")
        elif not hmac.compare_digest(ask.session.encode(), self._session):
            self._refuse(connection, "another process has taken the owner's place: its metas are out of date")
        elif ask.checkpoint not in self._published:
            self._refuse(connection, f"{ask.checkpoint!r} is not registered there any more")
        elif ask.epoch != self._published[ask.checkpoint].epoch:
            self._refuse(connection, f"{ask.checkpoint!r} was registered anew: its metas are out of date")
        elif ask.layout != self._published[ask.checkpoint].layout:
            self._refuse(
                connection,
                f"{ask.checkpoint!r} lies there in another way than its metas tell: ask for them again",
            )
        elif sum(one.ask is not None for one in self._connections) > MAX_LEASES:
            self._refuse(connection, f"it has given {MAX_LEASES} leases: ask again later")
        elif isinstance(ask, messages.Ask):
            self._grant()
        else:
            connection.frames.limit = messages.MAX_METAS_NBYTES
            self._directory.seek(connection, ask)

    def _grant(self) -> None:
        """To whom it can be granted now."""
        reading = {
            one.ask.reader for one in self._connections if one.granted and isinstance(one.ask, messages.Ask)
        }
        for connection in list(self._connections):
            ask = connection.ask
            if (
                isinstance(ask, messages.Ask)
                and not connection.granted
                and (ask.reader in reading or len(reading) < self._max_readers)
            ):
                connection.granted = True
                reading.add(ask.reader)
                self._say(connection, messages.Granted(self._present_of(connection)))

    def _present_of(self, connection: _Connection) -> int:
        return self._present.get(connection.ask.checkpoint, 0) if connection.ask is not None else 0

    def _refuse(self, connection: _Connection, why: str) -> None:
        self._say(connection, messages.Refused(why))
        self._drop(connection)

    def _say(self, connection: _Connection, message: messages.OwnerMessage) -> None:
        slow = bool(connection.out)
        connection.out += messages.frame(message)
        if slow and len(connection.out) > messages.MAX_FOUND_NBYTES:
            self._drop(connection)
        else:
            self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        try:
            sent = connection.sock.send(connection.out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(connection)
            return
        del connection.out[:sent]
        if connection.out and not isinstance(connection.ask, messages.Seek):
            self._drop(connection)  # it does not read what it is told
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.out else 0)
        key = self._selector.get_key(connection.sock)
        if key.events != wanted:
            self._selector.modify(connection.sock, wanted, key.data)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._selector.unregister(connection.sock)
            connection.sock.close()
            self._directory.forget(connection)
            if connection.granted:
                self._changed.notify_all()
                if not self._closing:
                    self._grant()
