"""What a server counts, in the format of Prometheus, and its log: one line of JSON per event."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS: Final = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0)
LOGGER: Final = logging.getLogger("composable.server")


class Metrics:
    """Counts of one server process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "composable_requests_total",
            "Requests, by route and status.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "composable_request_seconds",
            "Time until the response was sent.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._bytes = Counter(
            "composable_sent_bytes_total", "Bytes of bodies sent.", registry=self._registry
        )
        self._running = Gauge(
            "composable_requests_running", "Requests being answered.", registry=self._registry
        )

    def start(self) -> None:
        """Count a request that begins."""
        self._running.inc()

    def finish(self, route: str, method: str, status: int, seconds: float, sent: int) -> None:
        """Count a request that was answered."""
        self._running.dec()
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        self._bytes.inc(sent)

    def render(self) -> bytes:
        """Return all counts as text."""
        return generate_latest(self._registry)


class JsonLines(logging.Formatter):
    """Format of a log: a JSON object in each line, so that nothing a client sends breaks a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        row: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            row["error"] = self.formatException(record.exc_info)
        return json.dumps(row)


def start_logging(level: int = logging.INFO) -> None:
    """Write the log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("composable.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level if name == "composable.server" else logging.WARNING)
