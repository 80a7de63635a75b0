"""SIGTERM, which is how launchers end their ranks, as soon as one has failed or at their own end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


@contextmanager
def ends_in_order() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """SIGTERM raises SystemExit meanwhile, so that what is open is closed; but what runs in the context that
    is given out comes to its end first. A second one changes nothing: it would break off the closing. In
    other threads than the main one nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield nullcontext
        return
    held, told = False, False

    def end(signum: int, frame: object) -> None:
        nonlocal told
        if told:
            return
        told = True
        if not held:
            raise SystemExit(128 + signum)

    @contextmanager
    def first_this() -> Iterator[None]:
        nonlocal held
        held = True
        try:
            yield
        finally:
            held = False
            if told:
                raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield first_this
    finally:
        signal.signal(signal.SIGTERM, before)
