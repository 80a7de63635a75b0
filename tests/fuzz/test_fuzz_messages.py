"""Whatever comes as a message: it is one, and says the same when it is sent on; or it is a ProtocolError."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st

from ckpt_engine.devices.handles import SharedMemoryRing
from ckpt_engine.errors import CheckpointFormatError, ConfigError, ErrorRecord, ProtocolError
from ckpt_engine.ipc import messages as ipc
from ckpt_engine.metadata import HostBufferMeta, RankMetas, TensorMeta, fleets_from_json, metas_to_json
from ckpt_engine.transport import control_messages as control
from ckpt_engine.transport import lease_messages as lease
from ckpt_engine.transport import shared_memory
from ckpt_engine.transport.framing import LENGTH, FrameBuffer
from ckpt_engine.transport.rdma import parse_nccl_ib_hca
from tests.fuzz.fuzzing import documents, fuzz, mutations

RECORD = ErrorRecord(error_type="E", message="m", rank=1, stage="buckets", bucket=2, tensors=("w",))
LAYOUT = ipc.BucketLayout(0, 16, (ipc.TensorLayout("w", "float32", (2, 2), 0, 16),))
BEGIN = ipc.Begin("s", "c", "v", SharedMemoryRing(4096), (LAYOUT,), 60.0)
FAILURE = ipc.Failure.from_record(RECORD, device_uuid="CPU-h-0", touched=True)


def decode_begin(frame: bytes) -> object:
    message = ipc.decode_server_message(frame)
    if isinstance(message, ipc.Begin):
        ipc.check_layout(message)
        # What the worker will read through lies in the ring.
        for bucket in message.buckets:
            for tensor in bucket.tensors:
                assert bucket.ring_offset + tensor.offset >= 0
                assert bucket.ring_offset + tensor.offset + tensor.nbytes <= message.ring.nbytes
    return message


def decode_met(frame: bytes) -> object:
    message = control.decode_server_frame(frame)
    if isinstance(message, control.Met):
        message.brought()
    return message


DECODERS: dict[str, tuple[Callable[[bytes], object], list[Any]]] = {
    "worker's messages": (
        ipc.decode_worker_message,
        [ipc.Hello(2, "u", 1), ipc.Ready((b"x",)), ipc.BucketDone(3), ipc.Finished(), FAILURE],
    ),
    "server's messages": (decode_begin, [BEGIN, ipc.BucketReady(1), ipc.Commit("v"), ipc.Abort("no")]),
    "ranks' control messages": (
        control.decode_rank_frame,
        [
            control.Join(2, "t", 0, 1, 2),
            control.Enter(1, (0, 1), "p", b"x", False, True),
            control.Vote(1, "v"),
            control.Abandon(1, (0,), "p", RECORD),
            control.Mistake("p", RECORD),
        ],
    ),
    "control server's messages": (
        decode_met,
        [
            control.Entered(1, 2),
            control.Met.of(1, [b"x", None], {1: "gone"}),
            control.Decided(1, control.Verdict(record=RECORD)),
        ],
    ),
    "readers' messages": (
        lease.reader_message,
        [
            lease.Ask(2, "s", "c", "e", "l", "r"),
            lease.Seek(2, "s", "c", "e", "l", True, False),
            lease.Announce("g", b"{}"),
        ],
    ),
    "lease servers' and directories' messages": (
        lease.owner_message,
        [lease.Granted(3), lease.Refused("no"), lease.Found(2, ((b"{}",), ()))],
    ),
}


def same(one: object, other: object) -> bool:
    return one == other or msgspec.msgpack.encode(one) == msgspec.msgpack.encode(other)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str) -> None:
    decode, examples = DECODERS[name]
    good = [msgspec.msgpack.encode(message) for message in examples]
    for message, frame in zip(examples, good, strict=True):
        assert same(decode(frame), message)

    def check(frame: bytes) -> None:
        try:
            message = decode(frame)
        except ProtocolError:
            return
        assert same(decode(msgspec.msgpack.encode(message)), message)

    tags = tuple(type(message).__name__ for message in examples)
    shaped = st.builds(
        lambda tag, rest: msgspec.msgpack.encode([tag, *rest]),
        st.sampled_from(tags),
        st.lists(documents(("record", "w")).filter(_fits), max_size=6),
    )
    fuzz(name, st.one_of(mutations(st.sampled_from(good)), shaped), check)


def _fits(value: object) -> bool:
    """msgpack's own integers have 64 bits, and its text is UTF-8."""
    try:
        msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError):
        return False
    return True


