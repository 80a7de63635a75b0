"""A broadcast inside a host without a wire: ranks copy a bucket from the source rank's ring.

Every rank of a host is connected to every other by a Unix stream socket, over which they pass their
rings' descriptors (mapped read-only by the other) and then say, for each bucket:

    STAGED(i)   source -> the others    bucket i lies in my ring
    COPIED(i)   another -> source       I have it; you may use its slots again

The source of a bucket is its owner, or, on a host without the owner, the host's first rank, which gets
it from the owner's host. EOF on a link is a dead rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Ring, RingMemory, open_shared_ring
from ckpt_engine.devices.handles import SharedMemoryRing
from ckpt_engine.errors import ErrorRecord, PeerLost, ProtocolError, UpdateTimeout
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.ipc.sockets import check_peer, listen, receive_descriptors

_NOTE = struct.Struct("<BI")
STAGED, COPIED = 1, 2
MAX_HELLO_NBYTES = 4096
POLL_SECONDS = 0.05
HELLO_SECONDS = 5.0
"""How long one who connects may take to say who it is: no other is accepted meanwhile."""
REPLY_SECONDS = 90.0
"""How long a rank that listens may take to answer: it may be busy with all others, or forming groups, which
may take a minute (`collectives`)."""

logger = logging.getLogger(__name__)


@dataclass
class _Link:
    rank: int
    sock: socket.socket
    ring: RingMemory
    pending: bytes = b""


class _Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of JSON, with the ring's descriptors attached. `token` names the update."""

    rank: int
    token: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Meeting:
    """How long a wait may take; `poll` is called while it lasts and may raise."""

    deadline: Deadline
    poll: Callable[[], None]


class HostLinks:
    """This rank's connections to the other ranks of its host, for one update."""

    def __init__(self, path: str, rank: int, reactor: Reactor) -> None:
        self.rank = rank
        self._path = path
        self._reactor = reactor
        self._links: dict[int, _Link] = {}
        self._on_note: Callable[[int, int, int], None] | None = None
        self.leaving = False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._listener: socket.socket | None = listen(path)

    @property
    def ranks(self) -> list[int]:
        return sorted(self._links)

    def connect(
        self,
        paths: dict[int, str],
        token: str,
        ring: Ring,
        on_note: Callable[[int, int, int], None],
        deadline: Deadline,
        poll: Callable[[], None],
    ) -> None:
        """Connects to all of `paths` (rank -> peer path) and swaps rings with them.

        Args:
            token: names the update; a connection with another one is refused.
            on_note: called with (kind, rank, bucket) for every note.
            poll: called while waiting; what it raises ends the wait.
        """
        self._on_note = on_note
        hello = _Hello(rank=self.rank, token=token, nbytes=ring.nbytes)
        meeting = _Meeting(deadline, poll)
        # Lower ranks listen, higher ranks connect: one link for each pair. All listened before they met.
        for rank in sorted(other for other in paths if other < self.rank):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(paths[rank])
            except OSError as error:
                sock.close()
                raise _lost(rank, f"cannot connect to {paths[rank]}: {error}") from error
            self._join(sock, rank, hello, ring, meeting)
        expected = {other for other in paths if other > self.rank}
        while not expected <= self._links.keys():
            poll()
            if deadline.passed:
                missing = sorted(expected - self._links.keys())
                message = f"ranks {missing} of this host did not connect"
                raise UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message, stage="begin"))
            accepted = self._accept()
            if accepted is not None:
                self._welcome(accepted, expected - self._links.keys(), hello, ring, meeting)

    def _accept(self) -> socket.socket | None:
        assert self._listener is not None
        self._listener.settimeout(POLL_SECONDS)
        try:
            sock, _ = self._listener.accept()
        except TimeoutError:
            return None
        try:
            check_peer(sock)
        except ProtocolError:
            sock.close()
            return None
        return sock

    def _join(self, sock: socket.socket, rank: int, mine: _Hello, ring: Ring, meeting: _Meeting) -> None:
        """Swaps rings with `rank`, which listens."""
        try:
            _say_hello(sock, mine, ring)
            theirs, descriptors = _hear_hello(sock, REPLY_SECONDS, meeting)
        except _NotARankError as error:
            sock.close()
            raise _lost(rank, f"the exchange of rings failed: {error}") from error
        except BaseException:
            sock.close()
            raise
        if (theirs.token, theirs.rank) != (mine.token, rank):
            _close_all(descriptors)
            sock.close()
            raise ProtocolError(f"rank {rank}'s socket belongs to rank {theirs.rank} or another update")
        self._link(sock, theirs, descriptors)

    def _welcome(
        self, sock: socket.socket, ranks: set[int], mine: _Hello, ring: Ring, meeting: _Meeting
    ) -> None:
        """Swaps rings with one of `ranks`. Anybody else is sent away, and gets nothing."""
        try:
            theirs, descriptors = _hear_hello(sock, HELLO_SECONDS, meeting)
        except _NotARankError as error:
            logger.warning("refused a connection to %s: %s", self._path, error)
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        if theirs.token != mine.token or theirs.rank not in ranks:
            logger.warning("refused a connection to %s: it is of another update", self._path)
            _close_all(descriptors)
            sock.close()
            return
        try:
            _say_hello(sock, mine, ring)
        except _NotARankError as error:
            _close_all(descriptors)
            sock.close()
            raise _lost(theirs.rank, f"the exchange of rings failed: {error}") from error
        self._link(sock, theirs, descriptors)

    def _link(self, sock: socket.socket, theirs: _Hello, descriptors: list[int]) -> None:
        try:
            mapped = open_shared_ring(SharedMemoryRing(theirs.nbytes), descriptors, writable=False)
        except BaseException:
            sock.close()
            raise
        sock.setblocking(False)
        link = _Link(theirs.rank, sock, mapped)
        self._links[link.rank] = link
        self._reactor.add(sock.fileno(), lambda: self._on_readable(link))

    def ring_of(self, rank: int) -> RingMemory:
        """Another rank's ring, read-only."""
        return self._links[rank].ring

    def tell(self, rank: int, kind: int, bucket: int) -> None:
        link = self._links[rank]
        try:
            # At most one note for each slot is on its way. A socket's buffer takes near 280 notes (each of
            # them counts as a packet), so that only a ring of more slots than that could fill it.
            link.sock.sendall(_NOTE.pack(kind, bucket))
        except OSError as error:
            raise _lost(rank, f"its link is closed or full: {error}") from error

    def _on_readable(self, link: _Link) -> None:
        try:
            data = link.sock.recv(65536)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._drop(link)
            if not self.leaving:
                raise _lost(link.rank, "it died or left the update")
            return
        link.pending += data
        whole = len(link.pending) // _NOTE.size * _NOTE.size
        notes, link.pending = link.pending[:whole], link.pending[whole:]
        assert self._on_note is not None
        for kind, bucket in _NOTE.iter_unpack(notes):
            self._on_note(kind, link.rank, bucket)

    def _drop(self, link: _Link) -> None:
        self._reactor.remove(link.sock.fileno())
        link.sock.close()

    def close(self) -> None:
        """Closes links, maps and the listening socket. Idempotent."""
        self.leaving = True
        for link in self._links.values():
            if link.sock.fileno() >= 0:
                self._drop(link)
            link.ring.close()
        self._links.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)


