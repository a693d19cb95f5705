"""Storages behind a network: requests are retried, and no wait is unbounded or silent.

Only this layer retries. Web servers (`http.py`) and object stores (`bucket.py`) implement a single
attempt; callers get the result of all attempts, or the last error. Each attempt runs on its own
thread, so that it can be abandoned wherever it hangs: in a name lookup, a handshake, or a server
that sends a byte now and then.
"""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar

from composable.errors import MissingFileError, RegistryError, UnreachableError
from composable.packaging.registry.budget import (
    STOP_SECONDS,
    WAIT_VARIABLE,
    StoppedError,
    TimeBudget,
    current_budget,
    current_stop,
    format_time,
)
from composable.packaging.registry.storage import MAX_DOCUMENT_BYTES, Document

# Below this rate, the time that bytes take counts as waiting.
BYTES_PER_SECOND: Final = 4096
_DAY_SECONDS: Final = 86_400.0
_NOTICE_EVERY_SECONDS: Final = 30.0
# Few: what arrives ahead of a caller that wants no more was sent in vain.
_QUEUED_PIECES: Final = 1
_END: Final = object()
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """How a server answers.

    Args:
        pieces: The bytes, as they arrive.
        tag: What the server calls this state of the file.
        is_unchanged: Whether it is still the state that was asked about; then there are no bytes.
        is_length_known: Whether an end that comes too early is noticed.
    """

    pieces: Iterator[bytes]
    tag: str | None = None
    is_unchanged: bool = False
    is_length_known: bool = True


class DeniedError(RegistryError):
    """A server that refuses to say whether a file exists.

    Object stores, also behind a web server, answer so for missing files to those who may not list
    the bucket.
    """


class RemoteStorage(ABC):
    """A storage behind a network, to read from.

    Args:
        url: Its URL, without any secret.
        budget: How long requests may wait; by default that of the command, or one of its own.
    """

    is_remote: Final = True

    def __init__(self, url: str, budget: TimeBudget | None = None) -> None:
        self._url = url.rstrip("/")
        self._budget = budget or current_budget()
        self._has_read = False

    @property
    def location(self) -> str:
        """The URL."""
        return self._url

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document, `known` itself where that is still its state, or None for none."""
        request = _Request(self._budget, self._at(path))
        while True:
            try:
                return self._read(request, path, known)
            except UnreachableError as error:
                request.pause(error)

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on; what breaks off is resumed."""
        request = _Request(self._budget, self._at(path))
        while True:
            before = start
            try:
                answer = request.begin(partial(self._open_file, path, start))
                if answer is None:
                    raise MissingFileError("has no such file", where=self._at(path))
                for piece in answer.pieces:
                    start += len(piece)
                    yield piece
                return
            except DeniedError as error:
                if not self._has_read:
                    raise
                raise MissingFileError(error.message, where=error.where, hint=error.hint) from error
            except UnreachableError as error:
                request.pause(error, has_advanced=start > before)

    def files_under(self, folder: str) -> list[str] | None:
        """Return None: not every server can list files."""
        return None

    @abstractmethod
    def _open_document(self, path: str, tag: str | None) -> Answer | None:
        """Ask once for a document, if it is no longer in the state `tag`; None for none."""

    @abstractmethod
    def _open_file(self, path: str, start: int) -> Answer | None:
        """Ask once for the bytes of a file from an offset on; None if there is no such file."""

    def _read(self, request: _Request, path: str, known: Document | None) -> Document | None:
        tag = None if known is None else known.tag
        try:
            answer = request.begin(lambda: self._open_document(path, tag))
        except DeniedError:
            if not self._has_read:
                raise
            return None  # a refusal means that a file is missing, where others can be read
        if answer is None:
            return None
        if answer.is_unchanged:
            self._has_read = True
            return known
        data = bytearray()
        for piece in answer.pieces:
            data += piece
            if len(data) > MAX_DOCUMENT_BYTES:
                raise RegistryError("is larger than 64 MiB", where=self._at(path))
        self._has_read = True
        return Document(bytes(data), answer.tag, answer.is_length_known)

    def _call(self, path: str, call: Callable[[], T]) -> T:
        """Return what a call returns that is not to be tried again, unless it takes too long."""
        return _Request(self._budget, self._at(path)).run(call)

    def _call_again(self, path: str, call: Callable[[], T], seconds: float = 0.0) -> T:
        """Return what a call returns that may be repeated; `seconds` more may be waited for it."""
        budget = self._budget.extend(seconds) if seconds else self._budget
        request = _Request(budget, self._at(path))
        while True:
            try:
                return request.run(call)
            except UnreachableError as error:
                request.pause(error)

    def _at(self, path: str) -> str:
        return f"{self._url}/{path}"


