"""The protocol's messages: what is said arrives, and whatever else arrives is a ProtocolError."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_engine.devices.handles import SharedMemoryRing
from ckpt_engine.errors import MAX_TEXT, ErrorRecord, ProtocolError
from ckpt_engine.ipc import messages
from ckpt_engine.ipc.messages import (
    Abort,
    Begin,
    BucketDone,
    BucketLayout,
    BucketReady,
    Commit,
    Failure,
    Finish,
    Finished,
    Freed,
    Goodbye,
    Hello,
    Ready,
    Released,
    StillHere,
    TensorLayout,
    check_layout,
    decode_server_message,
    decode_worker_message,
    encode,
    names_of,
)

DEEP = b"\x91" * 500_000 + b"\xc0"
"""An array in an array in an array ..."""
HUGE_ARRAY = b"\xdd\xff\xff\xff\xff"
"""Claims 2**32 - 1 items: an array of pointers for them would be 32 GiB."""

TENSOR = TensorLayout("model.layers.0.weight", "bfloat16", (2, 0, 3), 64, 12)
BEGIN = Begin(
    session="s",
    checkpoint="weights ü",
    version="17",
    ring=SharedMemoryRing(nbytes=2**40),
    buckets=(
        BucketLayout(0, 128, (TENSOR, TensorLayout("scalar", "float32", (), 0, 4))),
        BucketLayout(9, 0, ()),
    ),
    budget=12.5,
)
FAILURE = Failure("buckets", "ValueError", "no\nsuch", "Traceback ...", "CPU-h-1", True, 3, ("a", "b"))
WORKER = [
    Hello(messages.PROTOCOL_VERSION, "CPU-h-1", 4242),
    Ready(),
    Ready((b"", b"\xff" * 64)),
    BucketDone(0),
    Released(),
    Finished(),
    Goodbye(),
    FAILURE,
    Failure("handshake", "ConfigError", "", "", "", False),
]
SERVER = [BEGIN, BucketReady(2**40), Finish(), Freed(), StillHere(), Commit("18"), Abort("rank 1 died")]

Decode = Callable[[bytes], Any]
both_ways = pytest.mark.parametrize("decode", [decode_worker_message, decode_server_message])


def name_of(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("message", WORKER, ids=name_of)
def test_what_a_worker_says_arrives(message: messages.WorkerMessage) -> None:
    assert decode_worker_message(encode(message)) == message
    with pytest.raises(ProtocolError, match="not a parameter server's message"):
        decode_server_message(encode(message))


@pytest.mark.parametrize("message", SERVER, ids=name_of)
def test_what_a_parameter_server_says_arrives(message: messages.ServerMessage) -> None:
    assert decode_server_message(encode(message)) == message
    with pytest.raises(ProtocolError, match="not a worker's message"):
        decode_worker_message(encode(message))


def test_every_message_is_tried() -> None:
    """A new message must come into the lists above."""
    assert {type(message) for message in WORKER} == set(messages.WorkerMessage.__args__)
    assert {type(message) for message in SERVER} == set(messages.ServerMessage.__args__)


@pytest.mark.parametrize("message", [*WORKER, *SERVER], ids=name_of)
def test_a_message_cut_short_or_with_bytes_behind_it_is_refused(message: Any) -> None:  # noqa: ANN401
    frame = encode(message)
    decode = decode_worker_message if message in WORKER else decode_server_message
    for end in range(len(frame)):
        with pytest.raises(ProtocolError):
            decode(frame[:end])
    with pytest.raises(ProtocolError, match="trailing"):
        decode(frame + b"\0")


@pytest.mark.parametrize("message", [*WORKER, *SERVER], ids=name_of)
def test_a_field_too_many_or_too_few_is_refused(message: Any) -> None:  # noqa: ANN401
    decode = decode_worker_message if message in WORKER else decode_server_message
    fields = msgspec.msgpack.decode(encode(message))
    with pytest.raises(ProtocolError, match="at most length"):
        decode(msgspec.msgpack.encode([*fields, 0]))
    required = 1 + sum(field.required for field in msgspec.structs.fields(message))
    with pytest.raises(ProtocolError, match="at least length"):
        decode(msgspec.msgpack.encode(fields[: required - 1]))


def places(value: object, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The place of everything inside `value`."""
    inside = [places(item, (*path, i)) for i, item in enumerate(value)] if isinstance(value, list) else []
    return [path, *(place for found in inside for place in found)]


def with_replaced(value: Any, path: tuple[int, ...], new: Callable[[Any], Any]) -> Any:  # noqa: ANN401
    if not path:
        return new(value)
    return [with_replaced(v, path[1:], new) if i == path[0] else v for i, v in enumerate(value)]


