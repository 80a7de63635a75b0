"""Asks an SGLang server over HTTP, in the words of every version that can update at all.

server = SglangServer("http://127.0.0.1:30000")
server.wait_until_serving(timeout=600)
ps.update("step-100", lambda paths: server.update(paths, weight_version="step-100"))
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_engine.errors import EngineRequestError
from ckpt_engine.server.engine_client import Answer, ask_engine
from ckpt_engine_sglang.options import with_options

_PROBE_SECONDS = 10.0
_FIRST_PROBE_SECONDS = 2.0
_TELL_SECONDS = 10.0
_HEALTH_SECONDS = 3.0
_INFO_SECONDS = 120.0
"""For what SGLang asks its schedulers, which answer between two steps."""
HTTP_UNAVAILABLE = 503
_REFUSED = (401, 403)
_MODEL_INFO = ("/model_info", "/get_model_info")
_SERVER_INFO = ("/server_info", "/get_server_info")
"""Newest first: SGLang renamed its routes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server says about itself; `worker_count`: its ranks, each on a device of its own;
    `attention_replicas`: groups of ranks whose attention is data parallel."""

    version: str
    worker_count: int
    replicas: int
    attention_replicas: int
    dummy: bool
    waits_for_weights: bool


@dataclass(slots=True)
class _Teller:
    """Says what is waited for, at once and then every 10 s, with the last answer."""

    what: str
    timeout: float
    tell: Callable[[str], object] | None
    _told: float | None = None

    def say(self, last: str) -> None:
        now = time.monotonic()
        if self.tell is not None and (self._told is None or now - self._told >= _TELL_SECONDS):
            self._told = now
            self.tell(f"waiting up to {self.timeout:g} s for {self.what}; last answer: {last}")


@dataclass(frozen=True, slots=True)
class SglangServer:
    """A running server.

    Args:
        endpoint: such as `http://127.0.0.1:30000`.
        uds: the Unix socket to speak over; the endpoint then only fills the Host header.
        api_key: the server's `--api-key`, or the only one that it has.
        admin_api_key: its `--admin-api-key` beside it: then SGLang takes one of them for some of its routes,
            and the other one for others.
    """

    endpoint: str
    uds: str | None = None
    api_key: str | None = None
    admin_api_key: str | None = None

    def update(
        self,
        socket_paths: Sequence[tuple[str, str]],
        timeout: float = 300.0,
        *,
        weight_version: str | None = None,
        flush_cache: bool = True,
        partial: bool = False,
        ignored: Sequence[str] = (),
    ) -> str:
        """Has the server's ranks receive an update; SGLang's message once all of them committed.

        Args:
            socket_paths: `(device_uuid, zmq_handle)` of the server's ranks.
            timeout: seconds.
            weight_version: what answers carry from then on. None: what they carry now, which is then wrong.
            flush_cache: also drop what SGLang computed with the old weights (its prefix cache).
            partial: modules that no tensor is sent for keep their weights.
            ignored: patterns (fnmatch) of tensors that the model need not know.

        Raises:
            EngineRequestError: not reached, refused, or not committed; with SGLang's own message.
        """
        handles = {uuid: with_options(handle, partial, ignored) for uuid, handle in socket_paths}
        body = {"zmq_handles": handles, "flush_cache": flush_cache, "weight_version": weight_version}
        answer = self._ask("POST", ("/update_weights_from_ipc",), timeout, body)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise EngineRequestError(f"{self._where()} did not update its weights: {answer!r}")
        return str(answer.get("message", ""))

    def wait_until_serving(self, timeout: float, tell: Callable[[str], object] | None = None) -> None:
        """Until the server can be asked to update.

        Args:
            tell: called with what is waited for, and the last answer: at once, then every 10 s.

        Its answers to /health or /ping tell nothing here: a server that waits for its first weights is not
        healthy in some versions, and always healthy in others. One that tells its model is far enough.

        Raises:
            EngineRequestError: not after `timeout` seconds, or it refuses to tell.
        """
        self._poll(_MODEL_INFO, timeout, _Teller(f"{self._where()} to serve", timeout, tell))

    def wait_until_ready(self, timeout: float, tell: Callable[[str], object] | None = None) -> None:
        """Until `is_ready`: after its first weights a server warms up.

        Args:
            tell: as of `wait_until_serving`.

        Raises:
            EngineRequestError: not after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        teller = _Teller(f"{self._where()} to get ready", timeout, tell)
        pause = 0.05
        while (reason := self._unready()) is not None:
            if time.monotonic() > deadline:
                raise EngineRequestError(
                    f"{self._where()} did not get ready within {timeout:g} s; last answer: {reason}"
                )
            teller.say(reason)
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(1.0, 2 * pause)

    def is_ready(self) -> bool:
        """Whether the server has started, and no longer waits for its first weights.

        SGLang 0.5.23 tells by /ping, which is always 200 in older versions. There /health is 503 at once
        while a server starts; one that has started generates a token for it, which takes long where requests
        are paused. One that cannot be asked, or drops the connection, is not ready.
        """
        return self._unready() is None

    def _unready(self) -> str | None:
        """Why it is not ready, as far as one can see; None: it is."""
        try:
            answer = self._send("GET", "/ping", _PROBE_SECONDS)
        except EngineRequestError as error:
            return str(error)  # or too busy to say so, as on a loaded host while it warms up
        if answer.status == HTTP_UNAVAILABLE:
            return f"/ping: HTTP {answer.status}"
        began = time.monotonic()
        try:
            answer = self._send("GET", "/health", _HEALTH_SECONDS)
        except EngineRequestError as error:
            return str(error) if time.monotonic() - began < _HEALTH_SECONDS else None
        return f"/health: HTTP {answer.status}" if answer.status == HTTP_UNAVAILABLE else None

    def weight_version(self) -> str:
        """What its answers carry; `default` before the first update."""
        answer = self._ask("GET", _MODEL_INFO, _INFO_SECONDS)
        return str(answer.get("weight_version", "")) if isinstance(answer, dict) else ""

    def info(self) -> ServerInfo:
        """Raises EngineRequestError where the server does not tell."""
        answer = self._ask("GET", _SERVER_INFO, _INFO_SECONDS)
        if not isinstance(answer, dict):
            raise EngineRequestError(f"{self._where()} told nothing of itself: {answer!r}")
        return ServerInfo(
            version=str(answer.get("version", "unknown")),
            worker_count=int(answer.get("tp_size", 1)) * int(answer.get("pp_size", 1)),
            replicas=int(answer.get("dp_size", 1)),
            attention_replicas=int(answer.get("attn_dp_size", 1)),  # before 0.5.22 they count as replicas
            dummy=answer.get("load_format") == "dummy",
            waits_for_weights=bool(answer.get("checkpoint_engine_wait_weights_before_ready", False)),
        )

    def checksums(self, timeout: float = 120.0) -> list[Any]:
        """Of the weights of each rank, as SGLang computes them: equal for equal weights and layouts.

        Raises:
            EngineRequestError: also where the server has no route for it.
        """
        answer = self._ask("POST", ("/weights_checker",), timeout, {"action": "checksum"})
        ranks = answer.get("ranks") if isinstance(answer, dict) else None
        if not isinstance(ranks, list) or not ranks:
            raise EngineRequestError(f"{self._where()} gave no checksums: {str(answer)[:400]}")
        return ranks

    # Requests

    def _poll(self, paths: Sequence[str], timeout: float, teller: _Teller) -> None:
        deadline = time.monotonic() + timeout
        pause, last, patience = 0.05, "it was not asked", _FIRST_PROBE_SECONDS
        while (remaining := deadline - time.monotonic()) > 0:
            for path in paths:
                try:
                    answer = self._send("GET", path, min(remaining, patience))
                except EngineRequestError as error:
                    # A look that our own deadline cut short tells less than the answer before it.
                    if not (remaining < patience and last.startswith("HTTP")):
                        last = str(error)
                    break
                if answer.status == 200:
                    return
                if answer.status in _REFUSED:
                    raise EngineRequestError(self._wants_a_key(answer.status))
                last = f"HTTP {answer.status}: {answer.text}"
                if answer.status != 404:
                    break
            teller.say(last)
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            pause, patience = min(1.0, 2 * pause), _PROBE_SECONDS
        raise EngineRequestError(f"{self._where()} did not serve within {timeout:g} s; last answer: {last}")

    def _ask(
        self, method: str, paths: Sequence[str], timeout: float, body: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - JSON
        """The first path's answer that is not 404."""
        for path in paths:
            answer = self._send(method, path, timeout, body)
            if answer.status != 404 or path == paths[-1]:
                break
        if answer.status in _REFUSED:
            raise EngineRequestError(f"{self._wants_a_key(answer.status)} for {path}")
        if not 200 <= answer.status < 300:
            raise EngineRequestError(
                f"{self._where()} answered {path} with HTTP {answer.status}: {answer.text}"
            )
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError):
            raise EngineRequestError(
                f"{self._where()} answered {path} with something that is not JSON: {answer.text}"
            ) from None

    def _send(self, method: str, path: str, timeout: float, body: dict[str, Any] | None = None) -> Answer:
        url = self.endpoint.rstrip("/") + path
        answer = ask_engine(method, url, timeout, self.uds, body=body, api_key=self.api_key)
        if answer.status in _REFUSED and self.admin_api_key is not None:
            return ask_engine(method, url, timeout, self.uds, body=body, api_key=self.admin_api_key)
        return answer

    def _wants_a_key(self, status: int) -> str:
        other = "another" if self.api_key or self.admin_api_key else "an"
        return f"{self._where()} wants {other} API key: HTTP {status}"

    def _where(self) -> str:
        return f"SGLang at {self.endpoint}" + (f" (Unix socket {self.uds})" if self.uds else "")
