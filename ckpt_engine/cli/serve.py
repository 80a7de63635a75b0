"""`ckpt-engine serve`: one rank's parameter server behind its HTTP API, until SIGTERM or Ctrl-C.

Started once per rank by `torchrun`; alone it is a world of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_engine.cli import Verbose
from ckpt_engine.errors import CkptEngineError

if TYPE_CHECKING:
    from ckpt_engine.server.listening import TcpListener, UnixListener


def serve(
    uds: Annotated[
        str | None,
        typer.Option(
            help="Listen on this Unix socket; {rank} stands for the rank. Its directory must be this user's "
            "own (mode 0700); it is made if it is missing.",
            show_default="ps-{rank}.sock in the directory for sockets",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="With --port: the address to listen on.",
            show_default="127.0.0.1",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Listen on TCP instead; rank r listens on this port + r. It needs CKPT_ENGINE_API_TOKEN.",
        ),
    ] = None,
    without_token: Annotated[
        bool,
        typer.Option(
            "--without-token",
            help="With --port, on the loopback only: let every user of this host send requests.",
        ),
    ] = False,
    peers: Annotated[
        str | None,
        typer.Option(
            help="With --port: how rank 0 reaches the others. HOST or HOST:PORT of each rank, or HOST of "
            "each host, in order, separated by commas; or one with {rank} in it.",
            show_default="all ranks on this host",
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Serve the HTTP API. Run it on every rank with torchrun, or alone.

    With ?all_ranks=true a request to rank 0 is carried out on every rank.
    """
    if port is None and (host is not None or peers is not None or without_token):
        raise typer.BadParameter("say on which", param_hint="--port")
    if port is not None and uds is not None:
        raise typer.BadParameter("listen on --uds or on --port, not on both", param_hint="--uds")

    # First, since a missing extra is better known before anything is made.
    from ckpt_engine.server.serving import serve as serve_until_ended  # isort: skip
    from ckpt_engine.parameter_server import ParameterServer
    from ckpt_engine.server.access import Access
    from ckpt_engine.server.all_ranks import RankServers, tcp_addresses, unix_addresses, unix_path
    from ckpt_engine.server.listening import TcpListener, UnixListener, default_uds, read_token

    with ParameterServer() as ps:
        token = read_token(ps.settings)
        # With a token the socket's own user is not who sends requests: why else would there be one.
        access = Access.of(ps.settings, own_user=port is None and token is None)
        listen: Callable[[], TcpListener | UnixListener]
        if port is not None:
            address, own_port = host or "127.0.0.1", port + ps.rank
            if port + ps.world_size - 1 > 65535:
                raise typer.BadParameter(
                    f"{port} + {ps.world_size - 1} is over 65535: each of {ps.world_size} ranks has a port",
                    param_hint="--port",
                )
            addresses = tcp_addresses(
                host=address,
                port=port,
                peers=peers,
                world_size=ps.world_size,
                ranks_per_host=ps.settings.local_world_size or ps.world_size,
            )
            listen = partial(TcpListener, address, own_port, token, without_token=without_token)
        else:
            template = str(Path(uds or default_uds(ps.settings)).absolute())
            addresses = unix_addresses(template, ps.world_size)
            path = Path(unix_path(template, ps.rank, ps.world_size))
            listen = partial(UnixListener, path)
        signum = serve_until_ended(
            ps,
            listen,
            servers=RankServers(addresses, token),
            token=token,
            access=access,
            local_only=port is not None and token is None,
            announce=lambda at: typer.echo(f"rank {ps.rank} of {ps.world_size} listens on {at}"),
        )
        if signum is None:
            raise CkptEngineError("the HTTP server ended by itself; its log says why")
