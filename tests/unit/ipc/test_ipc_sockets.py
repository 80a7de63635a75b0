"""The directory of a parameter server's sockets: private, its own, and gone with it."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import zmq
from ends_for_ipc_tests import connect

from ckpt_engine.errors import ConfigError, ProtocolError
from ckpt_engine.ipc import sockets
from ckpt_engine.ipc.sockets import (
    MAX_PATH_NBYTES,
    SocketDirectory,
    check_peer,
    listen,
    peer_credentials,
    receive_descriptors,
    sweep,
    tune,
)

OWNER = """
import sys
from pathlib import Path
from ckpt_engine.ipc.sockets import SocketDirectory, listen
directory = SocketDirectory(Path(sys.argv[1]))
sock = listen(directory.worker_path() + ".life")
print(directory.path, flush=True)
sys.stdin.read()
directory.close()
"""


def start_owner(base: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another parameter server on this host, and its directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# The directory


def test_the_directory_and_its_base_are_this_users_alone(base: Path) -> None:
    old = os.umask(0)
    try:
        directory = SocketDirectory(base / "new")
    finally:
        os.umask(old)
    for path in (directory.path, directory.base):
        assert mode(path) == 0o700
        assert path.stat().st_uid == os.getuid()
    assert directory.path.parent == directory.base == base / "new"
    directory.close()


def test_without_a_setting_the_base_is_the_users_in_the_temporary_directory(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    directory = SocketDirectory(None)
    assert directory.base == base / f"ckpt-engine-{os.getuid()}"
    directory.close()


def test_a_base_is_used_by_many(base: Path) -> None:
    one, two = SocketDirectory(base), SocketDirectory(base)
    assert one.path != two.path
    assert sorted(base.iterdir()) == sorted([one.path, two.path])
    one.close()
    assert list(base.iterdir()) == [two.path]
    two.close()


@pytest.mark.parametrize("bits", [0o701, 0o710, 0o704, 0o740, 0o720, 0o702, 0o755, 0o777, 0o1777])
def test_a_base_that_others_may_enter_is_refused(base: Path, bits: int) -> None:
    base.chmod(bits)
    with pytest.raises(ConfigError, match=re.escape(str(base))) as caught:
        SocketDirectory(base)
    assert "mode 0700" in str(caught.value)
    assert "CKPT_ENGINE_SOCKET_DIR" in str(caught.value)
    assert list(base.iterdir()) == []


def test_a_base_that_is_a_link_is_refused(base: Path) -> None:
    """Whoever owns the link could lead it elsewhere later."""
    (base / "target").mkdir(mode=0o700)
    (base / "link").symlink_to(base / "target")
    (base / "dangling").symlink_to(base / "nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(ConfigError, match=f"{name} must be a directory of this user"):
            SocketDirectory(base / name)
    assert list((base / "target").iterdir()) == []
    assert not (base / "nowhere").exists()


def test_a_base_that_is_no_directory_is_refused(base: Path) -> None:
    (base / "file").touch(0o700)
    with pytest.raises(ConfigError, match="file must be a directory of this user"):
        SocketDirectory(base / "file")


def test_a_base_of_another_user_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(base, 65534, 65534)
    else:
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(ConfigError, match="must be a directory of this user"):
        SocketDirectory(base)
    assert list(base.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_another_user_cannot_reach_a_socket(base: Path) -> None:
    directory = SocketDirectory(base)
    path = directory.worker_path()
    listener = listen(path)
    code = f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})"
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-S", "-c", code],
        user=65534,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert "PermissionError" in done.stderr
    listener.close()
    directory.close()


# Paths


def test_paths_cannot_be_guessed(base: Path) -> None:
    directory = SocketDirectory(base)
    paths = {directory.worker_path() for _ in range(1000)}
    assert len(paths) == 1000
    tokens = [Path(path).name.removeprefix("w-") for path in paths]
    assert all(re.fullmatch(r"[0-9a-f]{16}", token) for token in tokens)
    # 64 random bits each: every place takes every digit.
    assert all(len({token[place] for token in tokens}) == 16 for place in range(16))
    assert {Path(path).parent for path in paths} == {directory.path}
    assert directory.worker_path("abc") == str(directory.path / "w-abc")
    directory.close()


def test_the_longest_path_that_a_socket_can_have_works(base: Path) -> None:
    """107 bytes, with the names of the directory and of a worker's lifeline."""
    own = len("/12345678/w-0123456789abcdef.life")
    room = MAX_PATH_NBYTES - own - len(os.fsencode(base)) - 1
    directory = SocketDirectory(base / ("x" * room))
    path = f"{directory.worker_path()}.life"
    assert len(os.fsencode(path)) == MAX_PATH_NBYTES == 107
    listen(path).close()
    directory.close()

    too_long = base / ("y" * (room + 1))
    with pytest.raises(ConfigError, match="has 108 bytes, over the limit of 107: set CKPT_ENGINE_SOCKET_DIR"):
        SocketDirectory(too_long)
    assert list(too_long.iterdir()) == []


