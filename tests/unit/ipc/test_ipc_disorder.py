"""Messages out of turn, and plans that contradict themselves, are errors on both ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
from ends_for_ipc_tests import (
    SLOT_NBYTES,
    TENSORS,
    UUID,
    RawServer,
    RawWorker,
    Receiver,
    Sender,
    begin_of,
    open_sockets_and_rings,
    ring_maps,
)

from ckpt_engine.devices import SharedRing
from ckpt_engine.devices.handles import SharedMemoryRing
from ckpt_engine.errors import ProtocolError, UpdateError
from ckpt_engine.ipc import messages
from ckpt_engine.ipc.messages import (
    Abort,
    Begin,
    BucketDone,
    BucketLayout,
    BucketReady,
    Commit,
    Finish,
    Finished,
    Freed,
    Goodbye,
    Hello,
    Ready,
    Released,
    StillHere,
    TensorLayout,
)

Context = zmq.Context[zmq.Socket[bytes]]
HELLO = Hello(messages.PROTOCOL_VERSION, UUID, 1)

# What a worker says out of turn. Each step of the true order is a name; the false message follows it.

STEPS = ("hello", "begin", "announced", "done", "finish", "released", "freed", "finished")


def walk_to(step: str, sender: Sender, raw: RawWorker) -> None:
    """The true order, up to and including `step`."""
    channel = sender.channel
    actions: dict[str, Callable[[], Any]] = {
        "hello": lambda: sender.until(lambda: channel.connected, "Hello"),
        "announced": lambda: channel.announce(0),
        "done": lambda: (raw.say(BucketDone(0)), sender.until(lambda: channel.done == 0, "BucketDone")),
        "finish": channel.finish,
        "released": lambda: (raw.say(Released()), sender.until(lambda: channel.released, "Released")),
        "freed": channel.freed,
        "finished": lambda: (raw.say(Finished()), sender.until(lambda: channel.finished, "Finished")),
    }

    def begin() -> None:
        channel.begin(sender.plan, sender.ring)
        sender.until(lambda: bool(raw.zmq.poll(0)), "Begin")
        raw.say(Ready())
        sender.until(lambda: channel.ready, "Ready")

    for name in STEPS[: STEPS.index(step) + 1]:
        (begin if name == "begin" else actions[name])()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("hello", HELLO),
        ("hello", Ready()),
        ("hello", BucketDone(0)),
        ("hello", Goodbye()),
        ("begin", Ready()),
        ("begin", BucketDone(0)),
        ("begin", BucketDone(-1)),
        ("begin", Released()),
        ("begin", Goodbye()),
        ("announced", BucketDone(1)),
        ("announced", Finished()),
        ("done", HELLO),
        ("done", BucketDone(0)),
        ("done", BucketDone(1)),
        ("done", Released()),
        ("finish", Finished()),
        ("finish", Goodbye()),
        ("released", Released()),
        ("released", BucketDone(1)),
        ("released", Goodbye()),
        ("released", Finished()),
        ("freed", Released()),
        ("freed", Goodbye()),
        ("finished", Finished()),
        ("finished", Goodbye()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_workers_message_out_of_turn_is_an_error(
    context: Context, base: Path, step: str, message: messages.WorkerMessage
) -> None:
    with Sender(context, base) as sender:
        raw = RawWorker(context, sender.handle)
        walk_to(step, sender, raw)
        channel = sender.channel
        before = (channel.ready, channel.done, channel.released, channel.finished, channel.gone)
        raw.say(message)
        with pytest.raises(ProtocolError, match=r"out of turn|two workers"):
            sender.until(lambda: False, "its refusal")
        after = (channel.ready, channel.done, channel.released, channel.finished, channel.gone)
        assert after == before, "a refused message must change nothing"
        raw.close()


def test_a_worker_of_another_protocol_version_is_told_so(context: Context, base: Path) -> None:
    with Sender(context, base) as sender:
        raw = RawWorker(context, sender.handle, hello=False)
        raw.say(Hello(messages.PROTOCOL_VERSION + 1, UUID, 1))
        with pytest.raises(
            ProtocolError, match=r"speaks protocol \d+, this parameter server \d+: install the same"
        ):
            sender.until(lambda: False, "its refusal")
        sender.channel.abort("install the same ckpt-engine on both sides")
        assert raw.hear() == Abort("install the same ckpt-engine on both sides")
        raw.close()


@pytest.mark.parametrize("frames", [[b"\x99garbage"], [b""], [messages.encode(Ready()), b"more"]])
def test_what_a_worker_garbles_is_an_error(context: Context, base: Path, frames: list[bytes]) -> None:
    """Whoever has a lifeline was accepted as a worker: dropping its words would only delay the error."""
    for hello in (True, False):
        with Sender(context, base) as sender:
            raw = RawWorker(context, sender.handle, hello=hello)
            raw.zmq.send_multipart(frames)
            with pytest.raises(ProtocolError, match=r"not a worker's message|3 frames"):
                sender.until(lambda: False, "its refusal")
            raw.close()


def test_events_for_a_ring_that_has_none_are_refused(context: Context, base: Path) -> None:
    with Sender(context, base) as sender:
        raw = RawWorker(context, sender.handle)
        walk_to("hello", sender, raw)
        sender.channel.begin(sender.plan, sender.ring)
        raw.say(Ready((b"x" * 64,)))
        with pytest.raises(ProtocolError, match="events of a device with streams"):
            sender.until(lambda: False, "its refusal")
        assert not sender.channel.ready
        raw.close()


def test_a_second_worker_is_refused(context: Context, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines with one device UUID: both would load, and only one be waited for."""
    with Sender(context, base) as sender:
        first, second = RawWorker(context, sender.handle), RawWorker(context, sender.handle)
        with pytest.raises(ProtocolError, match=f"two workers connected to the handle of device {UUID}"):
            sender.until(lambda: False, "its refusal")
        monkeypatch.setattr("ckpt_engine.ipc.sender.GOODBYE_SECONDS", 0.1)
        assert not sender.channel.abort("two workers"), "neither has left its loop"
        assert first.hear() == second.hear() == Abort("two workers")
        first.close()
        second.close()


