"""The death or silence of one end is news to the other, at once and by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import ends_for_ipc_tests
import pytest
import zmq
from ends_for_ipc_tests import (
    PROMPT_SECONDS,
    TENSORS,
    UUID,
    RawServer,
    RawWorker,
    Receiver,
    Sender,
    WorkerProcess,
    open_rings,
    ring_maps,
    wait_for,
)

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import SharedRing
from ckpt_engine.errors import ConfigError, PeerLost, UpdateError, UpdateTimeout
from ckpt_engine.ipc import receiver

Context = zmq.Context[zmq.Socket[bytes]]


def test_a_killed_worker_is_named_at_once(context: Context, base: Path) -> None:
    process = WorkerProcess()
    try:
        with Sender(context, base) as sender:
            process.ask({UUID: sender.handle}, kind="run", bucket=1, action="exit")
            sender.begin()
            started = time.monotonic()
            with pytest.raises(PeerLost, match=rf"worker of device {UUID} \(pid {process.pid}\)") as caught:
                sender.move()
            assert time.monotonic() - started < PROMPT_SECONDS
            record = caught.value.record
            assert (record.device, record.stage, record.bucket) == (UUID, "buckets", 1)
            assert list(record.tensors) == ["b"]
            assert sender.channel.done == 0
            assert sender.channel.gone
            assert sender.channel.touched
            started = time.monotonic()
            assert sender.channel.abort("nobody is there to hear it")
            assert time.monotonic() - started < PROMPT_SECONDS
        assert list(base.iterdir()) == []
    finally:
        process.close()


def test_a_killed_parameter_server_ends_its_worker_at_once(context: Context, base: Path) -> None:
    command = [sys.executable, ends_for_ipc_tests.__file__, str(base)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        end = Receiver(context, server.stdout.readline().strip())
        wait_for(lambda: end.loaded, "the first bucket")
        server.send_signal(signal.SIGKILL)
        started = time.monotonic()
        error = end.error(PROMPT_SECONDS)
        assert time.monotonic() - started < PROMPT_SECONDS
        assert isinstance(error, PeerLost)
        assert "the parameter server died while this worker waited for bucket 1" in str(error)
        assert error.touched is True
        assert ring_maps() == []
    finally:
        server.kill()
        server.communicate()
    # What it left behind goes with the next one on the host.
    assert len(list(base.iterdir())) == 1
    with Sender(context, base) as sender:
        assert list(base.iterdir()) == [sender.directory.path]


def test_a_parameter_server_that_dies_before_it_looks_is_lost(context: Context, base: Path) -> None:
    """The kernel then says "connection reset", not "end of file"."""
    with RawServer(context, base) as server:
        end = Receiver(context, server.handle)
        server.hear()
        server.listener.close()
        error = end.error(PROMPT_SECONDS)
    assert isinstance(error, PeerLost)
    assert "the parameter server died while this worker waited for the update's plan" in str(error)
    assert error.touched is False


def test_a_parameter_server_that_dies_between_the_ring_and_the_plan_is_lost(
    context: Context, base: Path
) -> None:
    with RawServer(context, base) as server, Sender(context, base) as sender:
        end = Receiver(context, server.handle)
        server.meet()
        before = open_rings()
        server.give(sender.ring.descriptors())
        assert server.lifeline is not None
        server.lifeline.close()
        error = end.error(PROMPT_SECONDS)
        assert open_rings() == before
    assert isinstance(error, PeerLost)
    assert "waited for the update's plan" in str(error)
    assert len(ring_maps()) == 0


def test_a_worker_that_fails_and_dies_is_heard_and_gone(context: Context, base: Path) -> None:
    """Its end may be seen before its last message: it must not be waited for."""
    with Sender(context, base) as sender:
        raw = RawWorker(context, sender.handle)
        sender.until(lambda: sender.channel.connected, "Hello")
        raw.say(receiver.messages.Failure("buckets", "ValueError", "last words", "", UUID, True))
        assert raw.lifeline is not None
        raw.lifeline.close()
        # As if the reactor had been told of the end only.
        sender.reactor.remove(sender.channel._zmq)
        with pytest.raises(UpdateError, match="last words"):
            sender.until(lambda: False, "its failure")
        assert sender.channel.gone
        raw.close()


def test_a_worker_that_dies_right_after_its_hello_is_lost(context: Context, base: Path) -> None:
    """Sending to it fails then: that is the same news, not another error."""
    with Sender(context, base) as sender:
        raw = RawWorker(context, sender.handle)
        sender.until(lambda: sender.channel.connected and sender.channel._lifelines, "Hello")
        raw.close()
        with pytest.raises(PeerLost, match=rf"worker of device {UUID} \(pid {os.getpid()}\)"):
            sender.begin()


def test_a_worker_that_dies_before_its_hello_is_lost(context: Context, base: Path) -> None:
    """ZeroMQ sends in a thread of its own: a killed worker's hello may never have left it."""
    with Sender(context, base) as sender:
        raw = RawWorker(context, sender.handle, hello=False)
        sender.until(lambda: sender.channel._known, "its identity")
        raw.close()
        started = time.monotonic()
        with pytest.raises(PeerLost, match=rf"worker of device {UUID} \(pid {os.getpid()}\)") as caught:
            sender.begin()
        assert time.monotonic() - started < PROMPT_SECONDS
        assert caught.value.record.stage == "handshake"
        assert caught.value.record.bucket is None


