"""Where the API listens, and who can reach it there."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckpt_engine.errors import ConfigError
from ckpt_engine.server.listening import TcpListener, UnixListener, default_uds, read_token
from ckpt_engine.settings import load_settings


@pytest.fixture
def directory() -> Iterator[Path]:
    # pytest's own directories may be longer than a Unix socket's path may be.
    path = Path(tempfile.mkdtemp(prefix="listen-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_only_this_user_can_reach_a_unix_socket(directory: Path) -> None:
    path = directory / "made" / "here" / "ps.sock"
    listener = UnixListener(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert str(listener) == f"unix:{path}"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()
    listener.close()
    assert list(path.parent.iterdir()) == []


def test_a_directory_that_others_may_enter_is_refused(directory: Path) -> None:
    directory.chmod(0o750)
    with pytest.raises(ConfigError, match=f"--uds .*: {directory} must be a directory of this user"):
        UnixListener(directory / "ps.sock")
    assert list(directory.iterdir()) == []


def test_a_dead_server_s_socket_is_replaced_and_a_live_one_s_is_not(directory: Path) -> None:
    path = directory / "ps.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    live = UnixListener(path)
    # Its backlog may be full: that is no sign of death.
    clients = [socket.socket(socket.AF_UNIX) for _ in range(200)]
    for client in clients:
        client.setblocking(False)
        client.connect_ex(str(path))
    with pytest.raises(ConfigError, match="another process serves there"):
        UnixListener(path)
    for client in clients:
        client.close()
    live.close()
    UnixListener(path).close()


def test_what_is_not_a_socket_is_left_alone(directory: Path) -> None:
    path = directory / "ps.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="something that is not a socket is there"):
        UnixListener(path)
    assert path.read_text() == "precious"


def test_of_two_that_start_at_once_one_wins(directory: Path) -> None:
    path = directory / "ps.sock"

    def start(_: int) -> UnixListener | None:
        try:
            return UnixListener(path)
        except ConfigError:
            return None

    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        with ThreadPoolExecutor(4) as pool:
            found = [listener for listener in pool.map(start, range(4)) if listener]
        assert len(found) == 1
        found[0].close()


def test_another_s_socket_is_not_removed(directory: Path) -> None:
    path = directory / "ps.sock"
    first = UnixListener(path)
    path.rename(directory / "elsewhere")
    second = UnixListener(path)
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()
    shutil.rmtree(directory)
    second.close()


def test_a_path_that_is_too_long(directory: Path) -> None:
    with pytest.raises(ConfigError, match="may have 107 bytes"):
        UnixListener(directory / ("x" * 100))


def test_the_default_lies_in_the_directory_for_sockets(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", str(directory))
    assert default_uds(load_settings()) == f"{directory}/ps-{{rank}}.sock"
    monkeypatch.delenv("CKPT_ENGINE_SOCKET_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    assert default_uds(load_settings()) == f"{directory}/ckpt-engine-{os.getuid()}/ps-{{rank}}.sock"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_the_loopback_needs_no_token(host: str) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("no IPv6 on this machine")
    listener = TcpListener(host, 0, None, without_token=True)
    assert str(listener).startswith("http://")
    with socket.create_connection((host, listener.port), timeout=5):
        pass
    listener.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"])
def test_any_other_address_needs_one(host: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--host {host} can be reached from other hosts.*CKPT_ENGINE_API_TOKEN"
    ):
        TcpListener(host, 0, None, without_token=True)


def test_with_a_token_any_address_will_do() -> None:
    listener = TcpListener("0.0.0.0", 0, "secret")
    assert str(listener) == f"http://0.0.0.0:{listener.port}"
    listener.close()


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("", "give an address"),
        ("not a name", "--host not a name: "),
        ("192.0.2.1", "192.0.2.1:1: Cannot assign"),
    ],
)
def test_addresses_that_cannot_be_had(host: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TcpListener(host, 1, "secret")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use"):
            TcpListener("127.0.0.1", port, None, without_token=True)


def test_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_ENGINE_API_TOKEN", raising=False)
    assert read_token(load_settings()) is None
    monkeypatch.setenv("CKPT_ENGINE_API_TOKEN", "s3cret!")
    assert read_token(load_settings()) == "s3cret!"
    assert "s3cret" not in repr(load_settings())
    for bad in ("", "two words", "tab\t", "süß"):
        monkeypatch.setenv("CKPT_ENGINE_API_TOKEN", bad)
        with pytest.raises(ConfigError, match="CKPT_ENGINE_API_TOKEN must be visible ASCII") as caught:
            read_token(load_settings())
        assert not bad or bad not in str(caught.value)


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
