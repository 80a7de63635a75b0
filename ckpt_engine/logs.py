"""Log lines of what a rank does: one for each stage, when it has ended, as text or as JSON.

The package only logs (`logging.getLogger("ckpt_engine...")`); who runs it says where to. `ckpt-engine` writes
to stderr, with `--verbose`; CKPT_ENGINE_LOG_FORMAT=json makes each line an object. A program of its own does

    from ckpt_engine import logs

    logs.to_stderr("json", logging.INFO)

or gives `JsonFormatter` to a handler of its own.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Literal

LogFormat = Literal["text", "json"]
PACKAGES = ("ckpt_engine", "ckpt_engine_vllm", "ckpt_engine_sglang", "ckpt_engine_ascend")
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FIELDS = "ckpt_engine"
"""The attribute of a log record that has a stage's fields."""


class JsonFormatter(logging.Formatter):
    """A line is an object: `time` (UTC), `level`, `logger`, `rank` (None: no rank's), `message`.

    Of a stage also `stage`, `checkpoint`, `version` (None: it has none yet), `seconds`, `outcome` (done or
    failed) and what else is known of it; `traceback`, where there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "rank": _rank(),
            "message": record.getMessage(),
        }
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def to_stderr(log_format: LogFormat, level: int) -> None:
    """Lines of this package go to stderr from now on, and nowhere else. Again: in place of the last call."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def tell_stage(
    logger: logging.Logger,
    stage: str,
    seconds: float,
    *,
    rank: int,
    checkpoint: str,
    version: str = "",
    error: BaseException | None = None,
    **known: Any,  # noqa: ANN401 - numbers and strings
) -> None:
    """The line of a stage that has ended; a failed one names what was raised.

    Args:
        known: what else is known of it, for JSON.
    """
    of_version = f" as version {version}" if version else ""
    how = "took" if error is None else f"failed ({type(error).__name__}) after"
    fields: Mapping[str, Any] = {
        "rank": rank,
        "stage": stage,
        "checkpoint": checkpoint,
        "version": version or None,
        "seconds": round(seconds, 6),
        "outcome": "done" if error is None else "failed",
        **({} if error is None else {"error_type": type(error).__name__}),
        **known,
    }
    message = "rank %d: %s of %r%s %s %.3f s"
    logger.info(message, rank, stage, checkpoint, of_version, how, seconds, extra={FIELDS: fields})


@contextmanager
def staged(logger: logging.Logger, stage: str, *, rank: int, checkpoint: str) -> Iterator[dict[str, Any]]:
    """Times what is inside, and tells it; what is put into the dict is known of it."""
    begun, known = time.monotonic(), dict[str, Any]()
    failed: BaseException | None = None
    try:
        yield known
    except BaseException as error:
        failed = error
        raise
    finally:
        seconds = time.monotonic() - begun
        tell_stage(logger, stage, seconds, rank=rank, checkpoint=checkpoint, error=failed, **known)


def _rank() -> int | None:
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else None
