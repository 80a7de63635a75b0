"""Where the HTTP API listens, and who can reach it there."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc.sockets import MAX_PATH_NBYTES, default_directory, listen, locked, private_directory
from ckpt_engine.settings import Settings


def default_uds(settings: Settings) -> str:
    """The template of the ranks' sockets where none is given."""
    return str((settings.socket_dir or default_directory()) / "ps-{rank}.sock")


class UnixListener:
    """A listening Unix socket that only this user can reach; `close` removes its file.

    Raises:
        ConfigError: another process serves there; the directory is not this user's own; or the path is too
            long, or taken by something that is not a socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        if len(os.fsencode(self.path)) > MAX_PATH_NBYTES:
            raise ConfigError(f"--uds {self.path}: a socket's path may have {MAX_PATH_NBYTES} bytes")
        try:
            private_directory(self.path.parent)
        except ConfigError:
            raise ConfigError(
                f"--uds {self.path}: {self.path.parent} must be a directory of this user that nobody else "
                "may enter (mode 0700): who can connect can change an engine's weights"
            ) from None
        # Two servers that start at once must not both take a dead one's place.
        with locked(self.path.parent):
            self._make_room()
            try:
                self.sock = listen(str(self.path))
            except OSError as error:
                raise ConfigError(f"--uds {self.path}: {error}") from error
            self._inode = self.path.lstat().st_ino

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def close(self) -> None:
        """Idempotent. Leaves a file alone that is another server's by now."""
        self.sock.close()
        # A directory that is gone took the socket with it.
        with suppress(FileNotFoundError), locked(self.path.parent):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()
        self._inode = -1

    def _make_room(self) -> None:
        """Removes what a dead server left."""
        try:
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise ConfigError(f"--uds {self.path}: something that is not a socket is there")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX) as probe:
            # Without blocking: a live server may be too busy to accept.
            probe.setblocking(False)
            if probe.connect_ex(str(self.path)) != errno.ECONNREFUSED:
                raise ConfigError(f"--uds {self.path}: another process serves there")
        self.path.unlink()


class TcpListener:
    """A listening TCP socket.

    Args:
        token: the token that the server asks for, if any.
        without_token: it may be none on the loopback.

    Raises:
        ConfigError: there must be a token; or the address cannot be had.
    """

    def __init__(self, host: str, port: int, token: str | None, *, without_token: bool = False) -> None:
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM) if host else []
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"--host {host}: {error}") from None
        if not found:
            raise ConfigError(f"--host {host!r}: give an address of this host")
        family, _, _, _, address = found[0]
        if token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise ConfigError(
                f"--host {host} can be reached from other hosts, and who can reach it can change an engine's "
                "weights: set CKPT_ENGINE_API_TOKEN to a secret, the same on all ranks, or listen on "
                "127.0.0.1 or a Unix socket"
            )
        if token is None and not without_token:
            raise ConfigError(
                f"--host {host} --port can be reached by every user of this host, and who can reach it can "
                "change an engine's weights: set CKPT_ENGINE_API_TOKEN to a secret, the same on all ranks, "
                "or listen on a Unix socket (--uds); or, where you trust them all, say --without-token"
            )
        try:
            self.sock = socket.create_server(address, family=family, backlog=128)
        except OSError as error:
            raise ConfigError(f"--host {host} --port: {address[0]}:{port}: {error.strerror}") from None
        self.port: int = self.sock.getsockname()[1]
        shown = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
        self._url = f"http://{shown}:{self.port}"

    def __str__(self) -> str:
        return self._url

    def close(self) -> None:
        self.sock.close()


def read_token(settings: Settings) -> str | None:
    """CKPT_ENGINE_API_TOKEN.

    Raises:
        ConfigError: it cannot be sent in a header. The message does not show it.
    """
    if settings.api_token is None:
        return None
    token = settings.api_token.get_secret_value()
    if not token or not all("!" <= c <= "~" for c in token):
        raise ConfigError("CKPT_ENGINE_API_TOKEN must be visible ASCII without blanks; unset it for no token")
    return token
