"""vLLM's HTTP server, as an update needs it: ready, paused or not, asked to receive, its caches reset.

The routes are those of a server with VLLM_SERVER_DEV_MODE=1. vLLM asks for its API key only on routes such
as /v1: whoever reaches the port can use the others, so let nobody else reach it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ckpt_engine.errors import EngineRequestError
from ckpt_engine.server.engine_client import (
    call_engine,
    check_statuses,
    post_to_engine,
    request_inference_to_update,
    wait_until_healthy,
    worker_time_limit,
)
from ckpt_engine.termination import ends_in_order

logger = logging.getLogger(__name__)

SocketPaths = Sequence[tuple[str, str]]
ROUTE_SECONDS = 60.0
"""For a route that only tells the scheduler something."""
STATUS_CHARACTERS = 2000
"""How much of a worker's status an error repeats."""
WHOLE = "serving"
"""What a worker calls weights that are not a mixture of old and new ones."""


class PauseMode(str, Enum):
    """What becomes of the requests that are being answered when an update begins.

    none: they stop while the weights move and go on with the new ones. keep: the same, and new ones queue up
    on the server. wait: they are finished with the old weights first. abort: they end at once.
    """

    NONE = "none"
    KEEP = "keep"
    WAIT = "wait"
    ABORT = "abort"


