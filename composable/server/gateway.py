"""What every request passes: rate limits, security headers, errors as answers, log and metrics."""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from composable.errors import ComposableError
from composable.server.metrics import LOGGER
from composable.server.refusal import RefusedError, format_error, status_of
from composable.server.services import Services

SECURITY: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Strict-Transport-Security": "max-age=31536000",
}
_SAFE: Final = ("GET", "HEAD", "OPTIONS")


class Gateway:
    """The outermost layer of the application.

    Args:
        app: What answers requests.
        services: The parts of the server.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, sent = time.perf_counter(), 0, 0
        request_id = secrets.token_hex(8)

        async def send_on(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = request_id
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        self._services.metrics.start()
        try:
            await self._answer(scope, receive, send_on, lambda: status > 0, request_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - began
            self._services.metrics.finish(route, scope["method"], status, seconds, sent)
            fields = {
                "id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(seconds * 1000, 1),
                "bytes": sent,
                "client": _address(scope),
            }
            LOGGER.info("request", extra={"fields": fields})

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, has_begun: Any, request_id: str
    ) -> None:
        try:
            self._check_rate(scope)
            await self._app(scope, receive, send)
        except ComposableError as error:
            if has_begun():
                raise
            await to_response(error)(scope, receive, send)
        except ClientDisconnect:
            LOGGER.info("client disconnected", extra={"fields": {"id": request_id}})
        except Exception:
            LOGGER.exception("failed", extra={"fields": {"id": request_id}})
            if has_begun():
                raise
            text = f"an error of the server; its log has request {request_id}"
            await to_response(RefusedError(500, text))(scope, receive, send)

    def _check_rate(self, scope: Scope) -> None:
        if scope["path"].startswith("/health"):
            return
        token = Headers(scope=scope).get("authorization")
        # A token is counted by itself, so that colleagues behind one address do not share a limit.
        # An address has its limit too, or made-up tokens would lift it.
        callers = [_address(scope)]
        if token:
            callers.append(hashlib.sha256(token.encode()).hexdigest())
        limit = self._services.reads if scope["method"] in _SAFE else self._services.writes
        wait = max(limit.wait_seconds(caller) for caller in callers)
        if wait:
            raise RefusedError(429, "too many requests", retry_after=wait)


def to_response(error: ComposableError) -> JSONResponse:
    """Return the answer for an error."""
    status = status_of(error)
    headers = {"Cache-Control": "no-store"}
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="composable"'
    if isinstance(error, RefusedError) and error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(format_error(error), status, headers)


async def read_body(receive: Receive, headers: Headers, limit: int) -> bytes:
    """Return a request's body.

    Raises:
        RefusedError: 413 for more bytes than `limit`; 400 for a length that is not a number.
    """
    stated = headers.get("content-length", "0")
    if not stated.isascii() or not stated.isdigit():
        raise RefusedError(400, "is not a number", where="Content-Length")
    too_large = RefusedError(413, f"at most {limit:,} bytes are allowed", where="body")
    if int(stated[:20]) > 2 * limit:
        raise too_large
    data, size = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        size += len(message.get("body", b""))
        # A little more than the limit is read and dropped, so that the client gets the answer.
        if size <= limit:
            data += message.get("body", b"")
        if size > 2 * limit or (size > limit and not message.get("more_body", False)):
            raise too_large
        if not message.get("more_body", False):
            return bytes(data)


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else "local"
