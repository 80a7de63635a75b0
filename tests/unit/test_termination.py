"""SIGTERM ends a process in order: what is open is closed, whatever comes while it is."""

from __future__ import annotations

import signal
import threading

import pytest

from ckpt_engine.termination import ends_in_order


def test_a_second_sigterm_does_not_break_off_the_closing() -> None:
    closed = []
    with pytest.raises(SystemExit) as caught, ends_in_order():
        try:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("SIGTERM raised nothing")
        finally:
            signal.raise_signal(signal.SIGTERM)
            closed.append("all")
    assert caught.value.code == 128 + signal.SIGTERM
    assert closed == ["all"]


def test_what_comes_to_its_end_first_does() -> None:
    done = []
    with pytest.raises(SystemExit), ends_in_order() as first_this:
        with first_this():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            done.append("this")
        done.append("and no more")
    assert done == ["this"]


def test_the_handler_before_is_back_and_other_threads_change_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ends_in_order():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    found = []

    def elsewhere() -> None:
        with ends_in_order():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    assert found == [before]
