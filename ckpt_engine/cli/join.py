"""Metas of the fleets that a command is to join: from files, or asked of live parameter servers."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_engine.errors import CheckpointError, CheckpointFormatError, ConfigError, EngineRequestError

if TYPE_CHECKING:
    from ckpt_engine.metadata import Metas

ASK_SECONDS = 60.0
MAX_METAS_NBYTES = 64 * 1024 * 1024


def fleets_of(files: Sequence[Path], urls: Sequence[str]) -> list[Metas]:
    """The fleets to join.

    Args:
        urls: of parameter servers (`ckpt-engine serve`), one of each fleet: `http://host:port`, or
            `unix:/path/of/its/socket`.

    Raises:
        ConfigError, CheckpointFormatError: a file cannot be read, or is no metas document.
        EngineRequestError: a parameter server cannot be asked.
        CheckpointError: the metas are not of one checkpoint, or it cannot be read by P2P.
    """
    from ckpt_engine.planning.sources import check_fleets

    fleets = [fleet for path in files for fleet in _of_file(path)]
    fleets += [fleet for url in urls for fleet in _of_server(url)]
    if fleets:
        try:
            check_fleets(fleets)
        except CheckpointError as error:
            raise CheckpointError(f"{', '.join([*map(str, files), *urls])}: {error}") from None
    return fleets


def _of_file(path: Path) -> list[Metas]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--load-metas-file {path}: {error.strerror or error}") from error
    return _checked(text, f"--load-metas-file {path}")


def _of_server(url: str) -> list[Metas]:
    import httpx

    from ckpt_engine.settings import load_settings

    token = load_settings().api_token
    headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token is not None else {}
    uds = url.removeprefix("unix:") if url.startswith("unix:") else None
    base = "http://localhost" if uds else url.rstrip("/")
    try:
        if uds is not None:
            # httpcore leaks the Unix socket of a connection that fails (a ResourceWarning, later on).
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(uds)
        with (
            httpx.Client(transport=httpx.HTTPTransport(uds=uds), timeout=ASK_SECONDS) as client,
            client.stream("GET", f"{base}/v1/metas", headers=headers) as response,
        ):
            text = bytearray()
            for part in response.iter_bytes():
                text += part
                if len(text) > MAX_METAS_NBYTES:
                    raise EngineRequestError(f"--join {url}: its metas are over {MAX_METAS_NBYTES} bytes")
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise EngineRequestError(f"--join {url}: {type(error).__name__}: {error}") from error
    if response.status_code != 200:
        raise EngineRequestError(f"--join {url}: HTTP {response.status_code}: {bytes(text[:1000])!r}")
    return _checked(bytes(text), f"--join {url}")


def _checked(text: bytes, what: str) -> list[Metas]:
    from ckpt_engine.metadata import fleets_from_json

    try:
        fleets = fleets_from_json(text)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{what}: {error}") from None
    if not any(held.tensor_count for fleet in fleets for held in fleet.values()):
        raise ConfigError(f"{what}: its ranks hold no tensor")
    return fleets