class _Request:
    """The attempts at one request and the time that they waited in vain.

    Args:
        budget: The limits.
        where: What is asked for.
    """

    def __init__(self, budget: TimeBudget, where: str) -> None:
        self._budget = budget
        self._where = where
        self._stop = current_stop()
        self._began = time.monotonic()
        self._waited = 0.0  # in vain, seconds
        self._attempt_waited = 0.0
        self._silent = 0.0
        self._silent_limit = math.inf
        self._attempt_limit = budget.left
        self._attempt_bytes = 0
        self._attempts = 1
        self._failures = 0
        self._notice_at = budget.notice_seconds

    def begin(self, ask: Callable[[], Answer | None]) -> Answer | None:
        """Make an attempt; return how it is answered."""
        if self._budget.left <= 0:
            raise UnreachableError("not asked: the command has waited too long", where=self._where)
        self._silent_limit = self._budget.silent_seconds
        items, stop = self._start(ask)
        answer: Answer | None = self._first(items, stop)
        if answer is None or answer.is_unchanged:
            return answer
        return replace(answer, pieces=self._follow(items, stop))

    def run(self, call: Callable[[], T]) -> T:
        """Return what a call returns."""
        result: T = self._first(*self._start(call))
        return result

    def pause(self, error: UnreachableError, *, has_advanced: bool = False) -> None:
        """Wait until the next attempt makes sense; if none does, raise the error.

        Args:
            error: Why the last attempt failed.
            has_advanced: Whether it brought something that the next one need not bring again.
        """
        budget = self._budget
        budget.charge(self._attempt_waited)
        self._failures = 1 if has_advanced else self._failures + 1
        pause = budget.first_pause_seconds * 2.0**self._failures * random.uniform(0.5, 1.0)
        left = min(budget.request_seconds - self._waited, budget.left)
        if error.retry_after is not None:
            pause = max(pause, error.retry_after)
            if pause > max(left, 0.0):
                raise self._too_long(error, error.retry_after)
        if self._failures > budget.max_retries or pause > left:
            raise self._explain(error) from error
        if pause >= budget.notice_seconds:
            until = format_time(pause)
            budget.notify(f"{self._where}: {error.message}; asking again at {until}")
        if self._stop.wait(pause):
            raise StoppedError
        self._waited += pause
        budget.charge(pause)
        self._attempt_waited, self._attempt_bytes, self._silent = 0.0, 0, 0.0
        self._attempt_limit = budget.left
        self._attempts += 1

    def _start(self, ask: Callable[[], Any]) -> tuple[queue.Queue[Any], threading.Event]:
        """Make an attempt on another thread; return where its answer and its bytes arrive."""
        items: queue.Queue[Any] = queue.Queue(_QUEUED_PIECES)
        stop = threading.Event()

        def work() -> None:
            try:
                answer = ask()
                items.put(answer)
                if isinstance(answer, Answer):
                    for piece in answer.pieces:
                        items.put(piece)
                        if stop.is_set():
                            return
                items.put(_END)
            except BaseException as error:
                items.put(error)

        threading.Thread(target=work, daemon=True).start()
        return items, stop

    def _first(self, items: queue.Queue[Any], stop: threading.Event) -> Any:
        try:
            return self._next(items)
        except BaseException:
            _abandon(items, stop)
            raise

    def _follow(self, items: queue.Queue[Any], stop: threading.Event) -> Iterator[bytes]:
        """Yield the bytes of an answer; they take back some of the time that was waited."""
        try:
            while (piece := self._next(items)) is not _END:
                self._attempt_bytes += len(piece)
                self._silent = 0.0
                worth = len(piece) / BYTES_PER_SECOND
                self._waited = max(0.0, self._waited - worth)
                self._attempt_waited = max(0.0, self._attempt_waited - worth)
                yield piece
        finally:
            _abandon(items, stop)

    def _next(self, items: queue.Queue[Any]) -> Any:
        """Return what arrives next, within what is left of the time."""
        budget = self._budget
        while True:
            left = min(
                budget.request_seconds - self._waited,
                self._attempt_limit - self._attempt_waited,
                self._silent_limit - self._silent,
            )
            before = time.monotonic()
            try:
                timeout = min(left, STOP_SECONDS, max(self._notice_at - self._waited, 0.001))
                item = items.get(timeout=max(timeout, 0.0))
            except queue.Empty:
                item = None
                is_empty = True
            else:
                is_empty = False
            passed = time.monotonic() - before
            self._waited += passed
            self._attempt_waited += passed
            self._silent += passed
            if not is_empty:
                if isinstance(item, BaseException):
                    raise item
                return item
            if self._stop.is_set():
                raise StoppedError
            if passed >= left:
                raise UnreachableError(self._describe_wait(), where=self._where)
            if self._waited >= self._notice_at:
                self._notice_at = self._waited + _NOTICE_EVERY_SECONDS
                until = format_time(budget.request_seconds - self._waited)
                budget.notify(f"waiting for {self._where}, until {until} at the latest")

    def _describe_wait(self) -> str:
        if self._attempt_bytes == 0:
            return f"sent nothing for {self._silent:.0f} s"
        return f"sent only {self._attempt_bytes:,} bytes in {self._attempt_waited:.0f} s"

    def _explain(self, error: UnreachableError) -> UnreachableError:
        """Return the last error, with how often and how long it was tried."""
        tried = f" ({self._attempts} attempts in {time.monotonic() - self._began:.0f} s)"
        hint = error.hint or "what has arrived is kept: run the same command again"
        if self._waited >= self._budget.request_seconds or self._budget.left <= 0:
            hint += f", or let it wait longer: {WAIT_VARIABLE}=SECONDS"
        message = error.message + (tried if self._attempts > 1 else "")
        return UnreachableError(message, where=error.where or self._where, hint=hint)

    def _too_long(self, error: UnreachableError, seconds: float) -> UnreachableError:
        limit = min(self._budget.request_seconds, max(self._budget.left, 0.0))
        if seconds > _DAY_SECONDS:
            asked, hint = "more than a day", "run the same command again later"
        else:
            asked = f"{seconds:,.0f} s, until {format_time(seconds)}"
            # What was waited before counts as well.
            enough = math.ceil(seconds + self._waited) + 30
            hint = f"run the same command again then, or with {WAIT_VARIABLE}={enough}"
        return UnreachableError(
            f"{error.message} and asks to wait {asked}; {limit:.0f} s at most are waited",
            where=error.where or self._where,
            hint=hint,
        )


def _abandon(items: queue.Queue[Any], stop: threading.Event) -> None:
    """Let the thread of an attempt end: it may be waiting for room."""
    stop.set()
    while not items.empty():
        items.get_nowait()
