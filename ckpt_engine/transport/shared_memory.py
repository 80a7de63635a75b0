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
import json
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Ring, open_ring
from ckpt_engine.devices.handles import SharedMemoryRing
from ckpt_engine.errors import ErrorRecord, PeerLost, ProtocolError, UpdateTimeout
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.ipc.sockets import check_peer, listen

_NOTE = struct.Struct("<BI")
STAGED, COPIED = 1, 2


@dataclass
class _Link:
    rank: int
    sock: socket.socket
    ring: Ring
    pending: bytes = b""


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
        hello = json.dumps({"rank": self.rank, "token": token, "nbytes": ring.nbytes}).encode() + b"\n"
        # Lower ranks listen, higher ranks connect: one link for each pair. All listened before they met.
        for rank in sorted(other for other in paths if other < self.rank):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(paths[rank])
            except OSError as error:
                sock.close()
                raise _lost(rank, f"cannot connect to {paths[rank]}: {error}") from error
            self._swap(sock, hello, ring, token, rank, deadline)
        expected = {other for other in paths if other > self.rank}
        while not expected <= self._links.keys():
            poll()
            if deadline.passed:
                missing = sorted(expected - self._links.keys())
                message = f"ranks {missing} of this host did not connect"
                raise UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message, stage="begin"))
            accepted = self._accept()
            if accepted is not None:
                self._swap(accepted, hello, ring, token, None, deadline)

    def _accept(self) -> socket.socket | None:
        assert self._listener is not None
        self._listener.settimeout(0.05)
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

    def _swap(
        self,
        sock: socket.socket,
        hello: bytes,
        ring: Ring,
        token: str,
        rank: int | None,
        deadline: Deadline,
    ) -> None:
        theirs: list[int] = []
        try:
            sock.settimeout(max(0.01, min(30.0, deadline.remaining)))
            socket.send_fds(sock, [hello], ring.descriptors())
            data = b""
            while not data.endswith(b"\n"):
                part, fds, _, _ = socket.recv_fds(sock, 4096, 4)
                theirs += fds
                if not part:
                    raise ConnectionError("closed")
                data += part
            fields = json.loads(data)
            if fields["token"] != token or (rank is not None and fields["rank"] != rank):
                raise ProtocolError(f"a rank of another update connected: {fields}")
            mapped = open_ring(SharedMemoryRing(int(fields["nbytes"])), theirs, writable=False)
        except OSError as error:
            _close_all(theirs)
            sock.close()
            raise _lost(rank, f"the exchange of rings failed: {error}") from error
        except BaseException:
            sock.close()
            raise
        sock.setblocking(False)
        link = _Link(int(fields["rank"]), sock, mapped)
        self._links[link.rank] = link
        self._reactor.add(sock.fileno(), lambda: self._on_readable(link))

    def ring_of(self, rank: int) -> Ring:
        """Another rank's ring, read-only."""
        return self._links[rank].ring

    def tell(self, rank: int, kind: int, bucket: int) -> None:
        link = self._links[rank]
        try:
            # Five bytes: a full socket buffer means a rank that has not read for thousands of buckets.
            link.sock.sendall(_NOTE.pack(kind, bucket))
        except OSError as error:
            raise _lost(rank, f"it closed its link: {error}") from error

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


def _lost(rank: int | None, message: str) -> PeerLost:
    who = "a rank of this host" if rank is None else f"rank {rank}"
    return PeerLost(ErrorRecord(error_type="PeerLost", message=f"{who} is gone: {message}"))


def _close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)