@pytest.mark.parametrize("message", [BEGIN, FAILURE, WORKER[0]], ids=name_of)
def test_a_wrong_type_in_any_place_is_refused(message: Any) -> None:  # noqa: ANN401
    decode = decode_worker_message if message in WORKER else decode_server_message
    fields = msgspec.msgpack.decode(encode(message))
    for path in places(fields):
        bad = msgspec.msgpack.encode(with_replaced(fields, path, lambda _: {"a": b"b"}))
        with pytest.raises(ProtocolError):
            decode(bad)


def test_an_unknown_field_inside_a_begin_is_refused() -> None:
    """Tensors, buckets and the ring's handle are as closed as the messages themselves."""
    fields = msgspec.msgpack.decode(encode(BEGIN))
    structs = [path for path in places(fields) if path in [(4,), (5, 0), (5, 1), (5, 0, 2, 0), (5, 0, 2, 1)]]
    assert len(structs) == 5
    for path in structs:
        for extra in (b"\x05", DEEP):
            bad = with_replaced(fields, path, lambda item, extra=extra: [*item, msgspec.Raw(extra)])
            with pytest.raises(ProtocolError):
                decode_server_message(msgspec.msgpack.encode(bad))


@both_ways
@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc0",
        b"\xc1",  # never used by msgpack
        b"\x01",
        b"\x90",
        b"\x91\xa4Hell",
        b"\x91\xa6__main",
        b"\x91\x05",
        b"\x91\xa3S\xffT",  # not UTF-8
        b"\x81\xa4type\xa5Ready",
        b"\x92\xa5Ready" + DEEP,
        b"\x94" + DEEP,
        b"\x94\xa5Hello" + DEEP,
        b"\x94\xa5Hello\x01\xa1\xff\x01",  # not UTF-8
        b"\x94\xa5Hello\x01\xdb\xff\xff\xff\xffshort",
        b"\x94\xa5Hello\xd6\xff\x00\x00\x00\x00\xa0\x01",  # a timestamp
        HUGE_ARRAY,
        HUGE_ARRAY + b"\xa5Begin",
        b"\xdf\xff\xff\xff\xff\xa4type",
        b"\x99\xa7Failure\xa0\xa0\xa0\xa0\xa0\xc2\xc0" + HUGE_ARRAY,
        b"\x97\xa5Begin\xa0\xa0\xa0\x92\xb0SharedMemoryRing\x00" + HUGE_ARRAY,
        b'{"type": "Ready"}',
        b"GET / HTTP/1.1\r\n\r\n",
        pickle.dumps(print),
    ],
    ids=lambda frame: repr(frame[:24]) if isinstance(frame, bytes) else None,
)
def test_garbage_is_refused(decode: Decode, frame: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"not a (worker|parameter server)'s message"):
        decode(frame)


