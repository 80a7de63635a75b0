"""What stands before the routes: the token, the bounds on a body, and the last resort for errors."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from typing import TYPE_CHECKING

from ckpt_engine.server.api_models import ErrorBody
from ckpt_engine.server.failures import body_of, to_json

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

MAX_METAS_NBYTES = 64 * 1024 * 1024
"""Body of POST /v1/metas: the metas of thousands of ranks."""
MAX_BODY_NBYTES = 1024 * 1024
"""Any other body."""
BODY_SECONDS = 60.0
"""How long a body may take to come."""
_LOOPBACK_HOST = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)


class Guard:
    """ASGI middleware.

    Args:
        token: what `Authorization: Bearer` must carry on every request; None: nothing.
        local_only: `Host` must be the loopback's.
    """

    def __init__(self, app: ASGIApp, token: str | None, local_only: bool = False) -> None:
        self._app = app
        self._local_only = local_only
        self._token = _digest(token.encode()) if token is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._token is not None and not self._knows_token(headers.get(b"authorization", b"")):
            message = "give the server's token (CKPT_ENGINE_API_TOKEN) as Authorization: Bearer TOKEN"
            await _refuse(send, 401, "Unauthorized", message, [(b"www-authenticate", b"Bearer")])
            return
        # Browsers say where a page comes from whenever it may change something: this is no place for pages.
        # One whose own name now points to the loopback need not, but names itself as the host.
        if b"origin" in headers or (
            self._local_only and not _LOOPBACK_HOST.fullmatch(headers.get(b"host", b""))
        ):
            message = "requests of web pages are refused, and so are those for another host than the loopback"
            await _refuse(send, 403, "Forbidden", message)
            return
        limit = MAX_METAS_NBYTES if scope["path"] == "/v1/metas" else MAX_BODY_NBYTES
        length = headers.get(b"content-length", b"0")
        if len(length) > 18 or (length.isdigit() and int(length) > limit):
            await _refuse_body(send, limit)
            return
        try:
            body = await asyncio.wait_for(_body(receive, limit), BODY_SECONDS)
        except asyncio.TimeoutError:
            await _refuse(send, 408, "BodyTooSlow", f"the body did not come within {BODY_SECONDS:g} s")
            return
        except _TooLargeError:
            await _refuse_body(send, limit)
            return
        if body is None:
            return
        if body and headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            # A page in a browser on this host may send other types without asking first.
            await _refuse(send, 415, "UnsupportedMediaType", "the body must be application/json")
            return
        await self._answer(scope, body, receive, send)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        given = False
        answering = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watched(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        try:
            await self._app(scope, replay, watched)
        except Exception as error:
            if answering:
                raise
            # Not a handler of the framework: that one answers, and then raises the error again.
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await _send(send, 500, body_of(error))

    def _knows_token(self, given: bytes) -> bool:
        assert self._token is not None
        scheme, _, token = given.partition(b" ")
        # Digests: a comparison of equal lengths, in constant time.
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(token.strip()), self._token)


class _TooLargeError(Exception):
    """A body is over its limit."""


async def _body(receive: Receive, limit: int) -> bytes | None:
    """A request's body; None: the client is gone. Raises _TooLargeError once it is over the limit."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = bool(message.get("more_body"))
        if len(body) > limit:
            raise _TooLargeError
    return bytes(body)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


async def _refuse_body(send: Send, limit: int) -> None:
    await _refuse(send, 413, "BodyTooLarge", f"the body is over the limit of {limit} bytes")


async def _refuse(
    send: Send, status: int, error_type: str, message: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    await _send(send, status, ErrorBody(error_type=error_type, message=message), headers)


async def _send(
    send: Send, status: int, error: ErrorBody, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = to_json(error.model_dump())
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": fields + (headers or [])})
    await send({"type": "http.response.body", "body": body})