# What a parameter server says out of turn.


def answer(server: RawServer, ring: SharedRing, *said: messages.ServerMessage | bytes) -> messages.Failure:
    """Says all of it and returns what the worker says in the end."""
    server.meet()
    server.give(ring.descriptors())
    server.say(*said)
    while not isinstance(heard := server.hear(), messages.Failure):
        assert isinstance(heard, Ready | BucketDone | Released | Finished)
    server.say(Abort("enough"))
    return heard


PLAN = begin_of(TENSORS)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ([BucketReady(0)], "got BucketReady while waiting for the update's plan"),
        ([Finish()], "got Finish while waiting for the update's plan"),
        ([Commit("1")], "got Commit while waiting for the update's plan"),
        ([PLAN, PLAN], "got Begin while waiting for bucket 0"),
        ([PLAN, BucketReady(1)], "bucket 1 was announced in place of 0"),
        ([PLAN, BucketReady(0), BucketReady(0)], "bucket 0 was announced in place of 1"),
        ([PLAN, BucketReady(0), Finish()], "got Finish while waiting for bucket 1"),
        ([PLAN, Commit("1")], "got Commit while waiting for bucket 0"),
        ([begin_of({}), BucketReady(0)], "got BucketReady while waiting for the end of the buckets"),
        ([begin_of({}), Finish(), Commit("1")], "got Commit while waiting for the ring's memory to be freed"),
        ([begin_of({}), Finish(), Freed(), Freed()], "got Freed while waiting for the decision of all ranks"),
        ([PLAN, StillHere(), Freed()], "got Freed while waiting for bucket 0"),
        ([b""], "not a parameter server's message"),
        ([b"\x91\xa4Nope"], "not a parameter server's message"),
        ([PLAN, b"\xc1" * 1000], "not a parameter server's message"),
    ],
)
def test_a_parameter_servers_message_out_of_turn_is_an_error(
    context: Context, base: Path, said: list[messages.ServerMessage | bytes], text: str
) -> None:
    ring = SharedRing.create(2 * SLOT_NBYTES)
    with RawServer(context, base) as server:
        end = Receiver(context, server.handle)
        failure = answer(server, ring, *said)
        assert failure.error_type == "ProtocolError"
        assert text in failure.message
        error = end.error()
    assert isinstance(error, UpdateError)
    assert text in str(error)
    assert error.touched is failure.touched is (said[:2] == [PLAN, BucketReady(0)])
    ring.close()
    assert ring_maps() == []


