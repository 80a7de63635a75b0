"""What a command changes of logging, undone: else the next test's lines go to a stream that is closed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ckpt_engine import logs


@contextmanager
def put_back() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in logs.PACKAGES]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
