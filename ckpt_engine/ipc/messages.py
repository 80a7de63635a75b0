"""What a parameter server and a worker say to each other: typed, versioned, bounded. No pickle.

    worker                           parameter server
      Hello                      ->
                                 <-  Begin (ring, every bucket's layout, remaining budget)
      Ready (its events)         ->                      the ring is mapped
                                 <-  BucketReady(i)      up to as many as there are free slots
      BucketDone(i)              ->
                                 <-  Finish              all buckets are out
      Released                   ->                      all is loaded, the ring is unmapped
                                 <-  Freed               its memory is the engine's again
      Finished                   ->                      post hook done
                                 <-  Commit | Abort      what all ranks decided
      Goodbye                    ->
                                 <-  StillHere           whenever nothing else was said for a second
      Failure (instead of any of the worker's messages: it leaves its loop)

Messages travel as msgpack (msgspec tagged structs) on the worker's ZeroMQ socket. Beside it stands the
*lifeline*, a Unix stream socket: it carries the ring's descriptors at Begin and its EOF is death.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from ckpt_engine.checksum import DIGEST_NBYTES
from ckpt_engine.devices.handles import RingHandle
from ckpt_engine.errors import ErrorRecord, ProtocolError, as_utf8

PROTOCOL_VERSION = 3
MAX_MESSAGE_NBYTES = 256 * 1024 * 1024
"""Largest message: a Begin of a million tensors is near 100 MB."""
MAX_WORKER_MESSAGE_NBYTES = 1024 * 1024
"""Largest message from a worker: a Failure with its traceback."""


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    pass


class TensorLayout(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A tensor in a bucket: `offset` bytes from the bucket's start; `dtype` by torch's name.

    There may be tens of thousands, none of which is part of a cycle: the garbage collector need not look.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class BucketLayout(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a bucket lies in the ring, and what is in it."""

    ring_offset: int
    nbytes: int
    tensors: tuple[TensorLayout, ...]


class Hello(_Message, frozen=True):
    protocol: int
    device_uuid: str
    pid: int


class Begin(_Message, frozen=True):
    """`budget`: seconds that the update may still take (a duration: clocks jump). `verify`: what is compared
    with the `digests`, of each bucket those of its tensors, one behind the other; empty: nothing."""

    session: str
    checkpoint: str
    version: str
    ring: RingHandle
    buckets: tuple[BucketLayout, ...]
    budget: float
    verify: Literal["", "transport", "full"] = ""
    digests: tuple[bytes, ...] = ()


class Ready(_Message, frozen=True):
    """`given_back`: IPC handles of the worker's events, one for each slot; none on CPU."""

    given_back: tuple[bytes, ...] = ()


class BucketReady(_Message, frozen=True):
    index: int


class BucketDone(_Message, frozen=True):
    index: int


class Finish(_Message, frozen=True):
    pass


class Freed(_Message, frozen=True):
    pass


class StillHere(_Message, frozen=True):
    pass


class Released(_Message, frozen=True):
    pass


class Finished(_Message, frozen=True):
    pass


class Commit(_Message, frozen=True):
    version: str


class Abort(_Message, frozen=True):
    """Why the update ended, as `ErrorRecord.describe` tells it."""

    reason: str

    @classmethod
    def because(cls, reason: str) -> Abort:
        return cls(as_utf8(reason[: 4 * 1024 * 1024]))


class Goodbye(_Message, frozen=True):
    pass


class Failure(_Message, frozen=True):
    """The worker's own error; `tensors` are those of the bucket at work."""

    stage: str
    error_type: str
    message: str
    traceback: str
    device_uuid: str
    touched: bool
    bucket: int | None = None
    tensors: tuple[str, ...] = ()
    left_out: int = 0

    @classmethod
    def from_record(cls, record: ErrorRecord, *, device_uuid: str, touched: bool) -> Failure:
        short = record.travelling()
        return cls(
            stage=short.stage,
            error_type=short.error_type,
            message=short.message,
            traceback=short.traceback,
            device_uuid=device_uuid,
            touched=touched,
            bucket=short.bucket,
            tensors=tuple(short.tensors),
            left_out=short.left_out,
        )


WorkerMessage = Hello | Ready | BucketDone | Released | Finished | Goodbye | Failure
ServerMessage = Begin | BucketReady | Finish | Freed | StillHere | Commit | Abort

_NOT_A_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises: the last two for text that is not UTF-8, and for very deep nesting."""
_ENCODER = msgspec.msgpack.Encoder()
_WORKER_DECODER: msgspec.msgpack.Decoder[WorkerMessage] = msgspec.msgpack.Decoder(WorkerMessage)
_SERVER_DECODER: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)


def encode(message: WorkerMessage | ServerMessage) -> bytes:
    """Raises ProtocolError: too large for the other side, whose socket would drop it without a word."""
    frame = _ENCODER.encode(message)
    if len(frame) > MAX_MESSAGE_NBYTES:
        raise ProtocolError(
            f"the {type(message).__name__} message of {len(frame)} bytes is over {MAX_MESSAGE_NBYTES}: the "
            "checkpoint has too many tensors for one update"
        )
    return frame


def decode_worker_message(frame: bytes) -> WorkerMessage:
    """Raises ProtocolError: not a message of this version, or too large."""
    if len(frame) > MAX_WORKER_MESSAGE_NBYTES:
        raise ProtocolError(f"a worker's message of {len(frame)} bytes is over {MAX_WORKER_MESSAGE_NBYTES}")
    try:
        return _WORKER_DECODER.decode(frame)
    except _NOT_A_MESSAGE as error:
        raise ProtocolError(f"not a worker's message: {error}") from None


def decode_server_message(frame: bytes) -> ServerMessage:
    """Raises ProtocolError: not a message of this version, or too large."""
    if len(frame) > MAX_MESSAGE_NBYTES:
        raise ProtocolError(
            f"a parameter server's message of {len(frame)} bytes is over {MAX_MESSAGE_NBYTES}"
        )
    try:
        return _SERVER_DECODER.decode(frame)
    except _NOT_A_MESSAGE as error:
        raise ProtocolError(f"not a parameter server's message: {error}") from None


def check_layout(begin: Begin) -> None:
    """Refuses a Begin whose buckets or tensors leave the ring (a worker would read beyond its map)."""
    if math.isnan(begin.budget) or begin.budget < 0:
        raise ProtocolError(f"the update's budget of {begin.budget} seconds is not a duration")
    if begin.verify and [len(digests) for digests in begin.digests] != [
        len(bucket.tensors) * DIGEST_NBYTES for bucket in begin.buckets
    ]:
        raise ProtocolError("there is not one digest for each tensor")
    for index, bucket in enumerate(begin.buckets):
        if (
            bucket.ring_offset < 0
            or bucket.nbytes < 0
            or bucket.ring_offset + bucket.nbytes > begin.ring.nbytes
        ):
            raise ProtocolError(f"bucket {index} lies outside the ring of {begin.ring.nbytes} bytes")
        for tensor in bucket.tensors:
            if tensor.offset < 0 or tensor.nbytes < 0 or tensor.offset + tensor.nbytes > bucket.nbytes:
                raise ProtocolError(f"tensor {tensor.name!r} lies outside bucket {index}")


def names_of(bucket: BucketLayout) -> list[str]:
    return [tensor.name for tensor in bucket.tensors]
