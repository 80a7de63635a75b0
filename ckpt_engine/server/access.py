"""What a request may name: files below allowed roots, and engines on allowed hosts.

Who can use the HTTP API lets the parameter server read files and send requests. Where that is only its own
user, who may do both anyway, any file and any Unix socket may be named. Everybody else is held to what
CKPT_ENGINE_ALLOWED_ROOTS and CKPT_ENGINE_ALLOWED_ENGINES say: no files where the first is not set, and only
engines on the loopback where the second is not.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from ckpt_engine.checkpoint import checkpoint_files
from ckpt_engine.checkpoint.index import INDEX_NAME
from ckpt_engine.checkpoint.npy_file import NPY_SUFFIX, sidecar_of
from ckpt_engine.errors import CkptEngineError, ConfigError
from ckpt_engine.server.api_models import EngineTarget
from ckpt_engine.settings import Settings

ROOTS = "CKPT_ENGINE_ALLOWED_ROOTS"
ENGINES = "CKPT_ENGINE_ALLOWED_ENGINES"
_UNIX = "unix:"
_PORTS = {"http": 80, "https": 443}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class NotAllowedError(CkptEngineError):
    """A request names a file or an engine that this server may not be asked for."""


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """Where engines may be: `hosts`, a name in lower case or a network of addresses; `port`: None: any."""

    hosts: str | Network
    port: int | None = None

    @classmethod
    def parse(cls, entry: str) -> EnginePlace:
        """`host`, `host:port`, an address, `[IPv6]:port`, or a network such as `10.0.0.0/8`.

        Raises:
            ConfigError: it is none of these.
        """
        network = _network(entry.removeprefix("[").removesuffix("]"))
        if network is not None:
            return cls(network)
        host, colon, port = entry.rpartition(":")
        if not colon:
            host, port = entry, ""
        elif not port.isdigit() or not 0 < int(port) < 65536:
            host = ""
        host = host.removeprefix("[").removesuffix("]")
        found = _network(host) or host.lower().rstrip(".")
        if not found or (isinstance(found, str) and not all(c.isalnum() or c in "-._" for c in found)):
            raise ConfigError(
                f"{ENGINES}: {entry!r} is no host, host:port, network or unix:/path; separate them by commas"
            )
        return cls(found, int(port) if port else None)

    def holds(self, host: str, port: int) -> bool:
        if self.port not in (None, port):
            return False
        if isinstance(self.hosts, str):
            return host.lower().rstrip(".") == self.hosts
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        # Such as ::ffff:127.0.0.1: a connection to it is one to the IPv4 address.
        return (getattr(address, "ipv4_mapped", None) or address) in self.hosts


def _network(text: str) -> Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


LOOPBACK = tuple(map(EnginePlace.parse, ("localhost", "127.0.0.0/8", "::1")))


@dataclass(frozen=True, slots=True)
class Access:
    """`roots`: directories, links followed; None: every file. `engines`: where they are asked over TCP.
    `sockets`: Unix sockets, or directories of them; None: every one.
    """

    roots: tuple[Path, ...] | None
    engines: tuple[EnginePlace, ...]
    sockets: tuple[Path, ...] | None

    @classmethod
    def of(cls, settings: Settings, *, own_user: bool) -> Access:
        """As the settings say.

        Args:
            own_user: only processes of this server's own user can send requests.

        Raises:
            ConfigError: a setting is not what it may be.
        """
        roots: tuple[Path, ...] | None = None if own_user else ()
        if settings.allowed_roots is not None:
            roots = tuple(_directory(ROOTS, entry) for entry in settings.allowed_roots.split(os.pathsep))
        if settings.allowed_engines is None:
            return cls(roots, LOOPBACK, None if own_user else ())
        entries = [entry.strip() for entry in settings.allowed_engines.split(",")]
        sockets = [entry.removeprefix(_UNIX) for entry in entries if entry.startswith(_UNIX)]
        places = [entry for entry in entries if not entry.startswith(_UNIX)]
        return cls(
            roots,
            tuple(map(EnginePlace.parse, places)),
            tuple(_directory(ENGINES, path) for path in sockets),
        )

    def files(self, paths: Sequence[str]) -> list[str]:
        """The files at these paths; a directory stands for those of the checkpoint in it.

        Where there are roots, nothing is read before it is known where the path leads. That what is loaded is
        what was looked at rests on those who may write below the roots: they could exchange a link meanwhile.

        Raises:
            NotAllowedError: one does not lie below the roots.
            CheckpointError, CheckpointFormatError: as of `checkpoint_files`.
        """
        if self.roots is None:
            # A path that leads nowhere is for whoever reads it to tell.
            each = (checkpoint_files(path) if os.path.isdir(path) else [Path(path)] for path in paths)
            return [str(file) for files in each for file in files]
        found: dict[Path, None] = {}
        for path in map(Path, paths):
            self._check_file(path)
            if path.is_dir():
                self._check_file(path / INDEX_NAME)
            for file in checkpoint_files(path):
                self._check_file(file)
                if file.suffix == NPY_SUFFIX:
                    self._check_file(sidecar_of(file))
                # Its own name stays: in a cache of models it is a link, to a file without a suffix.
                found[Path(os.path.realpath(file.parent), file.name)] = None
        return list(map(str, found))

    def check_engines(self, engines: Iterable[EngineTarget]) -> None:
        """Raises NotAllowedError: one of them must not be asked. ConfigError: its address is none."""
        for engine in engines:
            if engine.uds is not None:
                self._check_socket(engine.uds)
            else:
                self._check_url(engine.update_url)

    def _check_file(self, path: Path) -> None:
        assert self.roots is not None
        if not _below(os.path.realpath(path), self.roots):
            raise NotAllowedError(
                f"{path} does not lie, after its links were followed, in a directory that requests may name "
                f"files of: {os.pathsep.join(map(str, self.roots)) or 'there is none'}. {ROOTS} says which"
            )

    def _check_socket(self, path: str) -> None:
        if not path.startswith("/") or "\0" in path:
            raise ConfigError(f"uds {path!r} is not an absolute path")
        if self.sockets is not None and not _below(os.path.realpath(path), self.sockets):
            raise NotAllowedError(
                f"uds {path}: this server may not be asked to send requests there. {ENGINES} says where it "
                f"may: put {_UNIX}{path}, or its directory, into the list"
            )

    def _check_url(self, text: str) -> None:
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise ConfigError(f"update_url is no address: {error}") from None
        if url.userinfo:
            # Not repeated here, nor in what the engine client says of it.
            raise ConfigError("update_url must not hold a user or a password")
        if url.scheme not in _PORTS or not url.host:
            raise ConfigError(f"update_url {text!r}: give a URL such as http://127.0.0.1:8000/collective_rpc")
        port = url.port or _PORTS[url.scheme]
        if not any(place.holds(url.host, port) for place in self.engines):
            raise NotAllowedError(
                f"update_url: this server may not be asked to send requests to {url.host}:{port}. {ENGINES} "
                "says where it may: a list of hosts, host:port, networks such as 10.0.0.0/8, and unix:/path; "
                "where it is not set, the loopback only"
            )


def _below(path: str, roots: Iterable[Path]) -> bool:
    return any(root == (found := Path(path)) or root in found.parents for root in roots)


def _directory(variable: str, entry: str) -> Path:
    if not entry.startswith("/") or "\0" in entry:
        raise ConfigError(f"{variable}: {entry!r} is not an absolute path")
    return Path(os.path.realpath(entry))