@pytest.mark.parametrize(("freed", "stage"), [(False, "release"), (True, "post_hook")])
def test_a_lost_worker_s_stage_is_its_own(context: Context, base: Path, freed: bool, stage: str) -> None:
    with Sender(context, base) as sender:
        raw = RawWorker(context, sender.handle)
        raw.say(receiver.messages.Ready())
        sender.begin()
        sender.channel.announce(0)
        raw.say(receiver.messages.BucketDone(0))
        sender.until(lambda: sender.channel.done == 0, "BucketDone")
        sender.channel.finish()
        if freed:
            raw.say(receiver.messages.Released())
            sender.until(lambda: sender.channel.released, "Released")
            sender.channel.freed()
        raw.close()
        with pytest.raises(PeerLost) as caught:
            sender.until(lambda: False, "its end")
        assert (caught.value.record.stage, caught.value.record.bucket) == (stage, None)


def test_the_kernel_says_who_the_worker_is(context: Context, base: Path) -> None:
    with Sender(context, base) as sender:
        raw = RawWorker(context, sender.handle, hello=False)
        raw.say(receiver.messages.Hello(receiver.messages.PROTOCOL_VERSION, UUID, 1))
        sender.until(lambda: sender.channel.connected, "Hello")
        raw.close()
        with pytest.raises(PeerLost, match=rf"\(pid {os.getpid()}\)"):
            sender.until(lambda: False, "its end")


