"""`req_func` in its thread: it is called once, its end wakes the update, and its failure is never lost."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Iterator

import pytest

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import PublishError, UpdateError
from ckpt_engine.update import request as request_module
from ckpt_engine.update.request import EngineRequest, SocketPaths

PATHS = [("GPU-0", "ipc://a"), ("GPU-1", "ipc://b")]
LONG = 30.0
"""Seconds: more than a loaded machine needs for a thread's turn."""


def ended(request: EngineRequest, seconds: float) -> bool:
    """Whether the update's reactor would be woken within `seconds`."""
    return bool(select.select([request.fileno()], [], [], seconds)[0])


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """A `req_func` may wait for it; the test's end lets it go."""
    event = threading.Event()
    yield event
    event.set()


def failing(_: SocketPaths) -> None:
    raise ValueError("the engine is unwell")


def test_it_is_called_once_in_a_thread_of_its_own_with_all_paths() -> None:
    calls = []
    request = EngineRequest(lambda paths: calls.append((paths, threading.current_thread().name)), PATHS)
    assert ended(request, LONG)
    request.check()
    request.finish(Deadline.after(LONG))
    request.abandon()
    request.close()
    assert calls == [(PATHS, "ckpt-engine-req-func")]


def test_nothing_wakes_the_update_while_it_runs(held: threading.Event) -> None:
    request = EngineRequest(lambda _: held.wait(LONG), PATHS)
    assert not ended(request, 0)
    request.check()
    held.set()
    assert ended(request, LONG)
    request.check()
    request.close()


def test_a_failure_wakes_the_update_and_ends_it() -> None:
    request = EngineRequest(failing, PATHS)
    assert ended(request, LONG)
    with pytest.raises(UpdateError) as caught:
        request.check()
    record = caught.value.record
    assert (record.stage, record.error_type) == ("request", "ValueError")
    assert "the engine is unwell" in record.message
    assert "in failing" in record.traceback
    request.close()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_not_even_an_exit_of_its_thread_is_lost(kind: type[BaseException]) -> None:
    def exits(_: SocketPaths) -> None:
        raise kind("gone")

    request = EngineRequest(exits, PATHS)
    assert ended(request, LONG)
    with pytest.raises(UpdateError, match=kind.__name__):
        request.check()
    request.close()


def test_a_failure_after_the_commit_says_that_the_weights_are_in_place() -> None:
    request = EngineRequest(failing, PATHS)
    with pytest.raises(PublishError, match="in place, but req_func failed: ValueError: the engine") as caught:
        request.finish(Deadline.after(LONG))
    assert isinstance(caught.value.__cause__, ValueError)
    request.close()


def test_one_that_does_not_return_after_the_commit_is_an_error_too(held: threading.Event) -> None:
    request = EngineRequest(lambda _: held.wait(LONG), PATHS)
    with pytest.raises(PublishError, match="in place, but req_func has not returned by the deadline"):
        request.finish(Deadline.after(0.01))
    held.set()
    assert ended(request, LONG)
    request.close()


def test_after_an_abort_one_that_runs_on_is_left_behind_with_a_warning(
    held: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(request_module, "ABANDON_SECONDS", 0.01)
    request = EngineRequest(lambda _: held.wait(LONG), PATHS)
    with caplog.at_level(logging.WARNING):
        request.abandon()
    assert "req_func is still running" in caplog.text
    held.set()
    assert ended(request, LONG)
    request.close()


def test_one_that_ends_after_the_update_was_closed_disturbs_nobody(held: threading.Event) -> None:
    """Its end of the pipe is written to by nobody, so that a number used again is never hit."""
    errors = []
    before = threading.excepthook
    threading.excepthook = lambda arguments: errors.append(arguments.exc_value)
    try:
        request = EngineRequest(lambda _: held.wait(LONG), PATHS)
        request.close()
        read, write = os.pipe()  # takes the number that was just closed
        held.set()
        request.finish(Deadline.after(LONG))
        os.close(write)
        assert os.read(read, 1) == b""
        os.close(read)
    finally:
        threading.excepthook = before
    assert errors == []


def test_it_leaves_no_descriptor_and_no_thread() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, threads = descriptors(), threading.active_count()
    for req_func in (failing, lambda _: None) * 5:
        request = EngineRequest(req_func, PATHS)
        request.abandon()
        request.close()
    assert (descriptors(), threading.active_count()) == (before, threads)
