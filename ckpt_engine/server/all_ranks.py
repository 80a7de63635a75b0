"""The other ranks' servers: where they are, and one request sent to all of them at once (rank 0 only)."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from ckpt_engine.errors import ConfigError
from ckpt_engine.server.api_models import RankAnswer
from ckpt_engine.server.failures import RankBusy, RankUnreachable, body_of, status_of

MAX_ANSWER_NBYTES = 8 * 1024 * 1024
"""Largest answer of a rank: its error, with a record and a traceback."""
_PROBE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class RankAddress:
    """Where a rank's server listens: a URL, over TCP or over a Unix socket."""

    url: str
    uds: str | None = None

    def __str__(self) -> str:
        return f"unix:{self.uds}" if self.uds else self.url


class RankServers:
    """The servers of all ranks, by rank.

    Args:
        token: the one that all of them want.
    """

    def __init__(self, addresses: Sequence[RankAddress], token: str | None = None) -> None:
        self._addresses = addresses
        self._token = token

    async def check(self, ranks: Iterable[int], world_size: int) -> None:
        """Asks the ranks how they are: where one of them cannot take part, all the others would wait for it.

        Raises:
            RankUnreachable: one does not answer.
            RankBusy: one is at another operation.
            ConfigError: at its address is another rank, or one of another world.
        """
        ranks = list(ranks)
        answers = await asyncio.gather(
            *(self.ask(rank, "GET", "/v1/healthz", None, _PROBE_SECONDS) for rank in ranks)
        )
        for rank, answer in zip(ranks, answers, strict=True):
            where = f"rank {rank}'s server at {self._addresses[rank]}"
            health = answer.answer
            if answer.status != 200:
                raise RankUnreachable(f"{where} is not well (HTTP {answer.status}): {health.get('message')}")
            if (health.get("rank"), health.get("world_size")) != (rank, world_size):
                raise ConfigError(
                    f"{where} says that it is rank {health.get('rank')} of {health.get('world_size')}, not "
                    f"{rank} of {world_size}: correct the addresses given to `ckpt-engine serve`"
                )
            if running := health.get("running"):
                raise RankBusy(f"{where} is at the {running['operation']} of {running['checkpoint']!r}")

    async def ask(self, rank: int, method: str, path: str, body: bytes | None, timeout: float) -> RankAnswer:
        """One request to one rank, at most `timeout` seconds. Never raises: a failure is an answer too."""
        address = self._addresses[rank]
        try:
            return await asyncio.wait_for(self._exchange(address, method, path, body), timeout)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, asyncio.TimeoutError) as error:
            late = isinstance(error, asyncio.TimeoutError)
            what = f"did not answer within {timeout:g} s" if late else f"{type(error).__name__}: {error}"
            failure = RankUnreachable(f"rank {rank}'s server at {address}: {what}")
            failure.__cause__ = error
            status = 504 if late else status_of(failure)
            return RankAnswer(status=status, answer=body_of(failure).model_dump())

    async def _exchange(self, address: RankAddress, method: str, path: str, body: bytes | None) -> RankAnswer:
        headers = {"Connection": "close", "Accept-Encoding": "identity"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        if address.uds is not None:
            # httpcore leaks the Unix socket of a connection that fails (a ResourceWarning, later on).
            with socket.socket(socket.AF_UNIX) as probe:
                probe.setblocking(False)
                probe.connect(address.uds)
        # The request as a whole has a deadline; a transport given by hand switches proxies off.
        transport = httpx.AsyncHTTPTransport(uds=address.uds)
        async with (
            httpx.AsyncClient(transport=transport, timeout=None) as client,  # noqa: S113 - see above
            client.stream(method, address.url + path, content=body, headers=headers) as response,
        ):
            text = bytearray()
            async for part in response.aiter_bytes():
                text += part
                if len(text) > MAX_ANSWER_NBYTES:
                    raise ValueError(f"its answer is over the limit of {MAX_ANSWER_NBYTES} bytes")
        answer: Any = json.loads(text)
        if not isinstance(answer, dict):
            raise ValueError("its answer is not a JSON object")
        return RankAnswer(status=response.status_code, answer=answer)


def unix_path(template: str, rank: int, world_size: int) -> str:
    """`template` with `{rank}` filled in.

    Raises:
        ConfigError: several ranks would share one path.
    """
    if world_size > 1 and "{rank}" not in template:
        raise ConfigError(
            f"--uds {template}: put {{rank}} into it, since each of {world_size} ranks has its own"
        )
    return template.replace("{rank}", str(rank))


def unix_addresses(template: str, world_size: int) -> list[RankAddress]:
    """Every rank's address on Unix sockets of one host."""
    return [
        RankAddress("http://localhost", unix_path(template, rank, world_size)) for rank in range(world_size)
    ]


def tcp_addresses(
    *, host: str, port: int, peers: str | None, world_size: int, ranks_per_host: int
) -> list[RankAddress]:
    """Every rank's address over TCP; rank r listens on `port + r` unless `peers` says otherwise.

    Args:
        host: the address that this rank listens on; where `peers` is None it stands for all ranks, which
            then must be on one host.
        peers: `host` or `host:port` of each rank, or of each host, in order and separated by commas; or
            one with `{rank}` in it.

    Raises:
        ConfigError: what is missing, or does not fit.
    """
    hosts = -(-world_size // ranks_per_host)
    if peers is None:
        if hosts > 1:
            raise ConfigError(
                f"{world_size} ranks on {hosts} hosts: give --peers, the address of each host in the order "
                "of their ranks, so that rank 0 can reach them"
            )
        names = [{"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)] * world_size  # noqa: S104 - asked, not bound
        return [_tcp_address(_bracketed(name), port + rank) for rank, name in enumerate(names)]
    entries = [entry.strip() for entry in peers.split(",")]
    if len(entries) == 1 and "{rank}" in peers:
        entries = [peers.replace("{rank}", str(rank)) for rank in range(world_size)]
    elif len(entries) == hosts and hosts != world_size:
        entries = [entries[rank // ranks_per_host] for rank in range(world_size)]
        if any(_port_of(entry) is not None for entry in entries):
            raise ConfigError(f"--peers {peers}: one entry for each host cannot have a port: leave it out")
    if len(entries) != world_size or not all(entries):
        raise ConfigError(
            f"--peers {peers}: give {world_size} entries, one for each rank, or {hosts}, one for each host, "
            "or one with {rank} in it"
        )
    return [_tcp_address(entry, port + rank) for rank, entry in enumerate(entries)]


def _tcp_address(entry: str, port: int) -> RankAddress:
    own = _port_of(entry)
    try:
        url = httpx.URL(f"http://{entry}" if own is not None else f"http://{entry}:{port}")
    except httpx.InvalidURL as error:
        raise ConfigError(f"--peers: {entry!r} is neither host nor host:port ({error})") from None
    # The port is None where it is 80, which http leaves out.
    if not url.host or url.path != "/" or url.query or url.userinfo or not 0 < (url.port or 80) < 65536:
        raise ConfigError(f"--peers: {entry!r} is neither host nor host:port")
    return RankAddress(str(url).rstrip("/"))


def _port_of(entry: str) -> str | None:
    """The port that an entry names; an IPv6 address is in brackets."""
    _, colon, port = entry.rpartition("]")[2].rpartition(":")
    return port if colon else None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
