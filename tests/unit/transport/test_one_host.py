"""Ranks of one host meet at a Unix socket: no port is opened, and a dead rank 0's place is taken."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_for_transport_tests import LIMIT, wait_until

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc import sockets
from ckpt_engine.ipc.sockets import SocketDirectory, published_directory
from ckpt_engine.settings import Settings
from ckpt_engine.transport import control_messages as messages
from ckpt_engine.transport import control_server
from ckpt_engine.transport.bootstrap import own_store
from ckpt_engine.transport.control import Control, _connect_to
from ckpt_engine.transport.control_server import ControlServer
from ckpt_engine.transport.framing import LENGTH

PORT = 29999
"""Only a name here: nobody listens there."""


class Ranks:
    """Of one host, each with a directory below `base`."""

    def __init__(self, base: Path, size: int) -> None:
        self.base = base
        self.size = size
        self.directories: list[SocketDirectory] = []
        self.controls: list[Control] = []

    def join(self, rank: int, seconds: float = LIMIT) -> Control:
        directory = SocketDirectory(self.base)
        self.directories.append(directory)
        deadline = Deadline.after(seconds)
        settings = Settings(local_world_size=self.size)
        point = own_store(rank, self.size, "127.0.0.1", PORT, settings, deadline, directory)
        control = Control(point, rank=rank, world_size=self.size, deadline=deadline, stall_seconds=LIMIT)
        self.controls.append(control)
        return control

    def close(self) -> None:
        for control in reversed(self.controls):
            control.close()
        for directory in self.directories:
            directory.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "s"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def ranks(base: Path) -> Iterator[Ranks]:
    ranks = Ranks(base, 2)
    yield ranks
    ranks.close()
    assert list(base.iterdir()) == []


def tcp_listeners() -> set[str]:
    """The inodes of this process's listening TCP sockets."""
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.add(fields[9])
    return found


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_they_meet_and_listen_on_no_port(ranks: Ranks) -> None:
    before = tcp_listeners()
    late: list[Control] = []
    thread = threading.Thread(target=lambda: late.append(ranks.join(1)))
    thread.start()  # before there is anybody
    first = ranks.join(0)
    thread.join(LIMIT)
    assert tcp_listeners() == before
    rounds = [control.open_round("meet") for control in (first, *late)]
    deadline = Deadline.after(LIMIT)
    threads = [threading.Thread(target=round_.exchange, args=(b"x", deadline)) for round_ in rounds]
    for one in threads:
        one.start()
    for one in threads:
        one.join(LIMIT)
    assert all(round_.met is not None for round_ in rounds)
    for round_ in rounds:
        round_.leave()
    # Groups may still meet at a store, which is made when it is asked for.
    assert "store" not in vars(first._meeting_point)


def test_a_dead_rank_0_s_place_is_taken(base: Path, ranks: Ranks) -> None:
    dead = SocketDirectory(base)
    dead.publish(PORT, Deadline.after(LIMIT))
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(dead.path / "control"))
    os.close(dead._lock)  # as the kernel does for a process that was killed
    late: list[Control] = []
    thread = threading.Thread(target=lambda: late.append(ranks.join(1)))
    thread.start()
    path = ranks.join(0)._meeting_point.path
    thread.join(LIMIT)
    assert [control.lost for control in late] == [None]
    assert path == base / os.readlink(published_directory(base, PORT)) / "control"


def test_a_link_that_leads_nowhere_is_swept(base: Path) -> None:
    dead = SocketDirectory(base)
    dead.publish(PORT, Deadline.after(LIMIT))
    os.close(dead._lock)
    SocketDirectory(base).close()
    assert list(base.iterdir()) == []


def test_another_s_link_is_not_removed(base: Path) -> None:
    first, second = SocketDirectory(base), SocketDirectory(base)
    first.publish(PORT, Deadline.after(LIMIT))
    fcntl.flock(first._lock, fcntl.LOCK_UN)
    second.publish(PORT, Deadline.after(LIMIT))
    first.close()
    assert os.readlink(published_directory(base, PORT)) == second.path.name
    second.close()
    assert list(base.iterdir()) == []


def test_the_place_of_a_job_that_is_just_ending_is_waited_for(base: Path) -> None:
    ending, next_one = SocketDirectory(base), SocketDirectory(base)
    ending.publish(PORT, Deadline.after(LIMIT))
    closing = threading.Timer(0.3, ending.close)
    closing.start()
    next_one.publish(PORT, Deadline.after(LIMIT))
    closing.join()
    assert os.readlink(published_directory(base, PORT)) == next_one.path.name
    next_one.close()


def test_a_second_job_does_not_take_the_place_of_one_that_lives(
    base: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "CLOSING_SECONDS", 0.2)
    first = ranks.join(0)
    with pytest.raises(ConfigError, match=rf"control-{PORT} is taken.* MASTER_PORT of its own"):
        ranks.join(0)
    late = ranks.join(1)  # of the first job: it finds its own rank 0
    assert (first.lost, late.lost) == (None, None)
    assert first._server is not None
    assert sorted(first._server._clients) == [0, 1]


