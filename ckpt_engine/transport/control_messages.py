"""What a rank and the control server say to each other: typed, framed, bounded. No pickle.

    rank                               control server (in rank 0's process)
      Join(token)                  ->
                                   <-  Welcome
      Enter(round, what it brings) ->
                                   <-  Met(what all brought)
      Vote(round)                  ->
      Abandon(round, why)          ->
                                   <-  Decided(round, verdict)     to every member, once
      Left(round)                  ->                              it has learnt all it needs
      Beat                         <-> Beat                        silence is death
      Goodbye                      ->

A frame is its length (4 bytes, little endian) and a msgpack document.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec

from ckpt_engine.errors import ErrorRecord, ProtocolError

CONTROL_PROTOCOL = 1
MAX_FRAME_NBYTES = 1024**3
"""Largest frame: what all ranks bring to a gather of a large checkpoint on thousands of ranks."""
MAX_JOIN_NBYTES = 1024
"""Largest frame of a connection that has not shown the token yet."""
LENGTH = struct.Struct("<I")


@dataclass(kw_only=True, frozen=True)
class Verdict:
    """How a round ended: `record` is None when it committed."""

    version: str | None = None
    record: ErrorRecord | None = None

    @property
    def committed(self) -> bool:
        return self.record is None


class RoundKey(msgspec.Struct, frozen=True, array_like=True):
    """The `number`-th round of these `members` (ranks, sorted)."""

    members: tuple[int, ...]
    number: int


class _Frame(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    pass


class Join(_Frame, frozen=True):
    protocol: int
    token: str
    rank: int
    pid: int


class Enter(_Frame, frozen=True):
    """`without_lost`: the round may meet without members that are gone."""

    round: RoundKey
    purpose: str
    payload: bytes
    without_lost: bool


class Vote(_Frame, frozen=True):
    round: RoundKey
    version: str


class Abandon(_Frame, frozen=True):
    round: RoundKey
    record: ErrorRecord


class Left(_Frame, frozen=True):
    round: RoundKey


class Beat(_Frame, frozen=True):
    pass


class Goodbye(_Frame, frozen=True):
    pass


class Welcome(_Frame, frozen=True):
    pass


class Met(_Frame, frozen=True):
    """`payloads` by member (None: gone); `serial` grows with every round of any members."""

    round: RoundKey
    serial: int
    payloads: tuple[bytes | None, ...]
    lost: dict[int, str]


class Decided(_Frame, frozen=True):
    round: RoundKey
    verdict: Verdict


class Moved(_Frame, frozen=True):
    """The rank missed this round and the ones after it; the others are in the `number`-th one now."""

    round: RoundKey
    number: int


RankFrame = Join | Enter | Vote | Abandon | Left | Beat | Goodbye
ServerFrame = Welcome | Met | Decided | Moved | Beat

_NOT_A_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_ENCODER = msgspec.msgpack.Encoder()
_RANK_DECODER: msgspec.msgpack.Decoder[RankFrame] = msgspec.msgpack.Decoder(RankFrame)
_SERVER_DECODER: msgspec.msgpack.Decoder[ServerFrame] = msgspec.msgpack.Decoder(ServerFrame)


def encode_frame(message: RankFrame | ServerFrame) -> bytes:
    """The message with its length in front."""
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_NBYTES:
        raise ProtocolError(f"a control message of {len(body)} bytes is over {MAX_FRAME_NBYTES}")
    return LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Cuts a stream into frames. `limit`: the largest frame that is accepted now, in bytes."""

    def __init__(self, limit: int = MAX_FRAME_NBYTES) -> None:
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
            raise ProtocolError(f"a control message claims {nbytes} bytes, over {self.limit}")
        if len(self._data) < LENGTH.size + nbytes:
            return None
        body = bytes(self._data[LENGTH.size : LENGTH.size + nbytes])
        del self._data[: LENGTH.size + nbytes]
        return body


def decode_rank_frame(body: bytes) -> RankFrame:
    """Raises ProtocolError: not a rank's message of this version."""
    try:
        return _RANK_DECODER.decode(body)
    except _NOT_A_MESSAGE as error:
        raise ProtocolError(f"not a rank's control message: {error}") from None


def decode_server_frame(body: bytes) -> ServerFrame:
    """Raises ProtocolError: not a control server's message of this version."""
    try:
        return _SERVER_DECODER.decode(body)
    except _NOT_A_MESSAGE as error:
        raise ProtocolError(f"not a control server's message: {error}") from None