def test_a_silent_parameter_server_is_left_at_the_deadline(
    context: Context, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_HANDSHAKE_TIMEOUT", "0.1")
    monkeypatch.setattr(receiver, "DECISION_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(receiver, "LEAVE_SECONDS", 0.1)
    with RawServer(context, base) as server:
        error = Receiver(context, server.handle).error()
        assert isinstance(error, UpdateTimeout)
        assert "no answer from the parameter server while waiting for the update's plan" in str(error)
    with Sender(context, base) as sender:
        sender.plan = ends_for_ipc_tests.begin_of(TENSORS, budget=0.2)
        monkeypatch.setenv("CKPT_ENGINE_HANDSHAKE_TIMEOUT", "20")
        end = Receiver(context, sender.handle)
        sender.begin()
        error = end.error()
        assert isinstance(error, UpdateTimeout)
        assert "while waiting for bucket 0" in str(error)
        with pytest.raises(UpdateError, match="no answer from the parameter server"):
            sender.until(lambda: False, "its failure")


def test_a_parameter_server_that_shows_no_sign_of_life_is_left(
    context: Context, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stopped: its sockets stay open. Signs of life keep its worker however long it is silent."""
    monkeypatch.setattr(
        receiver, "load_settings", lambda: SimpleNamespace(handshake_timeout=20.0, stall_timeout=1.0)
    )
    with Sender(context, base) as sender:
        end = Receiver(context, sender.handle)
        sender.begin()
        alive, pause = Deadline.after(1.5), threading.Event()
        while not alive.passed:
            sender.channel.beat()
            pause.wait(0.05)
        assert end.thread.is_alive()
        started = time.monotonic()
        with pytest.raises(UpdateError, match="no answer from the parameter server"):
            sender.until(lambda: False, "its failure")
        assert time.monotonic() - started < PROMPT_SECONDS
        sender.channel.abort("it gave up")
        assert isinstance(end.error(), UpdateTimeout)


def test_a_worker_leaves_before_its_call_ends(context: Context, base: Path) -> None:
    """Though the parameter server is there, and would wait for longer."""
    with Sender(context, base) as sender:
        started = time.monotonic()
        end = Receiver(context, sender.handle, time_limit=2.0)
        sender.begin()
        sender.move(last=1)

        def never() -> bool:
            sender.channel.beat()
            return False

        with pytest.raises(UpdateError, match=r"a limit of 2 s, .* waited for bucket 1") as caught:
            sender.until(never, "its failure")
        assert time.monotonic() - started > 1
        assert caught.value.record.error_type == "UpdateTimeout"
        assert caught.value.touched
        sender.channel.abort("it gave up")
        error = end.error()
        assert isinstance(error, UpdateTimeout)
        assert error.touched is True
    # The plan may not come, and nobody may hear of that.
    with RawServer(context, base) as server:
        started = time.monotonic()
        error = Receiver(context, server.handle, time_limit=1.0).error()
        assert 0.7 < time.monotonic() - started < PROMPT_SECONDS
        assert "a limit of 1 s, which came while this worker waited for the update's plan" in str(error)


def test_a_slow_worker_leaves_before_its_call_ends(context: Context, base: Path) -> None:
    """Each bucket is there when it asks: it never waits."""
    limit = Deadline.after(1.0)

    def run(_: object) -> None:
        threading.Event().wait(limit.remaining)

    with Sender(context, base) as sender:
        end = Receiver(context, sender.handle, run=run, time_limit=1.0)
        sender.begin()
        sender.channel.announce(0)
        sender.channel.announce(1)
        with pytest.raises(UpdateError, match=r"a limit of 1 s, .* waited for bucket 1"):
            sender.until(lambda: False, "its failure")
        assert sender.channel.done == 0
        sender.channel.abort("it gave up")
        assert isinstance(end.error(), UpdateTimeout)


def test_a_limit_that_is_none_is_refused(context: Context) -> None:
    with pytest.raises(ConfigError, match="time_limit=0: must be a positive"):
        receiver.update_weights_from_ipc(context, "ipc:///x", None, run=lambda _: None, time_limit=0)


def test_a_reload_that_fails_on_the_device_is_reported_though_nobody_asks(
    context: Context, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameter server waits for an event that such a device will never record."""
    fails = threading.Event()

    def check(ring: SharedRing) -> None:
        if fails.is_set():
            raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(SharedRing, "check", check)
    with Sender(context, base) as sender:
        end = Receiver(context, sender.handle)
        sender.begin()
        sender.move(last=1)
        fails.set()

        def never() -> bool:
            sender.channel.beat()
            return False

        with pytest.raises(UpdateError, match="device-side assert triggered") as caught:
            sender.until(never, "its failure")
        assert caught.value.record.stage == "buckets"
        assert caught.value.touched
        sender.channel.abort("it failed")
        assert "device-side assert triggered" in str(end.error())


def test_a_ring_that_cannot_be_released_hides_no_failure(
    context: Context, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After some errors a device refuses every call."""
    close = SharedRing.close

    def refuse(ring: SharedRing) -> None:
        close(ring)
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("device-side assert triggered")

    def run(_: object) -> None:
        raise ValueError("the engine's own words")

    monkeypatch.setattr(SharedRing, "close", refuse)
    with Sender(context, base) as sender:
        end = Receiver(context, sender.handle, run=run)
        sender.begin()
        with pytest.raises(UpdateError, match="the engine's own words"):
            sender.move()
        sender.channel.abort("it failed")
        error = end.error()
    assert isinstance(error, UpdateError)
    assert (error.record.error_type, error.record.bucket, error.touched) == ("ValueError", 0, True)
    assert "could not be released" in caplog.text