def test_a_rank_of_a_world_of_another_size_is_refused_with_both_sizes(base: Path, ranks: Ranks) -> None:
    ranks.join(0)
    ranks.size = 3
    with pytest.raises(ConfigError, match=r"a world of 2 ranks, this rank 2 one of 3"):
        ranks.join(2)
    with pytest.raises(ConfigError, match=r"a world of 2 ranks, this rank 1 one of 3"):
        ranks.join(1)


def test_a_rank_waits_where_too_many_knock_at_once(tmp_path: Path) -> None:
    path = tmp_path / "door"
    crowd: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                crowd.append(socket.socket(socket.AF_UNIX))
                crowd[-1].setblocking(False)
                crowd[-1].connect(str(path))
        with pytest.raises(BlockingIOError):
            _connect_to(path, Deadline.after(0.1))
        late: list[socket.socket] = []
        thread = threading.Thread(target=lambda: late.append(_connect_to(path, Deadline.after(LIMIT))))
        thread.start()
        listener.settimeout(0.05)
        while thread.is_alive():
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()
    assert len(late) == 1  # else the thread has raised
    for sock in (*crowd, *late):
        sock.close()


def test_rank_0_that_does_not_come(ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match=r"rank 1 cannot reach .* need the same CKPT_ENGINE_SOCKET_DIR"):
        ranks.join(1, seconds=0.2)


# Strangers, whichever door they find


@pytest.fixture(params=["unix", "tcp"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ControlServer]:
    address = tmp_path / "control" if request.param == "unix" else "127.0.0.1"
    server = ControlServer(address, 2, "token", LIMIT)
    server.where = str(address) if request.param == "unix" else (address, server.port)  # type: ignore[attr-defined]
    yield server
    server.close(0)


def connect(server: ControlServer) -> socket.socket:
    where = server.where  # type: ignore[attr-defined]
    sock = socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET)
    sock.settimeout(LIMIT)
    sock.connect(where)
    return sock


def join(server: ControlServer, rank: int, token: str = "token") -> socket.socket:
    sock = connect(server)
    sock.sendall(messages.encode_frame(messages.Join(messages.CONTROL_PROTOCOL, token, rank, 1, 2)))
    return sock


def test_a_crowd_of_strangers_keeps_no_rank_out(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "MAX_STRANGERS", 8)
    welcome = messages.encode_frame(messages.Welcome())
    with join(server, 0) as first:
        assert first.recv(len(welcome)) == welcome
        crowd = [connect(server) for _ in range(40)]
        try:
            assert crowd[0].recv(1) == b""  # the oldest goes first
            with join(server, 1) as second:
                assert second.recv(len(welcome)) == welcome
                wait_until(lambda: len(server._strangers) <= 8, "all that came to be looked at")
                assert sorted(server._clients) == [0, 1]
        finally:
            for sock in crowd:
                sock.close()


def test_without_descriptors_it_waits_and_goes_on(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0
    accept = socket.socket.accept

    def exhausted(listener: socket.socket) -> tuple[socket.socket, object]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OSError(24, "too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", exhausted)
    with join(server, 0) as first:
        assert first.recv(1)
    assert tries == 2  # it did not spin
    assert "no connections are accepted for a second" in caplog.text


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        LENGTH.pack(0xFFFFFFFF),
        LENGTH.pack(0),
        LENGTH.pack(4) + b"\xdf\xff\xff\xff",
        LENGTH.pack(1000) + b"\x91" * 1000,
        LENGTH.pack(5) + b"\x80\x04K\x01.",
        messages.encode_frame(messages.Goodbye()),
        messages.encode_frame(messages.Vote(1, "v")),
        messages.encode_frame(messages.Join(messages.CONTROL_PROTOCOL, "tokem", 1, 1)),
        messages.encode_frame(messages.Join(messages.CONTROL_PROTOCOL, "", 1, 1)),
        messages.encode_frame(messages.Join(messages.CONTROL_PROTOCOL, "tökén", 1, 1)),
        messages.encode_frame(messages.Join(messages.CONTROL_PROTOCOL, "token", 0, 1, 2)),
        messages.encode_frame(messages.Join(messages.CONTROL_PROTOCOL, "token", -1, 1, 2)),
        messages.encode_frame(messages.Join(messages.CONTROL_PROTOCOL, "token", 2, 1, 2)),
        messages.encode_frame(messages.Join(0, "token", 1, 1)),
    ],
)
def test_who_speaks_otherwise_is_hung_up_on(server: ControlServer, said: bytes) -> None:
    welcome = messages.encode_frame(messages.Welcome())
    with join(server, 0) as first, connect(server) as stranger:
        assert first.recv(len(welcome)) == welcome
        stranger.sendall(said)
        assert stranger.recv(1) == b""
        with join(server, 1) as second:
            assert second.recv(len(welcome)) == welcome
            assert sorted(server._clients) == [0, 1]
