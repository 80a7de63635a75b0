from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

Cli = Callable[..., Any]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--host", "127.0.0.1"), "--port"),
        (("--peers", "a"), "--port"),
        (("--uds", "/s", "--port", 9000), "--uds"),
        (("--port", 0), "--port"),
        (("--without-token",), "--port"),
    ],
)
def test_bad_usage(cli: Cli, args: tuple[object, ...], named: str) -> None:
    done = cli("serve", *args)
    assert done.exit_code == 2
    assert named in done.stderr


def test_more_ranks_than_ports(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli("serve", "--port", 65535)
    assert (done.exit_code, "65535 + 1 is over 65535" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--host", "0.0.0.0", "--port", 9000), "set CKPT_ENGINE_API_TOKEN"),
        (("--host", "0.0.0.0", "--port", 9000, "--without-token"), "set CKPT_ENGINE_API_TOKEN"),
        (("--port", 9000), "can be reached by every user of this host"),
        (("--uds", "/tmp/ps.sock"), "/tmp must be a directory of this user that nobody else may enter"),
        (("--port", 9000, "--peers", "a,b"), "--peers a,b: give 1 entries"),
    ],
)
def test_what_cannot_be_served(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, args: tuple[object, ...], message: str
) -> None:
    monkeypatch.delenv("CKPT_ENGINE_API_TOKEN", raising=False)
    done = cli("serve", *args)
    assert done.exit_code == 1
    assert message in done.stderr


def test_several_ranks_need_a_socket_each(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli("serve", "--uds", "/nowhere/ps.sock")
    assert (done.exit_code, "put {rank} into it" in done.stderr) == (1, True)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_lone_rank_over_tcp_with_a_token(tmp_path: Path, signum: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "ckpt_engine.cli.main", "serve", "--port", str(port)],
        env=os.environ | {"CKPT_ENGINE_API_TOKEN": "secret", "CKPT_ENGINE_SOCKET_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as served:
        assert served.stdout is not None
        assert served.stdout.readline() == f"rank 0 of 1 listens on http://127.0.0.1:{port}\n"
        url = f"http://127.0.0.1:{port}/v1/healthz"
        assert httpx.get(url).status_code == 401
        health = httpx.get(url, headers={"Authorization": "Bearer secret"}).json()
        assert (health["rank"], health["world_size"]) == (0, 1)
        # Whoever has the token is not this user: it may name no files, and only engines of the loopback.
        url = f"http://127.0.0.1:{port}/v1/checkpoints/a"
        for path, body in (
            ("files", {"files": str(tmp_path), "use_inplace_pin_memory": True}),
            ("update", {"update_url": "http://192.0.2.1/collective_rpc"}),
        ):
            refused = httpx.post(f"{url}/{path}", json=body, headers={"Authorization": "Bearer secret"})
            assert (refused.status_code, refused.json()["error_type"]) == (403, "NotAllowedError")
            assert "secret" not in refused.text
        served.send_signal(signum)
        out, err = served.communicate(timeout=30)
    assert (served.returncode, out, err) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
def test_a_server_without_a_token(tmp_path: Path, tcp: bool) -> None:
    """On the loopback all of this host may ask, but no web page, and not for any file. On a Unix socket
    only this user may, and for whatever it likes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--port", str(port), "--without-token"] if tcp else []
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CKPT_ENGINE_A")}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "ckpt_engine.cli.main", "serve", *where],
        env=environment | {"CKPT_ENGINE_SOCKET_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as served:
        assert served.stdout is not None
        assert served.stdout.readline().startswith("rank 0 of 1 listens on ")
        transport = httpx.HTTPTransport(uds=None if tcp else str(tmp_path / "ps-0.sock"))
        with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{port}/v1", timeout=30) as client:
            assert client.get("/healthz").status_code == 200
            (tmp_path / "empty").mkdir()
            files = client.post("/checkpoints/a/files", json={"files": str(tmp_path / "empty")})
            # Looked at, and found to be none; or not looked at.
            assert files.json()["error_type"] == ("NotAllowedError" if tcp else "CheckpointError")
            pages = [{"Host": "evil.example"}] if tcp else []
            for headers in [*pages, {"Origin": "http://evil.example"}]:
                assert client.get("/healthz", headers=headers).status_code == 403
        served.send_signal(signal.SIGTERM)
        out, err = served.communicate(timeout=30)
    assert (served.returncode, out, err) == (0, "", "")
