"""What a reader and an owner's lease server say to each other.

reader                                 owner
  Ask(session, checkpoint, ...)  ->
                                 <-    Refused(why)            and the connection ends
                                 <-    Granted(present)        at once, or after others have read
  Check                          ->
                                 <-    Held(present)           the lease holds, up to now
  Renew                          <->   Renew                   every RENEW_SECONDS; silence is death

who will hold the same weights         an owner, as directory
  Seek(session, checkpoint, ...) ->
                                 <-    Refused(why)
                                 <-    Found(place, groups)    those who hold them already
  Announce(group, metas)         ->                            it stands until the connection ends
  Renew                          <->   Renew
"""

from __future__ import annotations

import socket

import msgspec

from ckpt_engine.errors import P2PError
from ckpt_engine.transport.framing import Message, decode, encode

LEASE_PROTOCOL = 3
MAX_NBYTES = 16 * 1024
"""Largest message, either way, but of a directory."""
MAX_METAS_NBYTES = 64 * 1024 * 1024
"""Largest announcement."""
MAX_GROUPS = 4
"""How many a directory tells of: the newest."""
MAX_FOUND_NBYTES = MAX_GROUPS * MAX_METAS_NBYTES
RENEW_SECONDS = 5.0
LEASE_SECONDS = 20.0
"""After how long without a sign of life the other side counts as gone."""
ALL = -1
"""In place of a number of host buffers: all of them."""


class Opening(Message, frozen=True):
    """What a connection begins with: whose share it is about. `layout`: the digest of its host buffers."""

    protocol: int
    session: str
    checkpoint: str
    epoch: str
    layout: str


class Ask(Opening, frozen=True):
    """`reader`: who reads; leases of the same reader count once."""

    reader: str


class Seek(Opening, frozen=True):
    """`announces`: it will hold the weights itself, and say so: who asks next is told of it, too. `waits`:
    for those who are to announce themselves; else nothing is told."""

    announces: bool
    waits: bool


class Announce(Message, frozen=True):
    """`metas`: of one rank, as JSON. `group`: alike for all ranks of one update."""

    group: str
    metas: bytes


class Check(Message, frozen=True):
    pass


class Renew(Message, frozen=True):
    pass


class Granted(Message, frozen=True):
    """`present`: so many host buffers of the share can be read, the first ones, or `ALL`."""

    present: int = ALL


class Refused(Message, frozen=True):
    why: str


class Held(Message, frozen=True):
    """`present`: as of `Granted`."""

    present: int = ALL


class Found(Message, frozen=True):
    """`place`: how many groups have announced themselves. `groups`: the metas of each one's ranks, of the
    newest ones, the newest last."""

    place: int
    groups: tuple[tuple[bytes, ...], ...]


ReaderMessage = Ask | Seek | Announce | Check | Renew
OwnerMessage = Granted | Refused | Held | Found | Renew

_READER: msgspec.msgpack.Decoder[ReaderMessage] = msgspec.msgpack.Decoder(ReaderMessage)
_OWNER: msgspec.msgpack.Decoder[OwnerMessage] = msgspec.msgpack.Decoder(OwnerMessage)


def frame(message: ReaderMessage | OwnerMessage) -> bytes:
    """Raises ProtocolError: it is too long."""
    limits = {Announce: MAX_METAS_NBYTES, Found: MAX_FOUND_NBYTES}
    return encode(message, limits.get(type(message), MAX_NBYTES))


def reader_message(body: bytes) -> ReaderMessage:
    """Raises ProtocolError: not a reader's message of this version."""
    return decode(_READER, body, "a message of who reads")


def owner_message(body: bytes) -> OwnerMessage:
    """Raises ProtocolError: not an owner's message of this version."""
    return decode(_OWNER, body, "a message of a lease server")


def address_of(name: tuple[str | int, ...]) -> str:
    """A socket's name as text: `host:port`, `[host]:port` for IPv6."""
    host, port = str(name[0]), name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parts_of(address: str) -> tuple[str, int]:
    """The inverse of `address_of`. Raises P2PError: it is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise P2PError(f"{address!r} is no address of a lease server")
    return host.removeprefix("[").removesuffix("]"), int(port)


def notice_death(sock: socket.socket) -> None:
    """Lets the kernel end the connection when the other host does not acknowledge for LEASE_SECONDS."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LEASE_SECONDS * 1000))
