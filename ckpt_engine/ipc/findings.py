"""Whether a parameter server and its worker reach each other here: sockets, what containers must share."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from ckpt_engine.findings import Finding, Level
from ckpt_engine.ipc.sockets import MAX_PATH_NBYTES, default_directory
from ckpt_engine.settings import GiB, Settings

NAMES_BELOW = "/01234567/w-0123456789abcdef.life"
"""The longest path in the directory, in its usual form."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the kernel has it
NAMESPACES = ("ipc", "net", "pid")


def find(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """The socket directory, /dev/shm, and this container's namespaces."""
    yield socket_directory(settings.socket_dir or default_directory())
    yield shared_memory(SHARED_MEMORY)
    yield namespaces(Path("/proc/self/ns"))


def socket_directory(path: Path) -> Finding:
    """Looks only: a parameter server makes it."""
    remedy = "set CKPT_ENGINE_SOCKET_DIR to a short path that is this user's alone (mode 0700)"
    nbytes = len(os.fsencode(f"{path}{NAMES_BELOW}"))
    if nbytes > MAX_PATH_NBYTES:
        message = f"{path} is too long: sockets in it have paths of {nbytes} bytes, over {MAX_PATH_NBYTES}"
        return Finding("sockets", Level.ERROR, message, remedy)
    try:
        status = path.lstat()
    except FileNotFoundError:
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            return Finding("sockets", Level.OK, f"{path} will be made")
        return Finding("sockets", Level.ERROR, f"{path} cannot be made in {parent}", remedy)
    except OSError as error:
        return Finding("sockets", Level.ERROR, f"{path}: {error.strerror}", remedy)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        message = f"{path} is no directory of this user that nobody else may enter (mode 0700)"
        return Finding("sockets", Level.ERROR, message, remedy)
    return Finding("sockets", Level.OK, f"{path}; the engine must see it, and have the same user")


def shared_memory(path: Path) -> Finding:
    """Where CPU engines, and files to be taken in place, have theirs."""
    try:
        found = os.statvfs(path)
    except OSError as error:
        return Finding(
            str(path),
            Level.WARNING,
            f"cannot be used: {error.strerror}",
            "mount a tmpfs there (docker --shm-size)",
        )
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    message = f"{free / GiB:.2f} of {total / GiB:.2f} GiB free"
    if total < GiB:
        return Finding(
            str(path),
            Level.WARNING,
            f"{message}: too little for engines of several workers, and for checkpoints in it",
            "docker run --shm-size=16g; in Kubernetes an emptyDir of medium Memory",
        )
    return Finding(str(path), Level.OK, message)


def namespaces(directory: Path) -> Finding:
    """Their numbers, to compare with what it says in the engine's container."""
    try:
        links = [os.readlink(directory / name) for name in NAMESPACES]
    except OSError as error:
        return Finding("namespaces", Level.WARNING, f"cannot be read: {error.strerror}")
    told = ", ".join(f"{link.partition(':')[0]} {link.partition('[')[2].rstrip(']')}" for link in links)
    message = f"{told}: run doctor in the engine's container too, which should show the same ipc"
    return Finding("namespaces", Level.OK, message)
