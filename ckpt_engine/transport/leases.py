"""Leases on a rank's share of a checkpoint, so that its memory stays while others read it by P2P.

The owner serves them on a TCP port, in a thread of its own; a reader has one connection for each lease,
whose end is the lease's. Messages are lines of JSON. A lease names the owner's session (unguessable, from its
metas), the checkpoint and its epoch: other memory than the metas tell of is never granted. At most
`max_readers` read at the same time, others wait in the order in which they came; leases of one reader count
once.

    server = LeaseServer("10.0.0.1", 0, session, max_readers=4)
    server.publish("step-100", epoch)

    lease = Lease.take(server.address, session, "step-100", epoch, deadline, reader="update 7 of fleet b")
    lease.check()       # after a read: what it brought was read while the lease held
    lease.release()
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, P2PError

logger = logging.getLogger(__name__)

MAX_LINE_NBYTES = 16 * 1024
MAX_CONNECTIONS = 4096
SPEAK_SECONDS = 10.0
"""How long a connection may be silent before it asks for a lease."""
DEAD_SECONDS = 30
"""After how long without an acknowledgement the kernel ends a connection: the other host is gone."""


@dataclass(eq=False)
class _Connection:
    """`asked`: what it wants a lease on; `granted`: it has it."""

    sock: socket.socket
    peer: str
    since: float
    received: bytes = b""
    asked: dict[str, str] | None = None
    granted: bool = False

    @property
    def reader(self) -> str:
        assert self.asked is not None
        return self.asked["reader"]

    def is_for(self, checkpoint: str) -> bool:
        return self.asked is not None and self.asked["checkpoint"] == checkpoint


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
        self._session = session
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
        self.address = _address_of(self._listener.getsockname())
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain)
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
        return [
            f"{one.reader} ({one.peer})"
            for one in self._connections
            if one.granted and one.is_for(checkpoint)
        ]

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
                now = time.monotonic()
                for connection in list(self._connections):
                    if connection.asked is None and now - connection.since > SPEAK_SECONDS:
                        self._drop(connection)
        with self._changed:
            for connection in list(self._connections):
                self._drop(connection)
        self._selector.close()
        self._listener.close()

    def _drain(self) -> None:
        os.read(self._wake_read, 4096)

    def _accept(self) -> None:
        try:
            sock, peer = self._listener.accept()
        except OSError as error:  # gone again, or no descriptor is left for it
            logger.warning("a reader's connection was not accepted: %s", error)
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        _notice_death(sock)
        connection = _Connection(sock, _address_of(peer), time.monotonic())
        self._connections.append(connection)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._read(connection))

    def _read(self, connection: _Connection) -> None:
        if connection not in self._connections:  # dropped by an earlier event of this turn
            return
        try:
            data = connection.sock.recv(MAX_LINE_NBYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        connection.received += data
        *lines, connection.received = connection.received.split(b"\n")
        if not data or len(connection.received) > MAX_LINE_NBYTES:
            self._drop(connection)
            return
        for line in lines:
            try:
                self._answer(connection, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                logger.warning(
                    "%s asks for a lease in no way that this version knows: %s", connection.peer, error
                )
                self._drop(connection)
            if connection not in self._connections:
                return

    def _answer(self, connection: _Connection, message: dict[str, Any]) -> None:
        if message == {"check": True} and connection.granted:
            self._say(connection, held=True)
            return
        if connection.asked is not None:
            raise ValueError("a second request")
        wanted = {key: message[key] for key in ("session", "checkpoint", "epoch", "reader")}
        if not all(isinstance(value, str) for value in wanted.values()):
            raise ValueError("its fields are not text")
        connection.asked = wanted
        if wanted["session"] != self._session:
            self._refuse(connection, "another process has taken the owner's place: its metas are out of date")
        elif wanted["checkpoint"] not in self._published:
            self._refuse(connection, f"{wanted['checkpoint']!r} is not registered there any more")
        elif wanted["epoch"] != self._published[wanted["checkpoint"]]:
            self._refuse(
                connection, f"{wanted['checkpoint']!r} was registered anew: its metas are out of date"
            )
        else:
            self._grant()

    def _grant(self) -> None:
        """To whom it can be granted now."""
        for connection in list(self._connections):
            reading = {one.reader for one in self._connections if one.granted}
            if (
                connection.asked is not None
                and not connection.granted
                and (connection.reader in reading or len(reading) < self._max_readers)
            ):
                connection.granted = True
                self._say(connection, granted=True)

    def _refuse(self, connection: _Connection, why: str) -> None:
        self._say(connection, refused=why)
        self._drop(connection)

    def _say(self, connection: _Connection, **message: object) -> None:
        with contextlib.suppress(OSError):  # its end is noticed when it is read
            connection.sock.send(json.dumps(message).encode() + b"\n")

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._selector.unregister(connection.sock)
            connection.sock.close()
            self._changed.notify_all()
            if not self._closing:
                self._grant()


class Lease:
    """A reader's. One thread uses it."""

    def __init__(self, sock: socket.socket, who: str) -> None:
        self._sock = sock
        self._who = who
        self._received = b""

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
            poll: called while waiting; what it raises ends the wait.

        Raises:
            P2PError: the owner is gone, refuses, or has not granted it at the deadline.
        """
        who = f"the owner's lease server at {address}"
        try:
            sock = socket.create_connection(_parts_of(address), timeout=max(0.001, deadline.remaining))
        except OSError as error:
            raise P2PError(f"{who} cannot be reached: {error}") from error
        lease = cls(sock, who)
        try:
            _notice_death(sock)
            lease._send(session=session, checkpoint=checkpoint, epoch=epoch, reader=reader)
            answer = lease._receive(deadline, "has not granted a lease: others are reading", poll)
            if "refused" in answer:
                raise P2PError(f"{who} refuses: {answer['refused']}")
        except BaseException:
            sock.close()
            raise
        return lease

    def check(self, deadline: Deadline | None = None) -> None:
        """Raises P2PError: the lease has ended; what was read since the last check may be anything."""
        self._send(check=True)
        self._receive(deadline or Deadline.after(SPEAK_SECONDS), "does not answer: it is stopped, or cut off")

    def release(self) -> None:
        """Idempotent."""
        self._sock.close()

    def _send(self, **message: object) -> None:
        try:
            self._sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise P2PError(f"{self._who} has ended the lease, or died: {error}") from error

    def _receive(
        self, deadline: Deadline, problem: str, poll: Callable[[], object] = lambda: None
    ) -> dict[str, Any]:
        began = time.monotonic()
        while b"\n" not in self._received:
            poll()
            if deadline.passed:
                raise P2PError(f"{self._who} {problem} (waited {time.monotonic() - began:.1f} s)")
            self._sock.settimeout(max(0.001, min(0.1, deadline.remaining)))
            try:
                data = self._sock.recv(MAX_LINE_NBYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise P2PError(f"{self._who} died: {error}") from error
            if not data:
                raise P2PError(f"{self._who} has ended the lease, or died")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise P2PError(f"{self._who} answers {line[:100]!r}")
        return answer


def _notice_death(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_SECONDS // 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_SECONDS // 6)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_SECONDS * 1000)


def _address_of(name: tuple[Any, ...]) -> str:
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parts_of(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise P2PError(f"{address!r} is no address of a lease server")
    return host.strip("[]"), int(port)
