"""Where sockets live: a directory of this process alone, mode 0700, gone with it.

    {base}/                      0700, owned by this user (CKPT_ENGINE_SOCKET_DIR)
      control-{port}             link to the directory of rank 0, where all ranks are on one host
      {random}/                  one per parameter server, 0700
        lock                     flock held while its owner lives
        control                  rank 0's control server, where all ranks are on one host
        w-{token}                the worker's ZeroMQ socket; w-{token}.life its lifeline
        peer                     where the host's other ranks connect

A killed owner cannot remove its directory; the next parameter server on the host does: a lock that
can be taken belongs to nobody (it works across containers, where pids mean nothing).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import zmq

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, ProtocolError

logger = logging.getLogger(__name__)

MAX_PATH_NBYTES = 107
"""sun_path holds 108 bytes with its closing zero."""
CLOSING_SECONDS = 15.0
"""How long a place is waited for: more than rank 0 of a job that ends waits for the others to have heard."""
CLOSING_LOOK_SECONDS = 0.05
IDENTITY_NBYTES = 32
"""What a worker says on its lifeline: the routing id of its ZeroMQ socket."""
MAX_DESCRIPTORS = 8


class Owner(Enum):
    """Of a parameter server's directory. UNKNOWN: it is none, or its owner is just making it."""

    LIVES = "lives"
    DEAD = "dead"
    UNKNOWN = "unknown"


class SocketDirectory:
    """A fresh 0700 directory under the user's base directory; removes what dead owners left."""

    def __init__(self, base: Path | None) -> None:
        self.base = private_directory(base or default_directory())
        sweep(self.base)
        self.path = Path(tempfile.mkdtemp(prefix="", dir=self.base))
        # It gets its name when it is held: another's sweep would take this directory for a dead owner's.
        made = self.path / "lock.new"
        self._lock = os.open(made, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.rename(self.path / "lock")
        self._published: Path | None = None
        self._check_length()

    def _check_length(self) -> None:
        longest = os.fsencode(self.worker_path("0" * 16) + ".life")
        if len(longest) > MAX_PATH_NBYTES:
            self.close()
            raise ConfigError(
                f"socket path {os.fsdecode(longest)!r} has {len(longest)} bytes, over the limit of "
                f"{MAX_PATH_NBYTES}: set CKPT_ENGINE_SOCKET_DIR to a shorter directory"
            )

    def worker_path(self, token: str | None = None) -> str:
        """A new, unguessable path for a worker's socket."""
        return str(self.path / f"w-{token or secrets.token_hex(8)}")

    @property
    def peer_path(self) -> str:
        return str(self.path / "peer")

    def publish(self, port: int, deadline: Deadline) -> None:
        """From now on this user's other processes find this directory at `published_directory`.

        Raises:
            ConfigError: they find another one there, whose owner lives, for CLOSING_SECONDS or till the
                deadline: of a job that is just ending it would be gone.
        """
        link, place = self.path / "published", published_directory(self.base, port)
        link.symlink_to(self.path.name)
        deadline = deadline.or_after(CLOSING_SECONDS)
        while not self._take(link, place):
            if deadline.passed:
                raise ConfigError(
                    f"{place} is taken: another job's rank 0, of this user on this host, meets its ranks at "
                    f"port {port} (MASTER_PORT + 1, or master_port): give each job a MASTER_PORT of its own, "
                    "or a CKPT_ENGINE_SOCKET_DIR"
                )
            time.sleep(CLOSING_LOOK_SECONDS)

    def _take(self, link: Path, place: Path) -> bool:
        """Unless somebody is there."""
        with locked(self.base), owner_of(place) as owner:
            if owner is Owner.LIVES:
                return False
            self._published = link.rename(place)
        return True

    def close(self) -> None:
        """Removes the directory. Idempotent."""
        if self._lock >= 0:
            if self._published is not None:
                with locked(self.base), contextlib.suppress(OSError):
                    if os.readlink(self._published) == self.path.name:  # not another's by now
                        self._published.unlink()
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def published_directory(base: Path, port: int) -> Path:
    return base / f"control-{port}"


@contextlib.contextmanager
def owner_of(directory: Path) -> Iterator[Owner]:
    """Whose it is, which stays so meanwhile if it is a dead one's."""
    try:
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield Owner.UNKNOWN
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = Owner.DEAD
        except BlockingIOError:
            owner = Owner.LIVES
        yield owner
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a lock on the directory itself."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def sweep(base: Path) -> None:
    """Removes the directories whose owners died, and links to them."""
    _sweep_directories(base)
    with locked(base):
        for link in base.glob("control-*"):
            if link.is_symlink() and not link.exists():
                link.unlink()


def _sweep_directories(base: Path) -> None:
    for directory in base.iterdir():
        if directory.is_symlink():
            continue
        with owner_of(directory) as owner:
            if owner is Owner.DEAD:
                logger.info("removing %s, left behind by a parameter server that died", directory)
                shutil.rmtree(directory, ignore_errors=True)


def default_directory() -> Path:
    return Path(tempfile.gettempdir()) / f"ckpt-engine-{os.getuid()}"


def private_directory(path: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"{path} must be a directory of this user that nobody else may enter (mode 0700): "
            "correct it, or set CKPT_ENGINE_SOCKET_DIR to another"
        )
    return path


def tune(sock: zmq.Socket[bytes], max_nbytes: int) -> None:
    """The options both ends share: bounded messages, no queueing limit, nothing kept after close."""
    sock.setsockopt(zmq.MAXMSGSIZE, max_nbytes)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RCVHWM, 0)
    sock.setsockopt(zmq.LINGER, 0)


def listen(path: str, backlog: int = 64) -> socket.socket:
    """A listening Unix stream socket that only this user can reach."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def peer_credentials(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process on the other side, as the kernel tells it (pid 0: another namespace)."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def check_peer(sock: socket.socket) -> int:
    """The peer's pid. Raises ProtocolError when it runs as another user (root may connect)."""
    pid, uid = peer_credentials(sock)
    if uid not in (os.getuid(), 0):
        raise ProtocolError(f"refused a connection of pid {pid}, which runs as uid {uid}")
    return pid


def receive_descriptors(sock: socket.socket, nbytes: int) -> tuple[bytes, list[int]]:
    """What `recv` gives, and the descriptors that came with it: closed in programs that this one starts."""
    data, descriptors, _, _ = socket.recv_fds(sock, nbytes, MAX_DESCRIPTORS)
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return data, list(descriptors)
