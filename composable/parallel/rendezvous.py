"""Processes of a group meet before jax starts, so that a missing one is named.

jax aborts the process when its group does not form in time. Here process 0 waits at the
coordinator's address until every other has reported its index, and then frees the address for jax.
The connections stay, for `peers` to watch.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Final

from composable.errors import PeerError, TrainingError

_RETRY_SECONDS: Final = 0.1
_GO: Final = b"go\n"


def meet(
    coordinator: str, n_processes: int, process: int, timeout: float
) -> dict[int, socket.socket]:
    """Return when all processes of a group have called this.

    Args:
        coordinator: Address of process 0, `host:port`.
        n_processes: Number of processes.
        process: Index of this one.
        timeout: Seconds to wait for the others.

    Returns:
        The connections of process 0 to all others, by their index, or of another to process 0.

    Raises:
        TrainingError: If the address is malformed.
        PeerError: If processes are missing; they are named.
    """
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise TrainingError(f"{coordinator!r} is not an address such as host:1234", where="group")
    deadline = time.monotonic() + timeout
    if process == 0:
        return _wait_for_others(int(port), n_processes, deadline, timeout)
    return {0: _report((host.strip("[]"), int(port)), process, deadline, timeout)}


def _wait_for_others(
    port: int, n_processes: int, deadline: float, timeout: float
) -> dict[int, socket.socket]:
    """Wait until every other process has reported, and let them all go."""
    arrived: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port), backlog=n_processes))
        except OSError as error:
            raise TrainingError(
                f"port {port} of the coordinator cannot be used: {error.strerror}",
                where="group",
                hint="end the process that uses it, or give another port to all processes",
            ) from error
        while len(arrived) < n_processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                said = connection.recv(32)
            except OSError:
                if time.monotonic() < deadline:
                    continue  # a process that ended while it reported
                missing = sorted({*range(1, n_processes)} - arrived.keys())
                names = ", ".join(map(str, missing[:20])) + (" …" if len(missing) > 20 else "")
                raise PeerError(
                    f"{len(missing)} of {n_processes} processes did not start within {timeout:g} s:"
                    f" {names}",
                    where="group",
                    hint="look at their logs, or wait longer with --init-timeout",
                ) from None
            index = said.strip()
            if index.isdigit() and 0 < int(index) < n_processes:
                arrived[int(index)] = connection
        for connection in arrived.values():
            with contextlib.suppress(OSError):
                connection.sendall(_GO)
        server.close()
        stack.pop_all()  # the connections stay open
        return arrived


def _report(
    address: tuple[str, int], process: int, deadline: float, timeout: float
) -> socket.socket:
    """Report this process to process 0, and wait until all are there."""
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with contextlib.ExitStack() as stack:
                connection = stack.enter_context(socket.create_connection(address, timeout=left))
                connection.sendall(b"%d\n" % process)
                if connection.recv(len(_GO)) == _GO:
                    stack.pop_all()  # the connection stays open
                    return connection
                reason = "it ended"
        except OSError as error:
            reason = error.strerror or "no answer"
        time.sleep(_RETRY_SECONDS)
    raise PeerError(
        f"process {process} did not find all others at {address[0]}:{address[1]} within "
        f"{timeout:g} s ({reason})",
        where="group",
        hint="look at the log of process 0, or wait longer with --init-timeout",
    )
