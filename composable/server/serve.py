"""Run a server until it is told to stop, and then answer what is running."""

from __future__ import annotations

from typing import Final

import uvicorn

from composable.server.app import make_app
from composable.server.metrics import start_logging
from composable.server.services import Services

# Requests that are running when the server is told to stop have this long.
STOP_SECONDS: Final = 30
# Connections that wait until they are accepted.
BACKLOG: Final = 4096
KEEP_ALIVE_SECONDS: Final = 15


def serve(services: Services, *, host: str, port: int) -> None:
    """Serve a registry until SIGINT or SIGTERM.

    Args:
        services: The parts of the server; closed at the end.
        host: The address to listen at.
        port: The port.
    """
    start_logging()
    config = uvicorn.Config(
        make_app(services),
        host=host,
        port=port,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
        access_log=False,
        log_config=None,
        server_header=False,
        h11_max_incomplete_event_size=64 << 10,
    )
    try:
        uvicorn.Server(config).run()
    finally:
        services.close()
