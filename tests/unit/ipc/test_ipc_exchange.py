"""A parameter server's end and a worker's end against each other: in real processes, and in threads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ends_for_ipc_tests
import pytest
import torch
import zmq
from ends_for_ipc_tests import (
    PROMPT_SECONDS,
    SECONDS,
    TENSORS,
    UUID,
    RawServer,
    RawWorker,
    Receiver,
    Sender,
    WorkerProcess,
    open_sockets_and_rings,
    ring_maps,
)

from ckpt_engine.errors import ConfigError, PeerLost, ProtocolError, UpdateError
from ckpt_engine.ipc import receiver
from ckpt_engine.ipc.receiver import refuse_update, serve_update, update_weights_from_ipc
from tests.support.worker import digest

Context = zmq.Context[zmq.Socket[bytes]]
OTHER = {name: tensor + 1 for name, tensor in TENSORS.items()}


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    process = WorkerProcess()
    yield process
    process.close()


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in tensors.items()}


def test_a_worker_process_gets_every_bit_update_after_update(
    worker: WorkerProcess, context: Context, base: Path
) -> None:
    answers: list[dict[str, Any]] = []
    for tensors in (TENSORS, OTHER, TENSORS):
        with Sender(context, base, tensors) as sender:
            worker.ask({"CPU-there-9": "ipc:///nowhere", UUID: sender.handle})
            sender.update()
            assert sender.channel.worker_pid == worker.pid
            answers.append(worker.answer())
        assert answers[-1]["digests"] == digests(tensors)
        assert answers[-1]["status"] == {
            "outcome": "committed",
            "device": UUID,
            "handle": sender.handle,
            "version": "3",
            "error": None,
            "traceback": None,
            "touched": True,
            "tensors": 3,
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "verified": {},
            "not_compared": [],
        }
    assert answers[1]["threads"] == answers[2]["threads"]
    # ZeroMQ closes in its own thread: one connection may linger, but not one for each update.
    assert answers[2]["fds"] <= answers[0]["fds"] + 3
    assert list(base.iterdir()) == []


@pytest.mark.parametrize("bucket", [0, 2])
def test_an_error_of_run_names_bucket_tensors_and_traceback(
    worker: WorkerProcess, context: Context, base: Path, bucket: int
) -> None:
    with Sender(context, base) as sender:
        worker.ask({UUID: sender.handle}, kind="run", bucket=bucket, action="raise")
        with pytest.raises(UpdateError, match=f"RuntimeError: injected in bucket {bucket}") as caught:
            sender.update()
        record = caught.value.record
        assert (record.stage, record.bucket, record.tensors) == ("buckets", bucket, ("abc"[bucket],))
        assert (record.error_type, record.device) == ("RuntimeError", UUID)
        assert "tests/support/worker.py" in record.traceback
        assert caught.value.touched is True
        assert sender.channel.abort("the worker's run raised")
        status = worker.answer()["status"]
        assert (status["outcome"], status["touched"]) == ("failed", True)
        assert "injected" in status["error"]


def test_the_ring_is_unmapped_although_the_error_is_kept(context: Context, base: Path) -> None:
    """Its traceback leads to frames that held tensors in the ring."""

    def run(tensors: list[tuple[str, torch.Tensor]]) -> None:
        raise RuntimeError(f"cannot load {len(tensors)} tensors")

    with Sender(context, base) as sender:
        end = Receiver(context, sender.handle, run=run)
        with pytest.raises(UpdateError, match="cannot load 1 tensors"):
            sender.update()
        sender.channel.abort("the worker's run raised")
        error = end.error()
    assert ring_maps() == []
    assert isinstance(error.__cause__, RuntimeError)


def test_the_post_hook_runs_when_the_ring_is_released(context: Context, base: Path) -> None:
    """It may need the memory."""
    seen: list[int] = []
    with Sender(context, base) as sender:
        before = len(ring_maps())
        end = Receiver(context, sender.handle, post_hook=lambda: seen.append(len(ring_maps())))
        sender.update()
        end.join()
    assert seen == [before]


def test_prepare_sees_all_layouts_before_the_first_tensor(context: Context, base: Path) -> None:
    seen: list[str] = []
    with Sender(context, base) as sender:
        end = Receiver(
            context,
            sender.handle,
            prepare=lambda tensors: seen.extend(f"{t.name} {t.dtype} {list(t.shape)}" for t in tensors),
            run=lambda tensors: seen.extend(name for name, _ in tensors),
        )
        sender.update()
        end.join()
    assert seen == ["a int32 [30, 100]", "b bfloat16 [1000]", "c float32 []", "a", "b", "c"]


def test_what_prepare_raises_ends_the_update_untouched(context: Context, base: Path) -> None:
    def refuse(_: object) -> None:
        raise ValueError("no parameter 'c'")

    with Sender(context, base) as sender:
        end = Receiver(context, sender.handle, prepare=refuse)
        with pytest.raises(UpdateError, match="ValueError: no parameter 'c'") as caught:
            sender.begin()
        assert caught.value.record.stage == "handshake"
        sender.channel.abort("the worker refuses")
        error = end.error()
    assert isinstance(error, UpdateError)
    assert error.touched is False
    assert end.loaded == {}


def test_an_error_of_the_post_hook_comes_after_the_ring_is_released(
    worker: WorkerProcess, context: Context, base: Path
) -> None:
    with Sender(context, base) as sender:
        worker.ask({UUID: sender.handle}, kind="post_hook", action="raise")
        with pytest.raises(UpdateError, match="injected in post_hook") as caught:
            sender.update()
        assert sender.channel.released
        assert not sender.channel.finished
        assert (caught.value.record.stage, caught.value.record.bucket) == ("post_hook", None)
        assert sender.channel.abort("the post hook raised")
        assert worker.answer()["status"]["outcome"] == "failed"


def test_a_worker_without_a_handle_for_its_device_says_so(
    worker: WorkerProcess, context: Context, base: Path
) -> None:
    """Or its parameter server would wait for it in vain."""
    with Sender(context, base) as sender:
        worker.ask({"CPU-gone-7": f"ipc://{base}/gone", UUID: sender.handle}, kind="missing")
        with pytest.raises(UpdateError, match="ConfigError: no handle for device CPU-nowhere-0") as caught:
            sender.begin()
        assert f"serve CPU-gone-7, {UUID}" in str(caught.value)
        assert caught.value.record.device == "CPU-nowhere-0"
        assert caught.value.touched is False
        assert sender.channel.abort("no handle")
        status = worker.answer()["status"]
        assert (status["outcome"], status["touched"], status["version"]) == ("failed", False, None)
        assert "no handle for device CPU-nowhere-0" in status["error"]


def test_a_worker_that_does_not_know_its_device_says_so(context: Context, base: Path) -> None:
    error = ConfigError("no driver")
    with Sender(context, base) as sender, ThreadPoolExecutor(1) as pool:
        refusing = pool.submit(
            refuse_update, context, [["CPU-gone-7", "ipc://gone"], [UUID, sender.handle]], error
        )
        with pytest.raises(UpdateError, match="ConfigError: no driver") as caught:
            sender.begin()
        assert caught.value.touched is False
        assert sender.channel.abort("refused")
        status = refusing.result(SECONDS)
        assert (status["outcome"], status["touched"], status["device"]) == ("failed", False, "")
        assert "no driver" in status["error"]
    assert "TypeError" in refuse_update(context, 5, error)["error"]  # type: ignore[arg-type]


def test_a_closed_channel_leaves_no_socket_although_its_worker_stays(context: Context, base: Path) -> None:
    """The directory is the parameter server's, and outlives an update."""
    with Sender(context, base) as sender:
        raw = RawWorker(context, sender.handle)
        sender.until(lambda: sender.channel.connected, "Hello")
        assert len(list(sender.directory.path.iterdir())) == 3
        sender.channel.close()
        sender.channel.close()
        assert [path.name for path in sender.directory.path.iterdir()] == ["lock"]
        assert sender.reactor._callbacks == {}
        assert raw.lifeline is not None
        raw.lifeline.settimeout(SECONDS)
        assert raw.lifeline.recv(1) == b"", "its worker must learn of it"
        raw.close()


