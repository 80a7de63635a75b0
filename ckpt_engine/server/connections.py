"""HTTP connections, bounded in number and in silence.

Each takes a descriptor of a process that an update needs descriptors of, and whoever reaches a port may open
as many as it likes, with or without a token.
"""

from __future__ import annotations

import asyncio
import itertools

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 256
"""The oldest one without a request at work goes when one too many comes."""
REQUEST_SECONDS = 20.0
"""How long a new connection may take to send its first request's head."""

_NUMBERS = itertools.count()


class BoundedConnection(H11Protocol):
    """One of at most MAX_CONNECTIONS."""

    number = -1
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        self.number = next(_NUMBERS)
        others = [
            one
            for one in self.connections
            if isinstance(one, BoundedConnection) and not one.transport.is_closing()
        ]
        super().connection_made(transport)
        if len(others) >= MAX_CONNECTIONS:
            min((one for one in [*others, self] if one.idle), key=lambda one: one.number).transport.abort()
        self._patience = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """No request of it is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _give_up(self) -> None:
        if self.cycle is None:
            self.transport.abort()
