"""Watch over the other processes of a group: their errors are named, and none waits for a dead one.

Every process keeps a connection to process 0 and writes to it every few seconds. One that fails
says why first; a connection that closes without a word is a process that died. Process 0 collects
for a moment what else fails and tells all others. Those that are left waiting in a collective,
which jax would keep for minutes, then end with exit code 76.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, NoReturn

from composable.errors import ComposableError, PeerError

# Below the 100 seconds after which jax aborts the processes that are left.
SILENCE_SECONDS: Final = 90.0
_BEAT_SECONDS: Final = 5.0
# Processes that fail together, such as on a loss that is not finite, do it within this time.
_COLLECT_SECONDS: Final = 1.0
_FAREWELL_SECONDS: Final = 5.0
_MAX_TEXT: Final = 2000
_DIED = "died without a message (killed, or out of memory?)"
_SILENT = f"has not been heard of for {SILENCE_SECONDS:.0f} s"


class Peers:
    """The other processes of a group, watched by a thread of this one.

    Args:
        process: Index of this process.
        connections: Process 0 has one to each other process, which have one to it; by index.
        report: Shows the error with which the thread ends this process.
    """

    def __init__(
        self,
        process: int,
        connections: Mapping[int, socket.socket],
        report: Callable[[PeerError], None],
    ) -> None:
        self._process = process
        self._report = report
        self._connections = dict(connections)
        self._unread = dict.fromkeys(connections, b"")
        self._heard = dict.fromkeys(connections, time.monotonic())
        self._left: set[int] = set()
        self._failures: dict[int, str] = {}
        self._failed_at = 0.0
        self._is_failing = False
        self._sending = threading.Lock()
        self._selector = selectors.DefaultSelector()
        for index, connection in self._connections.items():
            connection.setblocking(True)
            connection.settimeout(_FAREWELL_SECONDS)
            self._selector.register(connection, selectors.EVENT_READ, index)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def leave(self) -> None:
        """Tell the others that this process is done; closing its connection is then no failure."""
        self._send_all("left", "")

    def fail(self, error: BaseException, code: int) -> NoReturn:
        """Tell the others of an error, and end this process, since jax would wait for them first.

        An error of a library may be the echo of another process that died: if one did, this process
        ends as they all do.

        Args:
            error: What this process fails with; already shown.
            code: Its exit code, if the error is its own.
        """
        is_own = isinstance(error, ComposableError) and error.__cause__ is None
        if not is_own:
            time.sleep(2 * _COLLECT_SECONDS)  # the thread ends this process if a peer failed
        self._is_failing = True
        text = _describe(error)
        if self._process == 0:
            time.sleep(_COLLECT_SECONDS)
            for index, failure in sorted(self._failures.items()):
                print(f"error: process {index} {failure}", file=sys.stderr)
            self._end_group({0: text, **self._failures}, code)
        self._send_all("failed", text)
        self._wait_for_farewell()
        _exit(code)

    def _watch(self) -> None:
        """Read what the others write, write to them, and end this process after one failed."""
        beat_at = time.monotonic()
        while self._connections or self._failures:
            for key, _ in self._selector.select(timeout=0.2):
                self._read(key.data)
            now = time.monotonic()
            if now - beat_at > _BEAT_SECONDS:
                self._send_all("beat", "")
                beat_at = now
            for index in [*self._connections]:
                if now - self._heard[index] > SILENCE_SECONDS:
                    self._lose(index, _SILENT)
            is_collected = now - self._failed_at > (_COLLECT_SECONDS if self._process == 0 else 0)
            if self._failures and is_collected and not self._is_failing:
                self._end()

    def _read(self, index: int) -> None:
        """Take in what a process wrote, whole lines at a time."""
        try:
            data = self._connections[index].recv(65536)
        except OSError:
            data = b""
        if not data:
            self._lose(index, _DIED)
            return
        self._heard[index] = time.monotonic()
        *lines, self._unread[index] = (self._unread[index] + data).split(b"\n")
        for line in lines:
            kind, text = json.loads(line)
            if kind == "left":
                self._left.add(index)
            elif kind == "failed":
                self._lose(index, f"failed: {text}")
                return
            elif kind == "peers":
                self._failures.update({int(peer): said for peer, said in text.items()})

    def _lose(self, index: int, why: str) -> None:
        """Close the connection to a process that is gone; a failure unless it had left."""
        connection = self._connections.pop(index)
        self._selector.unregister(connection)
        connection.close()
        if index not in self._left:
            self._failed_at = self._failed_at or time.monotonic()
            self._failures.setdefault(index, why)

    def _end(self) -> None:
        """Show what became of the others, and end this process."""
        names = "; ".join(
            f"process {index} {failure}" for index, failure in sorted(self._failures.items())
        )
        error = PeerError(names, hint="run the same command again in every process to resume")
        self._report(error)
        if self._process == 0:
            self._end_group(self._failures, PeerError.exit_code)
        _exit(PeerError.exit_code)

    def _end_group(self, failures: Mapping[int, str], code: int) -> NoReturn:
        """Tell the others which processes failed, and end process 0 after them.

        It holds jax's service, without which jax aborts the others before they can say anything.
        """
        self._send_all("peers", {str(index): text for index, text in failures.items()})
        self._wait_for_farewell()
        _exit(code)

    def _send_all(self, kind: str, text: object) -> None:
        line = json.dumps([kind, text]).encode() + b"\n"
        with self._sending:
            for connection in [*self._connections.values()]:
                with contextlib.suppress(OSError):  # the thread notices by reading
                    connection.sendall(line)

    def _wait_for_farewell(self) -> None:
        """Wait until the others have closed their connections, or for a few seconds."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self._connections and time.monotonic() < deadline:
            if threading.current_thread().name == "peers":
                for key, _ in self._selector.select(timeout=0.1):
                    self._read(key.data)
            else:
                time.sleep(0.05)


def _describe(error: BaseException) -> str:
    """Return an error as one line."""
    message = error.message if isinstance(error, ComposableError) else str(error)
    kind = "" if isinstance(error, ComposableError) else f"{type(error).__name__}: "
    return " ".join((kind + message).split())[:_MAX_TEXT]


def _exit(code: int) -> NoReturn:
    """End the process without the functions that wait for the others at exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
