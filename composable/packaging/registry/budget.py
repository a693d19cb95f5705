"""How long a request, and a command with all its requests, may wait for servers in vain.

Time in which bytes arrive at a reasonable rate is not counted, so a large download may take as long
as it needs. What is waited for is logged, as a warning of the logger `composable`; Python prints
that to standard error unless told otherwise.
"""

from __future__ import annotations

import datetime
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from composable.errors import RegistryError
from composable.printable import printable

WAIT_VARIABLE: Final = "COMPOSABLE_MAX_WAIT"
REQUEST_SECONDS: Final = 45.0
# A command may wait this many times as long as one request.
COMMAND_REQUESTS: Final = 2
# An attempt that brings nothing for this long is given up: a new connection may do better.
SILENT_SECONDS: Final = 20.0
NOTICE_SECONDS: Final = 5.0
MAX_RETRIES: Final = 4
FIRST_PAUSE_SECONDS: Final = 0.2

# How long it takes until a wait notices that it is in vain.
STOP_SECONDS: Final = 0.2

_STOP: ContextVar[threading.Event | None] = ContextVar("stop", default=None)
_SHARED: ContextVar[TimeBudget | None] = ContextVar("budget", default=None)


class StoppedError(Exception):
    """Ends requests whose results are not wanted any more; what has arrived is kept."""


@contextmanager
def stop_with(stop: threading.Event) -> Iterator[None]:
    """End the requests that this thread makes in the block soon after an event is set."""
    token = _STOP.set(stop)
    try:
        yield
    finally:
        _STOP.reset(token)


def current_stop() -> threading.Event:
    """Return the event that ends the requests of this thread; by default one that is never set."""
    return _STOP.get() or threading.Event()


class TimeBudget:
    """The time that requests may wait in vain, shared by all that belong together.

    What is left out has the value of the constant of that name.

    Args:
        request_seconds: For one request with all its retries; by default `$COMPOSABLE_MAX_WAIT`,
            or else 45. All requests together have twice that.
        silent_seconds: For one attempt that brings nothing.
        notice_seconds: After how long a wait is reported.
        max_retries: How often in a row an attempt may fail without having brought anything new.
        first_pause_seconds: Before the first retry; each further one doubles it.

    Raises:
        RegistryError: For a value of the environment variable that is not a number of seconds.

    Example:
        >>> budget = TimeBudget(10)
        >>> budget.charge(15)
        >>> round(budget.left)
        5
    """

    def __init__(
        self,
        request_seconds: float | None = None,
        *,
        silent_seconds: float = SILENT_SECONDS,
        notice_seconds: float = NOTICE_SECONDS,
        max_retries: int | None = None,
        first_pause_seconds: float | None = None,
    ) -> None:
        self.request_seconds = _read_setting() if request_seconds is None else request_seconds
        self.silent_seconds = silent_seconds
        self.notice_seconds = notice_seconds
        self.max_retries = MAX_RETRIES if max_retries is None else max_retries
        self.first_pause_seconds = (
            FIRST_PAUSE_SECONDS if first_pause_seconds is None else first_pause_seconds
        )
        self._spent = 0.0
        self._counted_until = -math.inf
        self._quiet_until = -math.inf
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        """Seconds that all requests together may still wait in vain."""
        return COMMAND_REQUESTS * self.request_seconds - self._spent

    def extend(self, seconds: float) -> TimeBudget:
        """Return a budget for one request that may take longer, with the same other settings."""
        return TimeBudget(
            self.request_seconds + seconds,
            silent_seconds=self.silent_seconds,
            notice_seconds=self.notice_seconds,
            max_retries=self.max_retries,
            first_pause_seconds=self.first_pause_seconds,
        )

    def charge(self, seconds: float) -> None:
        """Count the last `seconds` as waited in vain; what overlaps in threads counts once."""
        with self._lock:
            now = time.monotonic()
            self._spent += max(0.0, now - max(now - seconds, self._counted_until))
            self._counted_until = max(self._counted_until, now)

    def notify(self, text: str) -> None:
        """Report what is waited for, unless another wait was reported just now."""
        import logging

        with self._lock:
            now = time.monotonic()
            if now < self._quiet_until:
                return
            self._quiet_until = now + self.notice_seconds
        logging.getLogger("composable").warning("%s", printable(text))


@contextmanager
def share_budget() -> Iterator[None]:
    """Let all registries that are opened in the block, by this thread, share one budget.

    Raises:
        RegistryError: For a value of the environment variable that is not a number of seconds.
    """
    token = _SHARED.set(TimeBudget())
    try:
        yield
    finally:
        _SHARED.reset(token)


def current_budget() -> TimeBudget:
    """Return the budget of the block that this is called in, or a new one."""
    return _SHARED.get() or TimeBudget()


def format_time(seconds: float) -> str:
    """Return the local time in some seconds."""
    then = datetime.datetime.now() + datetime.timedelta(seconds=max(seconds, 0.0))
    return f"{then:%H:%M:%S}"


def _read_setting() -> float:
    text = os.environ.get(WAIT_VARIABLE)
    if not text:
        return REQUEST_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RegistryError(
            f"{text[:60]!r} is not a number of seconds",
            where=WAIT_VARIABLE,
            hint=f"set it to the seconds that a request may wait, or unset it for "
            f"{REQUEST_SECONDS:.0f}",
        )
    return seconds
