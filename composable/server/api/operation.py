"""An operation of the API: its address, what it takes, and what runs.

The table of operations makes both the routes and the OpenAPI description, so neither can lack what
the other has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from composable.errors import RegistryError
from composable.files.records import parse_record
from composable.server.accounts import Caller, find_caller
from composable.server.gateway import read_body
from composable.server.refusal import RefusedError
from composable.server.services import Services

# A manifest may have 1 MiB; JSON escapes make it larger.
MAX_JSON_BYTES: Final = 8 << 20
MAX_PARAMETER_LENGTH: Final = 300


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request to an operation.

    Args:
        services: The parts of the server.
        caller: Who sent it.
        path: The parts of its address that have names.
        query: Its query parameters.
        body: Its body: a record of the operation's type, or bytes.
        url: The registry's URL.
    """

    services: Services
    caller: Caller
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: Any
    url: str


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of the API.

    Args:
        method: HTTP method.
        path: Path below `/api/v1`, with parts in braces.
        run: What runs; the first line of its docstring is the summary.
        scope: What the token must allow; None if no token is needed.
        body: The record in the body; `bytes` for octets; None without one.
        query: Query parameters with their JSON schemas.
        status: The status of success.
        max_bytes: Maximum size of the body.
    """

    method: str
    path: str
    run: Callable[[Call], Any]
    scope: str | None = None
    body: type | None = None
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    status: int = 200
    max_bytes: int = MAX_JSON_BYTES

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (self.run.__doc__ or "").splitlines()[0]

    async def answer(self, request: Request) -> Response:
        """Answer a request: parse it, run, and return the result as JSON."""
        data = b""
        if self.body is not None:
            data = await read_body(request.receive, request.headers, self.max_bytes)
        result = await run_in_threadpool(self._run, request, data)
        if result is None:
            return Response(status_code=204)
        return JSONResponse(result, self.status, {"Cache-Control": "no-store"})

    def _run(self, request: Request, data: bytes) -> Any:
        services: Services = request.app.state.services
        with services.database.read() as session:
            caller = find_caller(session, request.headers.get("authorization"))
        if self.scope is not None:
            caller.require(self.scope)
        for name, value in (*request.path_params.items(), *request.query_params.items()):
            if len(value) > MAX_PARAMETER_LENGTH or "\0" in value:
                raise RefusedError(
                    422, "is too long, or has a character that is not text", where=name
                )
        call = Call(
            services=services,
            caller=caller,
            path=request.path_params,
            query=request.query_params,
            body=self._parse(data),
            url=base_url(request),
        )
        return self.run(call)

    def _parse(self, data: bytes) -> Any:
        if self.body is None or self.body is bytes:
            return data
        record: Any = parse_record(self.body, data or b"{}", "body", RegistryError)
        if b"\\u0000" in data:  # PostgreSQL has no such character
            raise RefusedError(422, "has a character that is not text", where="body")
        return record


def base_url(request: Request) -> str:
    """Return the registry's URL, without a slash at its end."""
    services: Services = request.app.state.services
    return services.settings.url or str(request.base_url).rstrip("/")


def read_number(call: Call, name: str, default: int, *, largest: int = 1 << 31) -> int:
    """Return a query parameter that is a whole number.

    Raises:
        RefusedError: 422 for any other text.
    """
    text = call.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= largest):
        raise RefusedError(422, f"{text[:40]!r} is not a whole number up to {largest}", where=name)
    return int(text)
