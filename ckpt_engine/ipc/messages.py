"""What a parameter server and a worker say to each other: typed, versioned, bounded. No pickle.

    worker                           parameter server
      Hello                      ->
                                 <-  Begin (ring, every bucket's layout, remaining budget)
      Ready                      ->
                                 <-  BucketReady(i)      up to as many as there are free slots
      BucketDone(i)              ->
                                 <-  Finish              all buckets are out
      Released                   ->                      the ring is unmapped
      Finished                   ->                      post hook done
                                 <-  Commit | Abort      what all ranks decided
      Goodbye                    ->
      Failure (instead of any of the worker's messages: it leaves its loop)

Messages travel as msgpack (msgspec tagged structs) on the worker's ZeroMQ socket. Beside it stands the
*lifeline*, a Unix stream socket: it carries the ring's descriptors at Begin and its EOF is death.
"""

from __future__ import annotations

import msgspec

from ckpt_engine.devices.handles import RingHandle
from ckpt_engine.errors import MAX_TEXT, ErrorRecord, ProtocolError

PROTOCOL_VERSION = 1
MAX_MESSAGE_NBYTES = 256 * 1024 * 1024
"""Largest message: a Begin of a million tensors is near 100 MB."""
MAX_WORKER_MESSAGE_NBYTES = 1024 * 1024
"""Largest message from a worker: a Failure with its traceback."""


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    pass


class TensorLayout(msgspec.Struct, frozen=True, array_like=True):
    """A tensor in a bucket: `offset` bytes from the bucket's start; `dtype` by torch's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class BucketLayout(msgspec.Struct, frozen=True, array_like=True):
    """Where a bucket lies in the ring, and what is in it."""

    ring_offset: int
    nbytes: int
    tensors: tuple[TensorLayout, ...]


class Hello(_Message, frozen=True):
    protocol: int
    device_uuid: str
    pid: int


class Begin(_Message, frozen=True):
    """`budget`: seconds that the update may still take (a duration: clocks jump)."""

    session: str
    checkpoint: str
    version: str
    ring: RingHandle
    buckets: tuple[BucketLayout, ...]
    budget: float


class Ready(_Message, frozen=True):
    pass


class BucketReady(_Message, frozen=True):
    index: int


class BucketDone(_Message, frozen=True):
    index: int


class Finish(_Message, frozen=True):
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

    @classmethod
    def from_record(cls, record: ErrorRecord, *, device_uuid: str, touched: bool) -> Failure:
        names = tuple(record.tensors)
        # A bucket of thousands of small tensors: the ends are enough to find it.
        names = names if len(names) <= 64 else (*names[:32], *names[-32:])
        return cls(
            stage=record.stage,
            error_type=record.error_type,
            message=record.message[:MAX_TEXT],
            traceback=record.traceback[-MAX_TEXT:],
            device_uuid=device_uuid,
            touched=touched,
            bucket=record.bucket,
            tensors=names,
        )


WorkerMessage = Hello | Ready | BucketDone | Released | Finished | Goodbye | Failure
ServerMessage = Begin | BucketReady | Finish | Commit | Abort

_ENCODER = msgspec.msgpack.Encoder()
_WORKER_DECODER: msgspec.msgpack.Decoder[WorkerMessage] = msgspec.msgpack.Decoder(WorkerMessage)
_SERVER_DECODER: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)


def encode(message: WorkerMessage | ServerMessage) -> bytes:
    return _ENCODER.encode(message)


def decode_worker_message(frame: bytes) -> WorkerMessage:
    """Raises ProtocolError: not a message of this version, or too large."""
    if len(frame) > MAX_WORKER_MESSAGE_NBYTES:
        raise ProtocolError(f"a worker's message of {len(frame)} bytes is over {MAX_WORKER_MESSAGE_NBYTES}")
    try:
        return _WORKER_DECODER.decode(frame)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"not a worker's message: {error}") from None


def decode_server_message(frame: bytes) -> ServerMessage:
    """Raises ProtocolError: not a message of this version."""
    try:
        return _SERVER_DECODER.decode(frame)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"not a parameter server's message: {error}") from None


def check_layout(begin: Begin) -> None:
    """Refuses a Begin whose buckets or tensors leave the ring (a worker would read beyond its map)."""
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
