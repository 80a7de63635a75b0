"""Typed messages on a stream: a frame is its length (4 bytes, little endian) and a msgpack document."""

from __future__ import annotations

import errno
import socket
import struct
from typing import TypeVar

import msgspec

from ckpt_engine.errors import ProtocolError

LENGTH = struct.Struct("<I")
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of `accept` that come again at once: whoever listens must wait before it tries again."""

M = TypeVar("M")
_ENCODER = msgspec.msgpack.Encoder()
_NOT_A_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """The base of all that travel in frames."""


def encode(message: Message, limit: int) -> bytes:
    """The message with its length in front. Raises ProtocolError: it is over `limit` bytes."""
    body = _ENCODER.encode(message)
    if len(body) > limit:
        raise ProtocolError(f"a message of {len(body)} bytes is over {limit}")
    return LENGTH.pack(len(body)) + body


def decode(decoder: msgspec.msgpack.Decoder[M], body: bytes, what: str) -> M:
    """A frame's message. Raises ProtocolError: it is not `what`."""
    try:
        return decoder.decode(body)
    except _NOT_A_MESSAGE as error:
        raise ProtocolError(f"not {what}: {error}") from None


class FrameBuffer:
    """Cuts a stream into frames. `limit`: the largest frame that is accepted now, in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        self._data += data

    def next(self) -> bytes | None:
        """The next whole frame's body. Raises ProtocolError when it claims to be over the limit."""
        if len(self._data) < LENGTH.size:
            return None
        (nbytes,) = LENGTH.unpack_from(self._data)
        if nbytes > self.limit:
            raise ProtocolError(f"a message claims {nbytes} bytes, over {self.limit}")
        if len(self._data) < LENGTH.size + nbytes:
            return None
        body = bytes(self._data[LENGTH.size : LENGTH.size + nbytes])
        del self._data[: LENGTH.size + nbytes]
        return body


def receive(sock: socket.socket, nbytes: int) -> bytes:
    """The next `nbytes` bytes of a stream; fewer only where it ends. (MSG_WAITALL does not wait for all where
    the socket has a timeout.)"""
    received = bytearray()
    while len(received) < nbytes and (part := sock.recv(nbytes - len(received))):
        received += part
    return bytes(received)
