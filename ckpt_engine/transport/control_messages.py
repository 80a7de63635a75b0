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

from dataclasses import dataclass

import msgspec

from ckpt_engine.errors import ErrorRecord
from ckpt_engine.transport.framing import Message, decode, encode

CONTROL_PROTOCOL = 4
MAX_FRAME_NBYTES = 1024**3
"""Largest frame: what all ranks bring to a gather of a large checkpoint on thousands of ranks."""
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
    """`members`: ranks, sorted; `purpose`: what they do, alike on all; `without_lost`: they may meet without
    members that are gone; `decides`: they will vote."""

    call: int
    members: tuple[int, ...]
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
    members: tuple[int, ...]
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
    """`payloads` by member (None: gone); `lost`: members that are gone, and why."""

    round: int
    payloads: tuple[bytes | None, ...]
    lost: dict[int, str]


class Decided(Message, frozen=True):
    round: int
    verdict: Verdict


RankFrame = Join | Enter | Vote | Abandon | Left | Mistake | Beat | Goodbye
ServerFrame = Welcome | Refused | Entered | Met | Decided | Beat

_RANK_DECODER: msgspec.msgpack.Decoder[RankFrame] = msgspec.msgpack.Decoder(RankFrame)
_SERVER_DECODER: msgspec.msgpack.Decoder[ServerFrame] = msgspec.msgpack.Decoder(ServerFrame)


def encode_frame(message: RankFrame | ServerFrame) -> bytes:
    """The message with its length in front."""
    return encode(message, MAX_FRAME_NBYTES)


def decode_rank_frame(body: bytes) -> RankFrame:
    """Raises ProtocolError: not a rank's message of this version."""
    return decode(_RANK_DECODER, body, "a rank's control message")


def decode_server_frame(body: bytes) -> ServerFrame:
    """Raises ProtocolError: not a control server's message of this version."""
    return decode(_SERVER_DECODER, body, "a control server's message")
