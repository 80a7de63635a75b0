"""From an exception to an HTTP status and a JSON body. Source of the table: docs/architecture.md."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from typing import Any

from ckpt_engine.errors import (
    MAX_TEXT,
    CheckpointExistsError,
    CheckpointFormatError,
    CkptEngineError,
    ConfigError,
    EngineRequestError,
    HostMemoryError,
    OutcomeUnknown,
    PublishError,
    UnknownCheckpointError,
    UpdateError,
    UpdateTimeout,
)
from ckpt_engine.server.access import NotAllowedError
from ckpt_engine.server.api_models import ErrorBody


class RankBusy(CkptEngineError):
    """This rank is at another long operation: one at a time."""


class RankUnreachable(CkptEngineError):
    """Another rank's server did not answer, or not as one."""


class ServerStopping(CkptEngineError):
    """The server was told to end."""


class NothingRuns(CkptEngineError):
    """There is nothing that could be cancelled."""


class CannotCancel(CkptEngineError):
    """What runs cannot be ended by anybody."""


class Cancelled(CkptEngineError):
    """Somebody asked for that. `committed`: the weights were in place already."""

    def __init__(self, message: str, *, committed: bool = False) -> None:
        self.committed = committed
        super().__init__(message)


_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, 400),
    (NotAllowedError, 403),
    (CheckpointFormatError, 400),
    (UnknownCheckpointError, 404),
    (CheckpointExistsError, 409),
    (RankBusy, 409),
    (HostMemoryError, 507),
    (UpdateTimeout, 504),
    (EngineRequestError, 502),
    (RankUnreachable, 502),
    (ServerStopping, 503),
    (NothingRuns, 409),
    (Cancelled, 409),
    (CannotCancel, 501),
)
_STATUSES_OF_RECORDS = {"EngineRequestError": 502, "UpdateTimeout": 504, "HostMemoryError": 507}
"""An update fails on every rank with the record of what failed first: the cause decides."""


def status_of(error: BaseException) -> int:
    """The HTTP status; 500 for what the table does not know."""
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    if isinstance(error, UpdateError):
        return _STATUSES_OF_RECORDS.get(error.record.error_type, 500)
    return 500


def body_of(error: BaseException) -> ErrorBody:
    """The JSON body; an update's own record tells more than this process's stack."""
    if isinstance(error, UpdateError):
        return ErrorBody(
            error_type=type(error).__name__,
            message=error.describe(tracebacks=False),
            record=error.record.to_dict(),
            traceback=error.record.traceback,
            committed=None if isinstance(error, OutcomeUnknown) else False,
            restored=error.restored,
        )
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return ErrorBody(
        error_type=type(error).__name__,
        message=(str(error) or type(error).__name__)[:MAX_TEXT],
        traceback=text[-MAX_TEXT:],
        committed=isinstance(error, PublishError | Cancelled) and error.committed,
    )


def to_json(document: Mapping[str, Any]) -> bytes:
    """ASCII only: messages may hold names of files that are not UTF-8, which only escapes can carry."""
    return json.dumps(document).encode()