def test_bytes_count_not_characters(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 1\d\d bytes, over the limit"):
        SocketDirectory(base / ("ü" * 40))


# The end


def test_a_closed_directory_is_gone_with_all_in_it(base: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    directory = SocketDirectory(base)
    for name in (directory.worker_path(), directory.peer_path):
        listen(name).close()
    (directory.path / "folder").mkdir()
    assert (directory.path / "lock").exists()
    directory.close()
    directory.close()
    assert list(base.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_dead_owners_directory_is_swept_and_a_living_ones_left(base: Path) -> None:
    dead, left = start_owner(base)
    alive, kept = start_owner(base)
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert {left, kept} == set(base.iterdir())
        assert len(list(left.iterdir())) == 2
        directory = SocketDirectory(base)
        assert {directory.path, kept} == set(base.iterdir())
        assert len(list(kept.iterdir())) == 2
        directory.close()
        alive.communicate("")
        assert alive.returncode == 0
        assert list(base.iterdir()) == []
    finally:
        for process in (dead, alive):
            process.kill()
            process.communicate()


def test_a_sweep_leaves_what_is_not_a_parameter_servers(base: Path, tmp_path: Path) -> None:
    (base / "file").touch()
    (base / "empty").mkdir()
    (base / "other").mkdir()
    (base / "other" / "data").touch()
    (tmp_path / "lock").touch()
    (base / "linked").mkdir()
    (base / "linked" / "lock").symlink_to(tmp_path / "lock")
    (base / "link").symlink_to(tmp_path)
    before = sorted(base.rglob("*"))
    sweep(base)
    assert sorted(base.rglob("*")) == before
    assert (tmp_path / "lock").exists()


def test_a_directory_that_is_just_being_made_is_not_swept(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks of a host start at once: one sweeps while another has made its lock but not yet taken it."""
    real = fcntl.flock
    sweeping = False

    def flock(fd: int, operation: int) -> None:
        nonlocal sweeping
        if not sweeping:
            sweeping = True
            sweep(base)
        real(fd, operation)

    monkeypatch.setattr(sockets.fcntl, "flock", flock)
    directory = SocketDirectory(base)
    assert sweeping
    assert directory.path.is_dir()
    sweep(base)
    assert sorted(path.name for path in directory.path.iterdir()) == ["lock"]
    directory.close()


def test_a_program_that_the_owner_starts_does_not_keep_the_lock(base: Path) -> None:
    """Else what a killed owner left would stay for as long as that program runs."""
    directory = SocketDirectory(base)
    assert not os.get_inheritable(directory._lock)
    directory.close()


# Sockets


def test_a_listening_socket_is_this_users_and_does_not_block(base: Path) -> None:
    old = os.umask(0)
    try:
        listener = listen(str(base / "s"))
    finally:
        os.umask(old)
    assert mode(base / "s") == 0o600
    with pytest.raises(BlockingIOError):
        listener.accept()
    with pytest.raises(OSError, match="Address already in use"):
        listen(str(base / "s"))
    listener.close()


def test_the_kernel_says_who_connects(base: Path) -> None:
    listener = listen(str(base / "s"))
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(base / 's')!r}); input()"
    client = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)
    try:
        listener.settimeout(20)
        sock, _ = listener.accept()
        assert peer_credentials(sock) == (client.pid, os.getuid())
        assert check_peer(sock) == client.pid
        sock.close()
    finally:
        client.communicate(b"\n")
        listener.close()


@pytest.mark.parametrize(
    ("peer", "me", "refused"), [(1000, 1000, False), (0, 1000, False), (1001, 1000, True), (1, 0, True)]
)
def test_only_this_user_and_root_may_connect(
    monkeypatch: pytest.MonkeyPatch, peer: int, me: int, refused: bool
) -> None:
    monkeypatch.setattr(sockets, "peer_credentials", lambda _: (77, peer))
    monkeypatch.setattr(os, "getuid", lambda: me)
    one, two = socket.socketpair()
    if refused:
        with pytest.raises(ProtocolError, match=f"pid 77, which runs as uid {peer}"):
            check_peer(one)
    else:
        assert check_peer(one) == 77
    one.close()
    two.close()


def test_received_descriptors_are_not_inherited() -> None:
    """An engine's helpers would keep the ring's memory."""
    one, two = socket.socketpair()
    given = [os.memfd_create("x"), os.memfd_create("y")]
    socket.send_fds(one, [b"hello"], given)
    data, got = receive_descriptors(two, 64)
    assert data == b"hello"
    assert [os.readlink(f"/proc/self/fd/{fd}") for fd in got] == ["/memfd:x (deleted)", "/memfd:y (deleted)"]
    assert not any(os.get_inheritable(fd) for fd in got)
    one.sendall(b"more")
    assert receive_descriptors(two, 64) == (b"more", [])
    one.close()
    assert receive_descriptors(two, 64) == (b"", [])
    two.close()
    for fd in (*given, *got):
        os.close(fd)


def test_a_zeromq_message_over_the_bound_does_not_arrive(base: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router, dealer, good = context.socket(zmq.ROUTER), context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    for sock in (router, dealer, good):
        tune(sock, 1000)
        assert sock.getsockopt(zmq.LINGER) == 0
    router.bind(f"ipc://{base}/z")
    dealer.connect(f"ipc://{base}/z")
    dealer.send(b"x" * 1001)
    good.connect(f"ipc://{base}/z")
    good.send(b"x" * 1000)
    assert router.poll(20_000)
    assert router.recv_multipart()[1] == b"x" * 1000
    # Its connection was dropped: it connects again, with nothing to say.
    dealer.send(b"small")
    assert router.poll(20_000)
    assert router.recv_multipart()[1] == b"small"
    context.destroy(linger=0)


def test_a_raw_connection_can_be_made_to_a_listening_socket(base: Path) -> None:
    """As the worker's lifeline makes it."""
    listener = listen(str(base / "s"))
    listener.settimeout(20)
    sock = connect(f"ipc://{base}/s")
    accepted, _ = listener.accept()
    sock.sendall(b"x")
    assert accepted.recv(1) == b"x"
    for each in (listener, sock, accepted):
        each.close()
