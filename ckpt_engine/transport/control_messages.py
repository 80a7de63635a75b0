"""What a rank and the control server say to each other: typed, framed, bounded. No pickle.

    rank                               control server (in rank 0's process)
      Join(token)                  ->
                                   <-  Welcome
      Enter(call, what it brings)  ->
                                   <-  Entered(call, round)
                                   <-  Met(round, what all brought)
      Vote(call)                   ->
      Abandon(call, why)           ->
                                   <-  Decided(round, verdict)     to every member, once
      Left(call)                   ->                              it has learnt all it needs
      Mistake(why)                 ->                              a call that nobody can meet
      Beat                         <-> Beat                        silence is death
      Goodbye                      ->

A rank numbers its calls, the server the rounds in which they meet.
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


class _Frame(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    pass


class Join(_Frame, frozen=True):
    protocol: int
    token: str
    rank: int
    pid: int


class Enter(_Frame, frozen=True):
    """`members`: ranks, sorted; `purpose`: what they do, alike on all; `without_lost`: they may meet without
    members that are gone; `decides`: they will vote."""

    call: int
    members: tuple[int, ...]
    purpose: str
    payload: bytes
    without_lost: bool
    decides: bool


class Vote(_Frame, frozen=True):
    call: int
    version: str


class Abandon(_Frame, frozen=True):
    """With `members` and `purpose`, since a rank may give up a call before it enters."""

    call: int
    members: tuple[int, ...]
    purpose: str
    record: ErrorRecord


class Left(_Frame, frozen=True):
    call: int


class Mistake(_Frame, frozen=True):
    purpose: str
    record: ErrorRecord


class Beat(_Frame, frozen=True):
    pass


class Goodbye(_Frame, frozen=True):
    pass


class Welcome(_Frame, frozen=True):
    pass


class Entered(_Frame, frozen=True):
    """The call belongs to this round. Numbers grow, over rounds of any members."""

    call: int
    round: int


class Met(_Frame, frozen=True):
    """`payloads` by member (None: gone); `lost`: members that are gone, and why."""

    round: int
    payloads: tuple[bytes | None, ...]
    lost: dict[int, str]


class Decided(_Frame, frozen=True):
    round: int
    verdict: Verdict


RankFrame = Join | Enter | Vote | Abandon | Left | Mistake | Beat | Goodbye
ServerFrame = Welcome | Entered | Met | Decided | Beat

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