@dataclass(frozen=True, kw_only=True)
class VllmServer:
    """vLLM at `endpoint`, a URL without a path.

    Args:
        uds: reach it on this Unix socket.
        partial, ignored: as of the worker extension.
        native: go through vLLM's weight-transfer routes, of a server with both
            `--weight-transfer-config '{"backend": "ckpt_engine"}'` and the worker extension. vLLM then knows
            the version of its weights (/weight_info).
    """

    endpoint: str
    uds: str | None = None
    api_key: str | None = None
    partial: bool = False
    ignored: tuple[str, ...] = ()
    pause: PauseMode = PauseMode.NONE
    native: bool = False

    def wait_until_ready(self, timeout: float) -> None:
        """Raises EngineRequestError: not healthy within `timeout` seconds."""
        wait_until_healthy(self.endpoint, timeout, self.uds)

    def receive(self, socket_paths: SocketPaths, timeout: float) -> None:
        """Has the workers receive an update; returns once each has committed it, and what was computed with
        the old weights is forgotten.

        Raises:
            EngineRequestError: not reached, refused, or a worker did not commit (with its traceback).
        """
        if self.native:
            self._end_open_session()
            self._receive_natively(socket_paths, timeout)
        else:
            self._receive(socket_paths, timeout)
        self.reset_prefix_cache()

    def _receive(self, socket_paths: SocketPaths, timeout: float) -> None:
        request_inference_to_update(
            f"{self._base}/collective_rpc",
            socket_paths,
            timeout,
            self.uds,
            api_key=self.api_key,
            options=self._options(timeout),
        )

    def _end_open_session(self) -> None:
        """Of an asker that died before it could: vLLM's workers would raise at the next start, which puts the
        replies of several out of step for good. So would a finish where a worker has no session."""
        statuses = self._statuses()
        are_open = [isinstance(status, dict) and status.get("session_open") is True for status in statuses]
        if not any(are_open):
            return
        if not all(are_open):
            ranks = [rank for rank, is_open in enumerate(are_open) if is_open]
            raise EngineRequestError(
                f"only workers {ranks} of {self.endpoint} are in a weight update of vLLM's "
                "(/start_weight_update), which no call to all of them can end: restart the engine"
            )
        logger.warning("%s: ending a weight update that was left open", self.endpoint)
        self._post("/finish_weight_update", ROUTE_SECONDS)

    def _receive_natively(self, socket_paths: SocketPaths, timeout: float) -> None:
        """vLLM's routes tell only that they were called; the workers' statuses tell the rest."""
        self._post("/start_weight_update", ROUTE_SECONDS)
        try:
            handles = {"zmq_handles": [list(pair) for pair in socket_paths]}
            self._post("/update_weights", timeout, {"update_info": handles | self._options(timeout)})
            last = self._last_updates()
            check_statuses(last, socket_paths, f"engine at {self.endpoint}")
        except BaseException:
            # vLLM would refuse the next start else. What failed is told, not that this did too.
            with suppress(EngineRequestError):
                self._post("/finish_weight_update", ROUTE_SECONDS)
            raise
        self._post("/finish_weight_update", ROUTE_SECONDS, {"weight_version": last[0]["version"]})

    def _statuses(self) -> list[Any]:
        """Each worker's `ckpt_engine_status`. Raises EngineRequestError."""
        return call_engine(
            f"{self._base}/collective_rpc",
            "ckpt_engine_status",
            timeout=ROUTE_SECONDS,
            uds=self.uds,
            api_key=self.api_key,
        )

    def _last_updates(self) -> list[Mapping[str, Any]]:
        """How each worker's last update ended. Raises EngineRequestError: one does not say."""
        found: list[Mapping[str, Any]] = []
        for index, status in enumerate(self._statuses()):
            last = status.get("last") if isinstance(status, Mapping) else None
            if not isinstance(last, Mapping) or "version" not in last:
                raise EngineRequestError(
                    f"worker {index} of the engine at {self.endpoint} does not say how the update ended; its "
                    f"status is {str(status)[:STATUS_CHARACTERS]}"
                )
            found.append(last)
        return found

    def _options(self, timeout: float) -> dict[str, object]:
        options: dict[str, object] = {"time_limit": worker_time_limit(timeout)}
        options |= {"partial": True} if self.partial else {}
        return options | ({"ignored": list(self.ignored)} if self.ignored else {})

    def reset_prefix_cache(self) -> None:
        """Forgets the attention state of prompts, also of requests that are being answered: it is computed
        again when they go on."""
        answer = self._post("/reset_prefix_cache?reset_running_requests=true", ROUTE_SECONDS)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineRequestError(
                f"{self.endpoint} could not reset its prefix cache: prompts that it has seen may be answered "
                "from the old weights"
            )

    @contextmanager
    def paused(self, timeout: float) -> Iterator[None]:
        """Pauses generation around an update, as `pause` says.

        After a failure, an interrupt too, the server is resumed only if every worker says that its weights
        are whole: the old ones, or the new ones. Else it stays paused.

        Args:
            timeout: seconds that requests in flight may take to end.
        """
        if self.pause is PauseMode.NONE:
            yield
            return
        with ends_in_order() as first_this:
            try:
                # vLLM takes no more requests from here on, also where the wait for those in flight fails.
                self._post(f"/pause?mode={self.pause.value}", timeout)
                yield
            except BaseException:
                with first_this():
                    self._resume_if_whole()
                raise
            with first_this():
                self._post("/resume", ROUTE_SECONDS)

    def _resume_if_whole(self) -> None:
        """After a failure, which counts more than whatever fails here."""
        try:
            statuses = self._statuses()
            weights = [each.get("weights") if isinstance(each, Mapping) else None for each in statuses]
            if not weights or any(each != WHOLE for each in weights):
                logger.warning(
                    "%s stays paused: its workers' weights are %s; a full update that succeeds mends them, "
                    "POST /resume then goes on",
                    self.endpoint,
                    ", ".join(str(each or "unknown") for each in weights) or "unknown",
                )
                return
            self._post("/resume", ROUTE_SECONDS)
        except EngineRequestError as error:
            logger.warning(
                "%s may stay paused, for its workers could not be asked or it could not be resumed: %s",
                self.endpoint,
                error,
            )

    def finish(self) -> None:
        """Nothing is left to do after the commit."""

    @property
    def _base(self) -> str:
        return self.endpoint.rstrip("/")

    def _post(self, path: str, timeout: float, body: Mapping[str, object] | None = None) -> object:
        return post_to_engine(f"{self._base}{path}", timeout, self.uds, body=body, api_key=self.api_key)