class _NotARankError(Exception):
    """The other end is gone, silent, or somebody else. (An error of `poll` is none of these.)"""


def _say_hello(sock: socket.socket, mine: _Hello, ring: Ring) -> None:
    sock.settimeout(REPLY_SECONDS)
    try:
        socket.send_fds(sock, [msgspec.json.encode(mine) + b"\n"], ring.descriptors())
    except OSError as error:
        raise _NotARankError(str(error)) from error


def _hear_hello(sock: socket.socket, seconds: float, meeting: _Meeting) -> tuple[_Hello, list[int]]:
    """Who is at the other end, and the descriptors that came along: the caller's to close."""
    deadline = meeting.deadline.or_after(seconds)
    data, descriptors = b"", list[int]()
    sock.settimeout(POLL_SECONDS)
    try:
        while not data.endswith(b"\n"):
            meeting.poll()
            if deadline.passed:
                raise _NotARankError(f"no hello within {seconds} s")
            try:
                part, fds = receive_descriptors(sock, MAX_HELLO_NBYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise _NotARankError(str(error)) from error
            descriptors += fds
            data += part
            if not part:
                raise _NotARankError("it closed the connection")
            if len(data) > MAX_HELLO_NBYTES:
                raise _NotARankError(f"a hello of over {MAX_HELLO_NBYTES} bytes")
        return _decode(data), descriptors
    except BaseException:
        _close_all(descriptors)
        raise


def _decode(line: bytes) -> _Hello:
    try:
        return msgspec.json.decode(line, type=_Hello)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _NotARankError(f"not a rank's hello: {error}") from None


def _lost(rank: int, message: str) -> PeerLost:
    return PeerLost(ErrorRecord(error_type="PeerLost", message=f"rank {rank} is gone: {message}"))


def _close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)