def test_an_aborted_worker_says_goodbye(context: Context, base: Path) -> None:
    """Its parameter server waits for that; its death would be another error."""
    ring = SharedRing.create(2 * SLOT_NBYTES)
    with RawServer(context, base) as server:
        end = Receiver(context, server.handle)
        server.meet()
        server.give(ring.descriptors())
        server.say(PLAN, Abort("rank 5 died"))
        assert (server.hear(), server.hear()) == (Ready(), Goodbye())
        assert "rank 5 died" in str(end.error())
    ring.close()


def lying(bucket: BucketLayout, nbytes: int = 2 * SLOT_NBYTES) -> Begin:
    return Begin("s", "c", "v", SharedMemoryRing(nbytes=nbytes), (bucket,), 60.0)


@pytest.mark.parametrize(
    ("begin", "error_type", "text"),
    [
        (lying(BucketLayout(SLOT_NBYTES, SLOT_NBYTES + 1, ())), "ProtocolError", "outside the ring"),
        (
            lying(BucketLayout(0, 8, (TensorLayout("t", "uint8", (9,), 0, 9),))),
            "ProtocolError",
            "'t' lies out",
        ),
        (lying(BucketLayout(0, 8, ()), SLOT_NBYTES), "ProtocolError", "not a memfd of 65536 bytes"),
        (lying(BucketLayout(0, 8, (TensorLayout("t", "uint8", (9,), 0, 8),))), "ProtocolError", "no uint8"),
        (
            lying(BucketLayout(0, 8, (TensorLayout("t", "float32", (3,), 0, 7),))),
            "ProtocolError",
            "no float32",
        ),
        (
            lying(BucketLayout(0, 8, (TensorLayout("t", "float32", (1,), 2, 4),))),
            "ProtocolError",
            "at byte 2",
        ),
        (
            lying(BucketLayout(0, 8, (TensorLayout("t", "uint8", (-2, -4), 0, 8),))),
            "ProtocolError",
            "(-2, -4)",
        ),
        (lying(BucketLayout(0, 8, (TensorLayout("t", "load", (8,), 0, 8),))), "ProtocolError", "'load'"),
        (lying(BucketLayout(0, 8, (TensorLayout("t", "__x", (8,), 0, 8),))), "ProtocolError", "'__x'"),
    ],
)
def test_a_plan_that_contradicts_itself_touches_nothing(
    context: Context, base: Path, begin: Begin, error_type: str, text: str
) -> None:
    ring = SharedRing.create(2 * SLOT_NBYTES)
    with RawServer(context, base) as server:
        end = Receiver(context, server.handle)
        failure = answer(server, ring, begin, BucketReady(0))
        assert (failure.error_type, failure.touched) == (error_type, False)
        assert text in failure.message
        error = end.error()
    assert isinstance(error, UpdateError)
    assert end.loaded == {}
    ring.close()
    assert ring_maps() == []


@pytest.mark.parametrize("count", [0, 2])
def test_a_plan_with_another_number_of_descriptors_is_refused(
    context: Context, base: Path, count: int
) -> None:
    ring = SharedRing.create(2 * SLOT_NBYTES)
    before = open_sockets_and_rings()
    with RawServer(context, base) as server:
        end = Receiver(context, server.handle)
        server.meet()
        server.give(ring.descriptors() * count)
        server.say(PLAN)
        failure = server.hear()
        assert isinstance(failure, messages.Failure)
        assert failure.message == f"a shared-memory ring needs one descriptor, got {count}"
        server.say(Abort("enough"))
        assert "needs one descriptor" in str(end.error())
    context.term()
    assert open_sockets_and_rings() == before
    ring.close()
