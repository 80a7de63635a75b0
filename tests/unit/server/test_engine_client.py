"""The engine client against real local servers: every way an engine can fail to do as asked."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest

from ckpt_engine.errors import ConfigError, EngineRequestError
from ckpt_engine.server import engine_client
from ckpt_engine.server.engine_client import (
    MAX_ERROR_NBYTES,
    ask_engine,
    call_engine,
    post_to_engine,
    request_inference_to_update,
    wait_until_healthy,
)

PATHS = [("CPU-h-0", "ipc:///tmp/a"), ("CPU-h-1", "ipc:///tmp/b")]
COMMITTED = {"outcome": "committed", "device": "CPU-h-0", "version": "v1", "error": None, "traceback": None}
FAILED = {
    "outcome": "failed",
    "device": "CPU-h-1",
    "version": None,
    "error": "ValueError: no parameter 'lm_head.weight'",
    "traceback": "Traceback (most recent call last):\n  File 'worker.py'\nValueError: no parameter",
}


class _TcpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


class _UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class FakeEngine:
    """Answers every request with `status` and `body`, and keeps what it was sent."""

    def __init__(self) -> None:
        self.status = 200
        self.body = b""
        self.before_answer: Callable[[], None] = lambda: None
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.clients: set[Any] = set()

    def answer(self, document: object, status: int = 200) -> None:
        self.status, self.body = status, json.dumps(document).encode()

    @contextmanager
    def serve(self, uds: Path | None = None) -> Iterator[str]:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                engine.requests.append((self.command, self.path, headers, sent))
                engine.clients.add(self.connection.fileno())
                engine.before_answer()
                try:
                    self.send_response(engine.status)
                    self.send_header("Content-Length", str(len(engine.body)))
                    self.end_headers()
                    self.wfile.write(engine.body)
                except OSError:
                    self.close_connection = True

            do_GET = do_POST = handle_any

            def log_message(self, *_: object) -> None:
                pass

            def address_string(self) -> str:
                return "client"

        server: socketserver.BaseServer
        if uds is None:
            tcp = _TcpServer(("127.0.0.1", 0), Handler)
            server, address = tcp, f"http://127.0.0.1:{tcp.server_address[1]}"
        else:
            server, address = _UnixServer(str(uds), Handler), "http://localhost"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"{address}/collective_rpc"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with engine.serve() as address:
        yield address


@pytest.fixture
def short_dir() -> Iterator[Path]:
    # pytest's own directories may be longer than a Unix socket's path may be.
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def failure(url: str, timeout: float = 5.0, uds: str | None = None) -> str:
    with pytest.raises(EngineRequestError) as caught:
        request_inference_to_update(url, PATHS, timeout=timeout, uds=uds)
    return str(caught.value)


def test_posts_the_method_with_all_handles(engine: FakeEngine, url: str) -> None:
    engine.answer({"results": [COMMITTED, COMMITTED]})
    request_inference_to_update(url, PATHS, timeout=7)
    ((command, path, headers, body),) = engine.requests
    assert (command, path) == ("POST", "/collective_rpc")
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert json.loads(body) == {
        "method": "update_weights_from_ipc",
        "args": [[["CPU-h-0", "ipc:///tmp/a"], ["CPU-h-1", "ipc:///tmp/b"]]],
        "timeout": 7,
    }


@pytest.mark.parametrize("result", [None, "None", COMMITTED])
def test_a_method_without_a_result_counts_as_success(engine: FakeEngine, url: str, result: object) -> None:
    engine.answer({"results": [result]})
    request_inference_to_update(url, PATHS)


def test_over_a_unix_socket(engine: FakeEngine, short_dir: Path) -> None:
    engine.answer({"results": [COMMITTED]})
    uds = short_dir / "engine.sock"
    with engine.serve(uds) as url:
        request_inference_to_update(url, PATHS, uds=str(uds))
        wait_until_healthy("http://localhost", 5, uds=str(uds))
        engine.answer({"error": "unwell"}, 500)
        assert str(uds) in failure(url, uds=str(uds))
    assert [request[:2] for request in engine.requests[:2]] == [
        ("POST", "/collective_rpc"),
        ("GET", "/health"),
    ]


def test_the_environments_proxy_is_not_used(
    engine: FakeEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    engine.answer({"results": []})
    assert call_engine(url, "anything") == []


def test_a_failed_worker_is_named_with_its_traceback(engine: FakeEngine, url: str) -> None:
    engine.answer({"results": [COMMITTED, FAILED]})
    message = failure(url)
    assert "1 of 2 workers" in message
    assert "worker 1 on device CPU-h-1: failed: ValueError: no parameter 'lm_head.weight'" in message
    assert "File 'worker.py'" in message
    assert "worker 0" not in message


@pytest.mark.parametrize("outcome", [COMMITTED, FAILED])
def test_the_status_of_an_earlier_call_is_a_failure(
    engine: FakeEngine, url: str, outcome: dict[str, Any]
) -> None:
    mine = COMMITTED | {"handle": "ipc:///tmp/a"}
    engine.answer({"results": [mine, outcome | {"device": "CPU-h-1", "handle": "ipc:///tmp/before"}]})
    message = failure(url)
    assert "1 of 2 workers" in message
    assert "worker 1 on device CPU-h-1 answered an earlier call" in message
    assert "restart" in message


def test_many_failed_workers_are_all_counted(engine: FakeEngine, url: str) -> None:
    engine.answer({"results": [FAILED] * 20})
    message = failure(url)
    assert "20 of 20 workers" in message
    assert message.count("--- traceback of worker") == 8
    assert "[8, 9, 10" in message


@pytest.mark.parametrize("result", ["Error: CUDA out of memory", {"device": "d"}, True, 3, ["None"]])
def test_any_other_result_is_a_failure(engine: FakeEngine, url: str, result: object) -> None:
    engine.answer({"results": [None, result]})
    assert "worker 1" in failure(url)


def test_a_key_and_further_arguments_are_sent_when_given(engine: FakeEngine, url: str) -> None:
    engine.answer({"results": [COMMITTED]})
    request_inference_to_update(url, PATHS, timeout=7, api_key="secret", options={"partial": True})
    ((_, _, headers, body),) = engine.requests
    assert headers["authorization"] == "Bearer secret"
    assert json.loads(body)["kwargs"] == {"partial": True}


def test_a_route_of_the_engine(engine: FakeEngine, url: str) -> None:
    url = url.replace("collective_rpc", "pause?mode=keep")
    engine.answer({"status": "paused"})
    assert post_to_engine(url, 5, body={"a": 1}) == {"status": "paused"}
    engine.body = b""
    assert post_to_engine(url, 5, api_key="secret") is None
    assert [request[:2] for request in engine.requests] == [("POST", "/pause?mode=keep")] * 2
    assert [request[3] for request in engine.requests] == [b'{"a": 1}', b""]
    assert engine.requests[1][2]["authorization"] == "Bearer secret"
    engine.answer({"error": "no scheduler"}, 500)
    with pytest.raises(EngineRequestError, match="answered /pause with HTTP 500: no scheduler"):
        post_to_engine(url, 5)


def test_no_worker_at_all_is_a_failure(engine: FakeEngine, url: str) -> None:
    engine.answer({"results": []})
    assert "no worker" in failure(url)


def test_an_error_status_carries_message_and_traceback(engine: FakeEngine, url: str) -> None:
    engine.answer({"error": "RuntimeError: boom", "traceback": "Traceback:\n  line 1"}, 500)
    message = failure(url)
    assert "HTTP 500: RuntimeError: boom" in message
    assert "Traceback:\n  line 1" in message


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [{"msg": "Field required"}]}, "Field required"),
        ({"error": {"message": "nested", "type": "NotFoundError"}}, "nested"),
        (["a list"], "a list"),
    ],
)
def test_error_bodies_of_other_servers(engine: FakeEngine, url: str, document: object, expected: str) -> None:
    engine.answer(document, 404)
    message = failure(url)
    assert "HTTP 404" in message
    assert expected in message


def test_a_long_error_body_is_cut(engine: FakeEngine, url: str) -> None:
    engine.status, engine.body = 503, b"<html>" + b"x" * 1_000_000
    message = failure(url)
    assert "HTTP 503: <html>xxx" in message
    assert len(message) < MAX_ERROR_NBYTES + 500


@pytest.mark.parametrize(
    "body", [b"", b"OK", b"\xff\xfe", b"[" * 100_000, b"[]", b"{}", b'{"results": null}']
)
def test_a_success_status_alone_is_not_enough(engine: FakeEngine, url: str, body: bytes) -> None:
    engine.body = body
    assert "HTTP 200" in failure(url)


def test_a_redirect_is_not_followed(engine: FakeEngine, url: str) -> None:
    engine.answer({"results": [COMMITTED]}, 307)
    assert "HTTP 307" in failure(url)


def test_an_answer_without_end_is_cut_off(
    engine: FakeEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "MAX_ANSWER_NBYTES", 1000)
    engine.body = b" " * 10_000_000
    assert "not JSON" in failure(url)


def test_a_refused_connection() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/collective_rpc"
        message = failure(url)
    assert url in message
    assert "ConnectError" in message


def test_a_missing_unix_socket(short_dir: Path) -> None:
    assert "FileNotFoundError" in failure("http://localhost/x", uds=str(short_dir / "absent"))
    stale = short_dir / "stale"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    assert "ConnectionRefusedError" in failure("http://localhost/x", uds=str(stale))
    with pytest.raises(EngineRequestError, match="ConnectionRefusedError"):
        wait_until_healthy("http://localhost", 0.3, uds=str(stale))


@pytest.mark.parametrize("address", ["engine:8000/collective_rpc", "ftp://127.0.0.1/", "http://[::1", ""])
def test_an_address_that_is_none(address: str) -> None:
    failure(address)
    with pytest.raises(EngineRequestError):
        wait_until_healthy(address, 30)


def test_an_engine_that_does_not_answer_in_time(engine: FakeEngine, url: str) -> None:
    release = threading.Event()
    engine.before_answer = lambda: bool(release.wait(10)) and None
    began = time.monotonic()
    message = failure(url, timeout=0.2)
    elapsed = time.monotonic() - began
    release.set()
    assert "did not answer update_weights_from_ipc within 1.2 s" in message
    assert elapsed < 5


def test_an_answer_that_drips_does_not_outlast_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                try:
                    for _ in range(200):
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        message = failure(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.1)
        thread.join()
    assert "still coming" in message


def test_an_engine_that_dies_while_it_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def die() -> None:
            connection, _ = listener.accept()
            with connection:
                request = b""
                while not request.endswith(b"}"):  # Unread bytes would make the end a reset.
                    request += connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")

        thread = threading.Thread(target=die)
        thread.start()
        message = failure(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join()
    assert "RemoteProtocolError" in message


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_bad_timeout_is_refused_before_anything_is_sent(
    engine: FakeEngine, url: str, timeout: float
) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        call_engine(url, "x", timeout=timeout)
    with pytest.raises(ConfigError, match="not JSON"):
        call_engine(url, "x", [object()])
    assert engine.requests == []


def test_call_engine_returns_the_results(engine: FakeEngine, url: str) -> None:
    engine.answer({"results": [{"a": 1}, "x"]})
    assert call_engine(url, "parameter_digests", ("p",)) == [{"a": 1}, "x"]
    assert json.loads(engine.requests[0][3]) == {
        "method": "parameter_digests",
        "args": ["p"],
        "timeout": 300.0,
    }


def test_any_route_can_be_asked(engine: FakeEngine, url: str) -> None:
    engine.answer({"error": {"message": "no such route"}}, status=404)
    answer = ask_engine("POST", url, 5.0, body={"a": 1}, api_key="secret")
    assert (answer.status, answer.text) == (404, "no such route")
    method, _, headers, sent = engine.requests[-1]
    assert (method, headers["authorization"], json.loads(sent)) == ("POST", "Bearer secret", {"a": 1})

    engine.answer({"model": "m"})
    assert json.loads(ask_engine("GET", url, 5.0).body) == {"model": "m"}
    method, _, headers, sent = engine.requests[-1]
    assert (method, sent, "authorization" in headers) == ("GET", b"", False)


def test_a_route_that_cannot_be_asked(engine: FakeEngine, url: str, short_dir: Path) -> None:
    with pytest.raises(EngineRequestError, match="could not be asked"):
        ask_engine("GET", url, 5.0, str(short_dir / "missing"))
    with pytest.raises(ConfigError, match="is not an address"):
        ask_engine("GET", "nonsense", 5.0)
    with pytest.raises(ConfigError, match="finite number of seconds"):
        ask_engine("GET", url, float("nan"))
    release = threading.Event()

    def wait() -> None:
        release.wait(30)

    engine.before_answer = wait
    try:
        with pytest.raises(EngineRequestError, match=r"did not answer within 0\.2 s"):
            ask_engine("GET", url, 0.2)
    finally:
        release.set()


def test_no_descriptor_stays_open(engine: FakeEngine, url: str) -> None:
    engine.answer({"results": [None]})
    call_engine(url, "x")
    time.sleep(0.1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        call_engine(url, "x")
    time.sleep(0.1)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_health_is_awaited(engine: FakeEngine, url: str) -> None:
    engine.answer({"status": "loading"}, 503)
    engine.before_answer = lambda: engine.answer({}, 200) if len(engine.requests) > 1 else None
    wait_until_healthy(url.removesuffix("/collective_rpc") + "/", 60)
    assert len(engine.requests) > 1
    assert {request[:2] for request in engine.requests} == {("GET", "/health")}


def test_an_engine_with_incomplete_weights_can_be_asked(engine: FakeEngine, url: str) -> None:
    """It is not ready, and only an update makes it so."""
    engine.answer({"status": "not_ready", "weights": "incomplete"}, 503)
    wait_until_healthy(url.removesuffix("/collective_rpc"), 60)
    assert len(engine.requests) == 1


def test_an_answer_is_not_forgotten_for_a_poll_that_the_deadline_cut_short(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([(503, b"loading")])

    def exchange(*_: object, **__: object) -> tuple[int, bytes]:
        for answer in answers:
            return answer
        raise httpx.ReadTimeout("cut short")

    monkeypatch.setattr(engine_client, "_exchange", exchange)
    with pytest.raises(EngineRequestError, match="HTTP 503: loading"):
        wait_until_healthy(url, 0.2)


def test_health_that_never_comes_names_endpoint_and_last_answer(engine: FakeEngine, url: str) -> None:
    engine.answer({"status": "loading"}, 503)
    with pytest.raises(EngineRequestError, match=r"/ping is not healthy after 3 s.*HTTP 503.*loading"):
        wait_until_healthy(url.removesuffix("/collective_rpc"), 3.0, path="/ping")
    with pytest.raises(EngineRequestError, match="ConnectError"):
        wait_until_healthy("http://127.0.0.1:9", 0.2)
