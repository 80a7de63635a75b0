"""Asks an inference engine, over HTTP, to run a method on its workers.

    request_inference_to_update("http://127.0.0.1:8000/collective_rpc", socket_paths)

The engine's answer is `{"results": [one per worker]}`, as vLLM's `/collective_rpc` gives it. Every
worker's result counts, not the HTTP status alone: an engine answers 200 also when a worker failed.

One connection per call: an update is minutes after the one before, and an engine that was restarted
in between would answer a kept connection with a reset. Proxies of the environment are not used: an
engine is addressed directly, and a proxy would see, and cut off, requests of minutes.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from ckpt_engine.errors import MAX_TEXT, ConfigError, EngineRequestError

MAX_ERROR_NBYTES = 4 * 1024
"""How much of an engine's answer an error message repeats."""
MAX_ANSWER_NBYTES = 64 * 1024 * 1024
"""Largest answer: hundreds of workers, each with a traceback."""
_SHOWN_WORKERS = 8
_CONNECT_TIMEOUT = 30.0
_PROBE_TIMEOUT = 5.0


def request_inference_to_update(
    url: str,
    socket_paths: Sequence[tuple[str, str]],
    timeout: float = 300.0,
    uds: str | None = None,
    *,
    api_key: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Has the engine's workers receive an update; returns once every one of them committed.

    Args:
        url: the engine's route, such as `http://127.0.0.1:8000/collective_rpc`.
        socket_paths: `(device_uuid, zmq_handle)` of every rank.
        timeout: seconds that the engine gives its workers; the HTTP request waits slightly longer.
        uds: path of the Unix socket to speak over; the host in `url` then only fills the Host header.
        api_key: sent as the bearer token, where the engine asks for one.
        options: further keyword arguments of the workers' method.

    Raises:
        EngineRequestError: not reached, refused, or a worker did not commit (with its traceback).
    """
    handles = [[uuid, handle] for uuid, handle in socket_paths]
    method = "update_weights_from_ipc"
    results = call_engine(url, method, [handles], timeout, uds, api_key=api_key, kwargs=options)
    check_statuses(results, socket_paths, _where(url, uds))


def check_statuses(results: Sequence[Any], socket_paths: Sequence[tuple[str, str]], where: str) -> None:
    """Raises EngineRequestError unless every worker committed this very update.

    Args:
        results: what each worker's method returned.
        where: the engine, in words.
    """
    if not results:
        raise EngineRequestError(f"{where} ran the update on no worker: its list of results is empty")
    asked = dict(socket_paths)
    problems = [
        (index, problem)
        for index, result in enumerate(results)
        if (problem := _problem_of(index, result, asked)) is not None
    ]
    if problems:
        shown = [problem for _, problem in problems[:_SHOWN_WORKERS]]
        if len(problems) > len(shown):
            shown.append(f"workers {[index for index, _ in problems[_SHOWN_WORKERS:]]} failed as well")
        raise EngineRequestError(
            f"{len(problems)} of {len(results)} workers of {where} did not commit the update\n"
            + "\n".join(shown)
        )


def call_engine(
    url: str,
    method: str,
    args: Sequence[Any] = (),
    timeout: float = 300.0,
    uds: str | None = None,
    *,
    api_key: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[Any]:
    """POSTs `{"method", "args", "timeout"}`, and `kwargs` if any; the answer's `results`, one per worker.

    Args:
        timeout: seconds, sent to the engine; the HTTP request waits slightly longer (5 %, 1 to 10 s),
            so that the engine's own account of a timeout arrives.

    Raises:
        EngineRequestError: unreachable, too late, an error status, or an answer of another form.
    """
    if not (math.isfinite(timeout) and timeout > 0):
        raise ConfigError(f"timeout={timeout!r}: give a finite number of seconds above 0")
    deadline = timeout + min(10.0, max(1.0, 0.05 * timeout))
    where = _where(url, uds)
    request = {"method": method, "args": list(args), "timeout": timeout}
    if kwargs:
        request["kwargs"] = dict(kwargs)
    try:
        body = json.dumps(request, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"arguments of {method} are not JSON: {error}") from None
    answer = _post(url, body.encode(), deadline, uds, api_key, method)
    document = _decoded(answer, where, method)
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, list):
        raise EngineRequestError(
            f"{where} answered {method} with HTTP 200 but no list of results: {_text(answer)}"
        )
    return results


def post_to_engine(
    url: str,
    timeout: float,
    uds: str | None = None,
    *,
    body: Mapping[str, Any] | None = None,
    api_key: str | None = None,
) -> object:
    """POSTs `body`, or nothing, to one of the engine's routes; its JSON answer, or None.

    Raises:
        EngineRequestError: unreachable, too late, an error status, or an answer that is not JSON.
    """
    name = httpx.URL(url).path
    encoded = json.dumps(body).encode() if body is not None else b""
    answer = _post(url, encoded, timeout, uds, api_key, name)
    return _decoded(answer, _where(url, uds), name) if answer.strip() else None


def _post(url: str, body: bytes, timeout: float, uds: str | None, api_key: str | None, name: str) -> bytes:
    """The body of a successful answer. Raises EngineRequestError, with the request's `name`, else."""
    where = _where(url, uds)
    try:
        status, answer = _exchange(
            "POST", url, timeout, uds, body=body, limit=MAX_ANSWER_NBYTES, api_key=api_key
        )
    except (httpx.TimeoutException, TimeoutError) as error:
        message = f"{where} did not answer {name} within {timeout:g} s ({_name(error)})"
        raise EngineRequestError(message) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise EngineRequestError(f"{where} could not be asked to run {name}: {_name(error)}") from None
    if not 200 <= status < 300:
        raise EngineRequestError(f"{where} answered {name} with HTTP {status}: {_error_text(answer)}")
    return answer


def _decoded(answer: bytes, where: str, name: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        raise EngineRequestError(
            f"{where} answered {name} with HTTP 200 and something that is not JSON: {_text(answer)}"
        ) from None


def request_timeout(timeout: float) -> float:
    """Seconds for the engine's RPC within an update of `timeout`.

    Deadlines nest: the HTTP request waits up to 10 s longer than the RPC, and must end before the update.
    """
    return timeout - min(20.0, timeout / 4)


def worker_time_limit(timeout: float) -> float:
    """Seconds for a worker's call within the engine's RPC of `timeout`: some engines lose the order of their
    replies for good where one comes after the RPC's end."""
    return timeout - min(5.0, timeout / 20)


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine answered: any status; `body`: at most MAX_ANSWER_NBYTES of it."""

    status: int
    body: bytes

    @property
    def text(self) -> str:
        """For an error message: the message and traceback of a JSON error body, else the body itself."""
        return _error_text(self.body)


def ask_engine(
    method: str,
    url: str,
    timeout: float,
    uds: str | None = None,
    *,
    body: Mapping[str, Any] | None = None,
    api_key: str | None = None,
) -> Answer:
    """One request to one of the engine's routes, for engines whose routes are their own.

    Args:
        timeout: seconds.
        body: sent as JSON.
        api_key: sent as `Authorization: Bearer`.

    Raises:
        ConfigError: the address is none, or `timeout` no number of seconds; no wait will mend either.
        EngineRequestError: no answer.
    """
    if not (math.isfinite(timeout) and timeout > 0):
        raise ConfigError(f"timeout={timeout!r}: give a finite number of seconds above 0")
    encoded = json.dumps(body).encode() if body is not None else b""
    where = _where(url, uds)
    try:
        status, answer = _exchange(
            method, url, timeout, uds, body=encoded, limit=MAX_ANSWER_NBYTES, api_key=api_key
        )
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ConfigError(f"{where} is not an address: {_name(error)}") from None
    except (httpx.TimeoutException, TimeoutError) as error:
        raise EngineRequestError(f"{where} did not answer within {timeout:g} s ({_name(error)})") from None
    except (httpx.HTTPError, OSError) as error:
        raise EngineRequestError(f"{where} could not be asked: {_name(error)}") from None
    return Answer(status, answer)


def wait_until_healthy(endpoint: str, timeout: float, uds: str | None = None, path: str = "/health") -> None:
    """Polls `endpoint + path` until it answers with a 2xx status, or that its weights are incomplete: then it
    lives, and waits for an update.

    Raises:
        EngineRequestError: still not after `timeout` seconds; the message has the last answer.
    """
    url = endpoint.rstrip("/") + path
    deadline = time.monotonic() + timeout
    pause = 0.05
    last, asked = "it was not asked", False
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            status, answer = _exchange(
                "GET", url, min(remaining, _PROBE_TIMEOUT), uds, limit=MAX_ERROR_NBYTES
            )
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            # No wait will mend the address.
            raise EngineRequestError(f"{_where(url, uds)} is not an address: {_name(error)}") from None
        except (httpx.HTTPError, OSError) as error:
            # A poll that our own deadline cut short tells less than the answer before it.
            cut_short = remaining < _PROBE_TIMEOUT and isinstance(
                error, httpx.TimeoutException | TimeoutError
            )
            if not (cut_short and asked):
                last = _name(error)
            asked = True
        else:
            asked = True
            if 200 <= status < 300 or (status == 503 and _is_incomplete(answer)):
                return
            last = f"HTTP {status}: {_text(answer)}"
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(1.0, 2 * pause)
    raise EngineRequestError(f"{_where(url, uds)} is not healthy after {timeout:g} s; last answer: {last}")


def _is_incomplete(answer: bytes) -> bool:
    try:
        told = json.loads(answer)
    except ValueError:
        return False
    return isinstance(told, dict) and told.get("weights") == "incomplete"


def _exchange(
    method: str,
    url: str,
    timeout: float,
    uds: str | None,
    *,
    body: bytes = b"",
    limit: int,
    api_key: str | None = None,
) -> tuple[int, bytes]:
    """One request on a connection of its own: the status and at most `limit` bytes of the body."""
    deadline = time.monotonic() + timeout
    headers = {"Connection": "close", "Accept": "application/json", "Accept-Encoding": "identity"}
    if body:
        headers["Content-Type"] = "application/json"
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    if uds is not None:
        # httpcore leaks the Unix socket of a connection that fails (a ResourceWarning, later on).
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(min(timeout, _CONNECT_TIMEOUT))
            probe.connect(uds)
    limits = httpx.Timeout(timeout, connect=min(timeout, _CONNECT_TIMEOUT))
    # A transport given by hand also switches the environment's proxies off.
    transport = httpx.HTTPTransport(uds=uds)
    with (
        httpx.Client(transport=transport, timeout=limits) as client,
        client.stream(method, url, content=body, headers=headers) as response,
    ):
        parts: list[bytes] = []
        nbytes = 0
        for part in response.iter_bytes():
            parts.append(part)
            nbytes += len(part)
            if nbytes >= limit:
                break
            # httpx limits each read, not their sum: an answer that drips would never time out.
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout(f"the answer was still coming after {timeout:g} s")
        return response.status_code, b"".join(parts)[:limit]


def _problem_of(index: int, result: object, asked: Mapping[str, str]) -> str | None:
    """What is wrong with a worker's result; None: it counts as success.

    Engines turn a method's None into null or "None"; ours return a status dict (ipc.receiver).

    Args:
        asked: the handle of each device in this call. An engine whose replies got out of step answers
            with the status of an earlier call, which has that one's handle.
    """
    if result is None or result == "None":
        return None
    if not isinstance(result, Mapping):
        return f"worker {index} answered {_cut(str(result))}"
    device, handle = result.get("device"), result.get("handle")
    if handle is not None and asked.get(str(device)) != handle:
        return (
            f"worker {index} on device {device or 'unknown'} answered an earlier call (its handle is "
            f"{_cut(str(handle))}): the engine's replies are out of step for good, restart it"
        )
    if result.get("outcome") == "committed":
        return None
    problem = (
        f"worker {index} on device {result.get('device') or 'unknown'}: "
        f"{result.get('outcome') or 'no outcome'}: {_cut(str(result.get('error') or 'no error given'))}"
    )
    if result.get("traceback"):
        text = str(result["traceback"])[-MAX_TEXT:].rstrip()
        problem += f"\n--- traceback of worker {index} ---\n{text}"
    return problem


def _error_text(answer: bytes) -> str:
    """The message and traceback of a JSON error body, else the body itself."""
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        return _text(answer)
    if not isinstance(document, dict):
        return _text(answer)
    # OpenAI-style servers nest the message; ours and FastAPI's do not.
    inner = document.get("error")
    fields = inner if isinstance(inner, dict) else document
    message = next((fields[key] for key in ("error", "message", "detail") if fields.get(key)), None)
    if message is None:
        return _text(answer)
    text = _cut(message if isinstance(message, str) else json.dumps(message))
    remote = fields.get("traceback") or document.get("traceback")
    if remote:
        # The end of a traceback tells more than its beginning.
        text += f"\n--- traceback in the engine ---\n{str(remote)[-MAX_ERROR_NBYTES:].rstrip()}"
    return text


def _text(answer: bytes) -> str:
    return _cut(answer[: 2 * MAX_ERROR_NBYTES].decode("utf-8", "replace").strip()) or "an empty body"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_ERROR_NBYTES else text[:MAX_ERROR_NBYTES] + " [...]"


def _where(url: str, uds: str | None) -> str:
    return f"engine at {url}" + (f" (Unix socket {uds})" if uds else "")


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