@both_ways
@given(frame=st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_random_bytes_are_refused(decode: Decode, frame: bytes) -> None:
    try:
        message = decode(frame)
    except ProtocolError:
        return
    # Five random bytes may be a message by chance: then all of them.
    assert decode(encode(message)) == message


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_changed_message_is_refused_or_another_message(data: st.DataObject) -> None:
    """Random bytes rarely get beyond the tag: these do."""
    message = data.draw(st.sampled_from([*WORKER, *SERVER]))
    decode = decode_worker_message if message in WORKER else decode_server_message
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        frame[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not frame:
            break
    try:
        decoded = decode(bytes(frame))
    except ProtocolError:
        return
    again = decode(encode(decoded))
    # A budget that is not a number equals nothing.
    assert again == decoded or (isinstance(decoded, Begin) and math.isnan(decoded.budget))


def test_a_message_over_the_bound_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = messages.MAX_WORKER_MESSAGE_NBYTES
    with pytest.raises(ProtocolError, match=f"{limit + 1} bytes is over {limit}"):
        decode_worker_message(b"\xc1" * (limit + 1))
    with pytest.raises(ProtocolError, match="not a worker's message"):
        decode_worker_message(b"\xc1" * limit)
    monkeypatch.setattr(messages, "MAX_MESSAGE_NBYTES", 50)
    with pytest.raises(ProtocolError, match="51 bytes is over 50"):
        decode_server_message(b"\xc1" * 51)


def test_the_largest_failure_fits_the_bound() -> None:
    """What a worker can say about its error must always arrive: four bytes each, and as many as travel."""
    record = ErrorRecord(
        error_type="E" * 300,
        message="\U0001f600" * 2 * MAX_TEXT,
        traceback="first" + "\U0001f600" * 2 * MAX_TEXT + "last",
        stage="buckets",
        bucket=1,
        tensors=tuple(f"{i}." + "\U0001f600" * 100_000 for i in range(5000)),
    )
    failure = Failure.from_record(record, device_uuid="u", touched=True)
    assert decode_worker_message(encode(failure)) == failure
    assert failure.traceback.endswith("last")
    assert [name[:5] for name in (failure.tensors[0], failure.tensors[-1])] == [
        "0.\U0001f600\U0001f600\U0001f600",
        "4999.",
    ]
    assert len(failure.tensors) == 64
    assert failure.left_out == 5000 - 64
    told = replace(record, tensors=failure.tensors, left_out=failure.left_out).travelling()
    assert told.where().endswith("5000 in all)")


def test_text_that_is_no_unicode_travels_in_a_failure_and_an_abort() -> None:
    """Python's names of files in another encoding: an engine's error may quote one."""
    record = ErrorRecord(
        error_type="OSError", message="no \udcff file", traceback="\udc80", tensors=("\udc81",)
    )
    failure = decode_worker_message(encode(Failure.from_record(record, device_uuid="u", touched=False)))
    assert isinstance(failure, Failure)
    assert failure.message == "no \\udcff file"
    assert (failure.traceback, failure.tensors) == ("\\udc80", ("\\udc81",))
    abort = decode_server_message(encode(Abort.because("no \udcff file")))
    assert abort == Abort("no \\udcff file")


def test_a_failure_keeps_what_the_record_says() -> None:
    record = ErrorRecord(
        error_type="KeyError", message="'x'", stage="buckets", bucket=0, tensors=["a", "b"], traceback="T"
    )
    assert Failure.from_record(record, device_uuid="u", touched=True) == Failure(
        "buckets", "KeyError", "'x'", "T", "u", True, 0, ("a", "b")
    )


def begin(*buckets: BucketLayout, nbytes: int = 100, budget: float = 1.0) -> Begin:
    return Begin("s", "c", "v", SharedMemoryRing(nbytes=nbytes), buckets, budget)


def test_layouts_up_to_the_rings_end_are_accepted() -> None:
    full = TensorLayout("full", "uint8", (60,), 0, 60)
    last = TensorLayout("last", "uint8", (0,), 60, 0)
    check_layout(
        begin(BucketLayout(40, 60, (full, last)), BucketLayout(0, 100, ()), BucketLayout(100, 0, ()))
    )
    check_layout(begin(budget=0.0))
    check_layout(begin(budget=math.inf))


@pytest.mark.parametrize(
    "bucket",
    [
        BucketLayout(-1, 10, ()),
        BucketLayout(0, -1, ()),
        BucketLayout(0, 101, ()),
        BucketLayout(1, 100, ()),
        BucketLayout(101, 0, ()),
        BucketLayout(2**63, 2**63, ()),
        BucketLayout(-(2**62), 2**62, ()),
    ],
)
def test_a_bucket_outside_the_ring_is_refused(bucket: BucketLayout) -> None:
    with pytest.raises(ProtocolError, match="bucket 1 lies outside the ring of 100 bytes"):
        check_layout(begin(BucketLayout(0, 100, ()), bucket))


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(-1, 1), (0, -1), (0, 51), (1, 50), (51, 0), (50, 1), (-(2**62), 2**62)]
)
def test_a_tensor_outside_its_bucket_is_refused(offset: int, nbytes: int) -> None:
    """Although inside the ring: it would read another bucket's bytes."""
    good = TensorLayout("good", "uint8", (50,), 0, 50)
    bad = TensorLayout("bad", "uint8", (nbytes,), offset, nbytes)
    with pytest.raises(ProtocolError, match="tensor 'bad' lies outside bucket 1"):
        check_layout(begin(BucketLayout(0, 50, (good,)), BucketLayout(50, 50, (good, bad))))


@pytest.mark.parametrize("budget", [math.nan, -1.0, -math.inf])
def test_a_budget_that_is_no_duration_is_refused(budget: float) -> None:
    """No deadline made of it would ever pass, or all have."""
    with pytest.raises(ProtocolError, match="budget"):
        check_layout(begin(budget=budget))


def test_the_names_of_a_bucket_are_in_its_order() -> None:
    assert names_of(BEGIN.buckets[0]) == ["model.layers.0.weight", "scalar"]
    assert names_of(BEGIN.buckets[1]) == []


def test_a_message_that_the_other_side_would_drop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_MESSAGE_NBYTES", 100)
    with pytest.raises(ProtocolError, match=r"the Abort message of \d+ bytes is over 100"):
        encode(Abort.because("x" * 100))