def test_a_worker_of_another_device_is_refused_by_name(context: Context, base: Path) -> None:
    with Sender(context, base) as sender:
        end = Receiver(context, sender.handle, device_uuid="CPU-here-1")
        text = f"worker of device CPU-here-1 connected to {UUID}'s handle"
        with pytest.raises(ProtocolError, match=text) as caught:
            sender.begin()
        sender.channel.abort(str(caught.value))
        error = end.error()
        assert isinstance(error, UpdateError)
        assert text in str(error)
        assert error.touched is False
        assert end.loaded == {}


def test_an_aborted_worker_says_why_and_goodbye(context: Context, base: Path) -> None:
    before = open_sockets_and_rings()
    with Sender(context, base) as sender:
        end = Receiver(context, sender.handle)
        sender.begin()
        sender.move(last=1)
        started = time.monotonic()
        assert sender.channel.abort("rank 7 is on \udcff fire")
        assert time.monotonic() - started < PROMPT_SECONDS
        error = end.error()
    assert isinstance(error, UpdateError)
    assert "rank 7 is on \\udcff fire" in str(error)
    assert error.touched is True
    assert ring_maps() == []
    context.term()
    assert open_sockets_and_rings() <= before


@pytest.mark.parametrize("lifeline_read_first", [True, False])
def test_a_worker_that_comes_after_the_abort_is_told(
    context: Context, base: Path, lifeline_read_first: bool
) -> None:
    with Sender(context, base) as sender:
        sender.channel.begin(sender.plan, sender.ring)
        assert sender.channel.abort("rank 3 died")
        if lifeline_read_first:
            raw = RawWorker(context, sender.handle, hello=False)
            sender.until(lambda: sender.channel._known, "its lifeline")
            raw.say(receiver.messages.Hello(receiver.messages.PROTOCOL_VERSION, UUID, 1))
        else:
            raw = RawWorker(context, sender.handle)
            assert sender.channel._zmq.poll(SECONDS * 1000)
        sender.until(lambda: sender.channel.connected, "Hello")
        assert raw.hear() == receiver.messages.Abort("rank 3 died")
        assert not raw.zmq.poll(0), "it must not get the plan"
        raw.close()