def test_frames() -> None:
    """However a stream is cut, the frames are the same; one that claims too much is refused."""
    limit = 64

    def check(example: tuple[list[bytes], list[int], bytes]) -> None:
        bodies, cuts, rest = example
        stream = b"".join(LENGTH.pack(len(body)) + body for body in bodies) + rest
        frames, found = FrameBuffer(limit), []
        places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
        try:
            for begin, end in itertools.pairwise(places):
                frames.feed(stream[begin:end])
                while (body := frames.next()) is not None:
                    assert len(body) <= limit
                    found.append(body)
        except ProtocolError:
            assert len(rest) >= LENGTH.size
        assert found[: len(bodies)] == bodies

    bodies = st.lists(st.binary(max_size=limit), max_size=5)
    fuzz(
        "frames", st.tuples(bodies, st.lists(st.integers(0, 400), max_size=9), st.binary(max_size=20)), check
    )


def test_hellos_of_ranks() -> None:
    good = msgspec.json.encode(shared_memory._Hello(rank=1, token="t", nbytes=4096))

    def check(line: bytes) -> None:
        try:
            hello = shared_memory._decode(line)
        except shared_memory._NotARankError:
            return
        assert shared_memory._decode(msgspec.json.encode(hello)) == hello

    fuzz("hellos of ranks", mutations(st.just(good)), check)


METAS = metas_to_json(
    {
        0: RankMetas(
            rank=0,
            host="h",
            host_ip="127.0.0.1",
            device_uuid="CPU-h-0",
            epoch="e",
            buffers=(
                HostBufferMeta(
                    address=4096,
                    nbytes=256,
                    tensors=(TensorMeta(name="w", dtype="float32", shape=(3,), offset=0, nbytes=12),),
                ),
            ),
        )
    }
)


def test_metas() -> None:
    def check(text: bytes) -> None:
        try:
            fleets = fleets_from_json(text)
        except CheckpointFormatError:
            return
        for metas in fleets:
            assert fleets_from_json(metas_to_json(metas)) == [metas]
            for held in metas.values():
                for buffer in held.buffers:
                    assert all(0 <= t.offset <= t.offset + t.nbytes <= buffer.nbytes for t in buffer.tensors)

    keys = ("0", "rank", "host", "buffers", "tensors", "address", "nbytes", "shape", "offset", "epoch")
    texts = documents(keys).map(lambda document: _json(document))
    fuzz("metas", mutations(st.one_of(st.just(METAS), st.just(b"[" + METAS + b"]"), texts)), check)


def _json(document: object) -> bytes:
    return json.dumps(document).encode()


def test_nccl_ib_hca() -> None:
    devices = ["mlx5_0", "mlx5_1", "mlx5_10", "mlx5_bond_0", "irdma0"]

    def check(value: str) -> None:
        try:
            chosen = parse_nccl_ib_hca(value, devices)
        except ConfigError as error:
            assert "NCCL_IB_HCA" in str(error)
            return
        assert chosen == [device for device in devices if device in chosen]
        assert parse_nccl_ib_hca(value, []) == []

    tokens = st.lists(
        st.sampled_from(
            ["mlx5", "mlx5_1", "mlx5_10", "=", "^", "^=", "=^", ":", ":1", ",", " ", "irdma0", "x"]
        ),
        max_size=7,
    ).map("".join)
    fuzz("NCCL_IB_HCA", st.one_of(tokens, st.text(max_size=20)), check)


def test_durations_of_begin() -> None:
    for budget in (math.nan, -1.0):
        with pytest.raises(ProtocolError):
            ipc.check_layout(msgspec.structs.replace(BEGIN, budget=budget))
