"""A process of another user that tries to get in. Run as root, with what to attack as JSON on stdin.

It becomes `nobody` first, for good, and then says as JSON what each attempt came to: "denied" where the
kernel refused it, "closed" where the other side hung up, else what it got.

    {"uid": 65534, "paths": [sockets], "directories": [...], "pids": [...], "ports": [TCP], "files": [...],
     "crowd": how many connections to hold to each port, "own": a socket that anybody may connect to}
"""

from __future__ import annotations

import contextlib
import ctypes
import encodings.idna  # noqa: F401 - while modules can still be read
import glob
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

SECONDS = 10.0
PTRACE_ATTACH = 16


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    with contextlib.suppress(PermissionError):
        os.setuid(0)
        raise SystemExit("it can become root again")


def attempt(act: Callable[[], object]) -> str:
    try:
        return f"got {act()!r}"
    except PermissionError:
        return "denied"
    except OSError as error:
        return f"failed: {type(error).__name__}"


def connect(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS)
        sock.connect(path)
        return "connected"


def trace(pid: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(PTRACE_ATTACH, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    return "attached"


def read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 16)
    finally:
        os.close(fd)


def clear(directory: str) -> None:
    os.unlink(f"{directory}/lock")


def memory_of(pid: int) -> list[str]:
    """Every way into another process's rings that /proc offers."""
    outcomes = [attempt(lambda: os.listdir(f"/proc/{pid}/fd")), attempt(lambda: read(f"/proc/{pid}/mem"))]
    outcomes += [attempt(lambda fd=fd: read(f"/proc/{pid}/fd/{fd}")) for fd in range(3, 64)]
    outcomes.append(attempt(lambda: os.listdir(f"/proc/{pid}/map_files")))
    outcomes.append(attempt(lambda: read(f"/proc/{pid}/environ")))
    return outcomes


def say_to(port: int, said: bytes) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as sock:
        try:
            sock.sendall(said)
            data = sock.recv(64)
        except ConnectionError:
            return "closed"
        except TimeoutError:
            return "silence"
        return "closed" if not data else f"answered {data!r}"


def joins() -> list[bytes]:
    """Words of a rank that does not know the token: the control server's frames, written by hand."""

    def text(value: str) -> bytes:
        return b"\xd9" + bytes([len(value)]) + value.encode()

    found = []
    for token in ("", "0" * 32, "guess"):
        body = b"\x95" + text("Join") + b"\x02" + text(token) + b"\x01\x01"
        found.append(struct.pack("<I", len(body)) + body)
    body = b"\x91" + text("Goodbye")
    return [*found, struct.pack("<I", len(body)) + body, b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n"]


def main() -> None:
    plan: dict[str, Any] = json.loads(sys.stdin.readline())
    become(plan["uid"])
    said: dict[str, Any] = {
        "uid": os.getuid(),
        "own": attempt(lambda: connect(plan["own"])),
        "paths": {path: attempt(lambda path=path: connect(path)) for path in plan["paths"]},
        "directories": {
            path: [
                attempt(lambda path=path: os.listdir(path)),
                attempt(lambda path=path: os.unlink(path + "/x")),
            ]
            for path in plan["directories"]
        },
        "files": {
            path: attempt(lambda path=path: read(path))
            for path in [*plan["files"], *(p for pid in plan["pids"] for p in glob.glob(f"/dev/shm/*{pid}*"))]
        },
        "signals": {
            str(pid): [
                attempt(lambda pid=pid, number=number: os.kill(pid, number))
                for number in (0, signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL)
            ]
            for pid in plan["pids"]
        },
        "traced": {str(pid): attempt(lambda pid=pid: trace(pid)) for pid in plan["pids"]},
        "memory": {str(pid): memory_of(pid) for pid in plan["pids"]},
        "ports": {str(port): [say_to(port, words) for words in joins()] for port in plan["ports"]},
    }
    crowd = []
    for port in plan["ports"]:
        for _ in range(plan["crowd"]):
            with contextlib.suppress(OSError):
                crowd.append(socket.create_connection(("127.0.0.1", port), timeout=SECONDS))
    said["crowd"] = len(crowd)
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()  # until the test is done with the crowd
    for sock in crowd:
        sock.close()


if __name__ == "__main__":
    main()
