"""`req_func`, run in a thread that is watched: its failure ends the update instead of being lost."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ErrorRecord, PublishError, UpdateError

logger = logging.getLogger(__name__)

SocketPaths = list[tuple[str, str]]
"""`[(device_uuid, zmq_handle), ...]` of all ranks, by rank."""

ABANDON_SECONDS = 5.0
"""How long an aborted update waits for `req_func` to notice (its engine's workers have left by then)."""


class EngineRequest:
    """One call of `req_func`."""

    def __init__(self, req_func: Callable[[SocketPaths], object], socket_paths: SocketPaths) -> None:
        self._error: BaseException | None = None
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(
            target=self._run, args=(req_func, socket_paths), name="ckpt-engine-req-func", daemon=True
        )
        self._thread.start()

    def _run(self, req_func: Callable[[SocketPaths], object], socket_paths: SocketPaths) -> None:
        try:
            req_func(socket_paths)
        except BaseException as error:  # noqa: BLE001 - raised again in the update's own thread
            self._error = error
        finally:
            # EOF is the news; nothing is written, so a closed reader is no error.
            os.close(self._write)

    def fileno(self) -> int:
        """Readable once the call has ended."""
        return self._read

    def check(self) -> None:
        """Raises UpdateError when the call has failed."""
        if self._error is not None:
            raise UpdateError(ErrorRecord.from_exception(self._error, stage="request"))

    def finish(self, deadline: Deadline) -> None:
        """After the commit: waits for the call's end.

        Raises:
            PublishError: it failed, or did not end by the deadline; the weights are in place.
        """
        self._thread.join(deadline.remaining)
        if self._thread.is_alive():
            raise PublishError("the weights are in place, but req_func has not returned by the deadline")
        if self._error is not None:
            raise PublishError(
                f"the weights are in place, but req_func failed: {type(self._error).__name__}: {self._error}"
            ) from self._error

    def abandon(self) -> None:
        """After an abort: gives the call a moment to end."""
        self._thread.join(ABANDON_SECONDS)
        if self._thread.is_alive():
            logger.warning("req_func is still running %.0f s after the abort; left behind", ABANDON_SECONDS)

    def close(self) -> None:
        os.close(self._read)
