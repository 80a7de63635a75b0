"""What a rank and the control server say to each other: typed, framed, bounded. No pickle.

    rank                               control server (in rank 0's process)
      Join(token)                  ->
                                   <-  Welcome, or Refused(why)
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
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import msgspec

from ckpt_engine.errors import ErrorRecord, ProtocolError
from ckpt_engine.transport.framing import Message, decode, encode

CONTROL_PROTOCOL = 5
MAX_FRAME_NBYTES = 1024**3
"""Largest frame: what all ranks bring to a gather of a large checkpoint on thousands of ranks."""
COMPRESSED_NBYTES = 4096
"""Of what is brought, from which on it is compressed."""
MAX_JOIN_NBYTES = 1024
"""Largest frame of a connection that has not shown the token yet."""


@dataclass(kw_only=True, frozen=True)
class Verdict:
    """How a round ended: `record` is None when it committed. `met`: whether all members had come before."""

    version: str | None = None
    record: ErrorRecord | None = None
    met: bool = False

    @property
    def committed(self) -> bool:
        return self.record is None


class Join(Message, frozen=True):
    protocol: int
    token: str
    rank: int
    pid: int
    world_size: int = 0


class Enter(Message, frozen=True):
    """`members`: ranks, sorted, or None for all (of thousands, each would name them all); `payload`: packed;
    `purpose`: what they do, alike on all; `without_lost`: they may meet without
    members that are gone; `decides`: they will vote."""

    call: int
    members: tuple[int, ...] | None
    purpose: str
    payload: bytes
    without_lost: bool
    decides: bool


class Vote(Message, frozen=True):
    call: int
    version: str


class Abandon(Message, frozen=True):
    """With `members` and `purpose`, since a rank may give up a call before it enters."""

    call: int
    members: tuple[int, ...] | None
    purpose: str
    record: ErrorRecord


class Left(Message, frozen=True):
    call: int


class Mistake(Message, frozen=True):
    purpose: str
    record: ErrorRecord


class Beat(Message, frozen=True):
    pass


class Goodbye(Message, frozen=True):
    pass


class Welcome(Message, frozen=True):
    pass


class Refused(Message, frozen=True):
    """To who has shown the token, and cannot be let in."""

    reason: str


class Entered(Message, frozen=True):
    """The call belongs to this round. Numbers grow, over rounds of any members."""

    call: int
    round: int


class Met(Message, frozen=True):
    """`payloads`: packed, a list by member (None: gone), each packed for itself.

    `lost`: members that are gone, and why."""

    round: int
    payloads: bytes
    lost: dict[int, str]

    @classmethod
    def of(cls, round_: int, payloads: list[bytes | None], lost: dict[int, str]) -> Met:
        """All members get all of it: what is alike in them is worth compressing."""
        return cls(round_, pack(msgspec.msgpack.encode(payloads)), lost)

    def brought(self) -> list[bytes | None]:
        """What each member brought. Raises ProtocolError: it is not that."""
        packed: list[bytes | None] = decode(_PAYLOADS, unpack(self.payloads), "what ranks brought")
        return [None if payload is None else unpack(payload) for payload in packed]


class Decided(Message, frozen=True):
    round: int
    verdict: Verdict


RoundFrame = Enter | Vote | Abandon | Left | Mistake
RankFrame = Join | RoundFrame | Beat | Goodbye
ServerFrame = Welcome | Refused | Entered | Met | Decided | Beat

_PAYLOADS: msgspec.msgpack.Decoder[list[bytes | None]] = msgspec.msgpack.Decoder(list[bytes | None])
_RANK_DECODER: msgspec.msgpack.Decoder[RankFrame] = msgspec.msgpack.Decoder(RankFrame)
_SERVER_DECODER: msgspec.msgpack.Decoder[ServerFrame] = msgspec.msgpack.Decoder(ServerFrame)


def pack(payload: bytes) -> bytes:
    """Compressed where that is worth its time: a large model's metas are, one introduction is not."""
    if len(payload) < COMPRESSED_NBYTES:
        return b"-" + payload
    return b"z" + zlib.compress(payload, 1)


def unpack(blob: bytes) -> bytes:
    """Raises ProtocolError: nothing that was packed, or larger than a frame may be."""
    if blob[:1] != b"z":
        return blob[1:]
    inflating = zlib.decompressobj()
    try:
        payload = inflating.decompress(blob[1:], MAX_FRAME_NBYTES)
    except zlib.error as error:
        raise ProtocolError(f"what a rank brought cannot be unpacked: {error}") from None
    if not inflating.eof:
        raise ProtocolError("what a rank brought is cut short, or larger than a frame may be")
    return payload


def encode_frame(message: RankFrame | ServerFrame) -> bytes:
    """The message with its length in front."""
    return encode(message, MAX_FRAME_NBYTES)


def decode_rank_frame(body: bytes) -> RankFrame:
    """Raises ProtocolError: not a rank's message of this version."""
    return decode(_RANK_DECODER, body, "a rank's control message")


def decode_server_frame(body: bytes) -> ServerFrame:
    """Raises ProtocolError: not a control server's message of this version."""
    return decode(_SERVER_DECODER, body, "a control server's message")
