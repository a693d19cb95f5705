"""The application: which address is answered by what."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

import anyio.to_thread
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from composable import __version__
from composable.errors import ComposableError
from composable.server import layout
from composable.server.api import (
    accounts,
    openapi,
    packages,
    proposals,
    publications,
    signatures,
)
from composable.server.database import MAX_CONNECTIONS
from composable.server.gateway import Gateway, to_response
from composable.server.metrics import LOGGER
from composable.server.pages import routes as pages
from composable.server.refusal import RefusedError
from composable.server.services import Services

# Headers of an error that hold for its page too.
_KEPT: Final = ("www-authenticate", "retry-after", "cache-control")
OPERATIONS: Final = (
    *accounts.OPERATIONS,
    *publications.OPERATIONS,
    *proposals.OPERATIONS,
    *packages.OPERATIONS,
    *signatures.OPERATIONS,
)
# How often a server looks whether it has to confirm its registry again.
RENEW_SECONDS: Final = 3600.0


def make_app(services: Services) -> Starlette:
    """Return the application of a server.

    Args:
        services: The parts that it uses.
    """

    @contextlib.asynccontextmanager
    async def run(app: Starlette) -> AsyncIterator[None]:
        # One thread for each connection to the database.
        anyio.to_thread.current_default_thread_limiter().total_tokens = MAX_CONNECTIONS
        with services.database.read() as session:
            services.search.refresh(session)  # so that the first visitor need not wait for it
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_keep_confirmed, services)
            yield
            tasks.cancel_scope.cancel()

    app = Starlette(
        routes=[
            *(Route(path, answer, methods=["GET"]) for path, answer in layout.ROUTES),
            *(Route(openapi.PREFIX + op.path, op.answer, methods=[op.method]) for op in OPERATIONS),
            Route(f"{openapi.PREFIX}/openapi.json", _describe_api, methods=["GET"]),
            Route("/health/live", _is_alive, methods=["GET"]),
            Route("/health/ready", _is_ready, methods=["GET"]),
            Route("/metrics", _get_metrics, methods=["GET"]),
            *(Route(path, answer, methods=["GET"]) for path, answer in pages.ROUTES),
        ],
        middleware=[Middleware(Gateway, services=services)],
        exception_handlers={HTTPException: _explain_status, ComposableError: _explain_error},
        lifespan=run,
    )
    app.state.services = services
    return app


async def _keep_confirmed(services: Services) -> None:
    """Confirm a signed registry again before what was confirmed ends."""
    while True:
        try:
            await anyio.to_thread.run_sync(services.signing.renew)
        except (ComposableError, SQLAlchemyError) as error:
            # Clients accept what was confirmed for days more; the next attempt is in an hour.
            LOGGER.error("not confirmed: %s", error)
        await anyio.sleep(RENEW_SECONDS)


def _describe_api(request: Request) -> Response:
    title = request.app.state.services.settings.title
    return JSONResponse(openapi.describe_api(OPERATIONS, title, __version__))


def _is_alive(request: Request) -> Response:
    return PlainTextResponse("ok\n")


def _is_ready(request: Request) -> Response:
    request.app.state.services.check_ready()
    return PlainTextResponse("ok\n")


def _get_metrics(request: Request) -> Response:
    return Response(
        request.app.state.services.metrics.render(), media_type="text/plain; version=0.0.4"
    )


def _explain_status(request: Request, error: Exception) -> Response:
    """Answer for an address or a method that does not exist."""
    assert isinstance(error, HTTPException)
    response = _explain_error(request, RefusedError(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response


def _explain_error(request: Request, error: Exception) -> Response:
    """Answer with an error: as a page to a browser, as JSON to any other client."""
    assert isinstance(error, ComposableError)
    response: Response = to_response(error)
    if "text/html" in request.headers.get("accept", ""):
        page = pages.render_error(request, error)
        page.headers.update({k: v for k, v in response.headers.items() if k in _KEPT})
        return page
    return response