def test_an_update_without_end_is_waited_for(context: Context, base: Path) -> None:
    """`timeout=inf` reaches the worker as its budget."""
    with Sender(context, base) as sender:
        sender.plan = ends_for_ipc_tests.begin_of(TENSORS, budget=float("inf"))
        end = Receiver(context, sender.handle)
        sender.update()
        end.join()
        assert digests(end.loaded) == digests(TENSORS)


@pytest.mark.parametrize(
    ("handle", "kind", "text"),
    [
        ("/tmp/x", ConfigError, "expected an address such as 'ipc:///path'"),
        ("tcp://127.0.0.1:1", ConfigError, "expected an address such as 'ipc:///path'"),
        ("ipc:///tmp/ce-nobody", PeerLost, "nobody listens on ipc:///tmp/ce-nobody any more"),
        ("ipc:///tmp/" + "x" * 200, PeerLost, "nobody listens on"),
        ("ipc:///tmp/ce-\0", PeerLost, "nobody listens on"),
    ],
)
def test_a_handle_that_leads_nowhere_is_an_error_at_once(
    context: Context, handle: str, kind: type[Exception], text: str
) -> None:
    before = open_sockets_and_rings()
    with pytest.raises(kind, match=text):
        update_weights_from_ipc(context, handle, None, run=lambda _: None)
    status = serve_update(context, {UUID: handle}, UUID, None, run=lambda _: None)
    assert status["outcome"] == "failed"
    assert text in status["error"]
    assert status["touched"] is False
    assert open_sockets_and_rings() == before


def test_a_worker_whose_context_is_full_leaves_nothing_open(context: Context, base: Path) -> None:
    full: Context = zmq.Context()
    full.set(zmq.MAX_SOCKETS, 1)
    with RawServer(context, base) as server, full.socket(zmq.PAIR):
        before = open_sockets_and_rings()
        with pytest.raises(zmq.ZMQError, match="Too many open files"):
            update_weights_from_ipc(full, server.handle, None, run=lambda _: None)
        assert open_sockets_and_rings() == before
    full.term()
