"""Clients that a real server must bear: too many, silent, slow, and those that speak no HTTP."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from api_for_server_tests import SECONDS, StubServer, served

from ckpt_engine.server import connections, guard
from ckpt_engine.server.app import create_app
from ckpt_engine.server.guard import MAX_BODY_NBYTES
from ckpt_engine.server.serving import uvicorn_config

HEAD = b"POST /v1/checkpoints/a/update HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture
def path() -> Iterator[Path]:
    """Of the socket of a server whose stub `ps` is slow to no one."""
    directory = Path(tempfile.mkdtemp(prefix="conn-", dir="/tmp"))
    with served(create_app(StubServer()), directory / "s", uvicorn_config):  # type: ignore[arg-type]
        yield directory / "s"
    shutil.rmtree(directory)


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(SECONDS)
    sock.connect(str(path))
    return sock


def to_its_end(sock: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    data = b""
    with closing(sock):
        try:
            while part := sock.recv(65536):
                data += part
        except ConnectionError:
            pass
    return data


def healthy(path: Path) -> bool:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=SECONDS) as client:
        return client.get("http://x/v1/healthz").status_code == 200


def test_the_silent_are_hung_up_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)
    silent, slow = connect(path), connect(path)
    slow.sendall(HEAD[:20])
    assert (to_its_end(silent), to_its_end(slow)) == (b"", b"")
    assert healthy(path)


def test_a_crowd_keeps_nobody_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 8)
    crowd = [connect(path) for _ in range(30)]
    try:
        for _ in range(5):
            assert healthy(path)
        crowd[0].settimeout(SECONDS)
        assert crowd[0].recv(1) == b""  # the oldest went first
        assert sum(_open(sock) for sock in crowd) <= 8
    finally:
        for sock in crowd:
            sock.close()


def _open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_a_body_that_drips(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    for head in (HEAD + b"Content-Length: 100\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n"):
        sock = connect(path)
        began = time.monotonic()
        sock.sendall(head + b"{")
        assert b" 408 " in to_its_end(sock)
        assert time.monotonic() - began < SECONDS / 2
    assert healthy(path)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_before_its_end(path: Path, chunked: bool) -> None:
    sock = connect(path)
    if chunked:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")

        def send() -> None:
            # Until it is hung up on: there is no end.
            chunk = b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16))
            try:
                for _ in range(64 * MAX_BODY_NBYTES // len(chunk)):
                    sock.sendall(chunk)
            except OSError:
                pass

        sender = threading.Thread(target=send)
        sender.start()
    else:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n{" % (1 << 40))
    answer = sock.recv(65536)
    assert b" 413 " in answer.split(b"\r\n")[0]
    if chunked:
        sock.shutdown(socket.SHUT_RDWR)
        sender.join(SECONDS)
        assert not sender.is_alive()
    sock.close()
    assert healthy(path)


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"\x80\x04\x95" + b"." * 100 + b"\r\n\r\n",
        b"GET /v1/healthz HTTP/9.9\r\n\r\n",
        b"GET " + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 50_000 + b"\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
        b"\r\n" * 1000 + b"\0" * 1000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http(path: Path, said: bytes) -> None:
    sock = connect(path)
    try:
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it has hung up by now
    answer = to_its_end(sock)
    # The parser takes any version: whether that is answered before the end is seen is a matter of time.
    harmless = (b"200",) if b"HTTP/9.9" in said else ()
    assert not answer or answer.split(b" ")[1] in (b"400", b"404", b"413", b"501", *harmless), answer
    assert healthy(path)


def test_json_that_is_hard_to_read(path: Path) -> None:
    bodies = [b"[" * 500_000, b'{"a":' * 100_000, b"9" * 900_000, b'{"timeout": 1e999}', b'{"timeout": NaN}']
    bodies += [
        json.dumps({"ranks": [0] * 200_000}).encode(),
        b'"\\ud800"',
        b'{"ranks": [1' + b"0" * 5000 + b"]}",
    ]
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=SECONDS) as client:
        for body in bodies:
            for route in ("checkpoints/a/update", "checkpoints/a/files", "metas"):
                answer = client.post(
                    f"http://x/v1/{route}", content=body, headers={"Content-Type": "application/json"}
                )
                assert answer.status_code in (200, 400, 404, 422), (route, body[:20], answer.text[:300])
    assert healthy(path)
