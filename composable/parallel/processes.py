"""Start-up of many processes as one group, and what only one of them does.

Nothing here touches a device before the group has started: jax counts devices once.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, NamedTuple

import jax
from jax._src.clusters import ClusterEnv  # jax detects clusters only where it also joins them
from jax._src.distributed import global_state  # and has barriers only in its client

from composable.errors import ComposableWarning, PeerError, PreemptedError, TrainingError
from composable.parallel.peers import Peers
from composable.parallel.rendezvous import meet

_VARIABLES: Final = ("COMPOSABLE_COORDINATOR", "COMPOSABLE_PROCESSES", "COMPOSABLE_PROCESS")
# jax prefers this one to what a cluster's scheduler says.
_JAX_COORDINATOR: Final = "JAX_COORDINATOR_ADDRESS"
INIT_SECONDS: Final = 300.0
# How often a process that waits for another looks whether it got a signal.
_WAIT_MILLISECONDS: Final = 500
_rounds = itertools.count()
_peers: list[Peers] = []


class _Group(NamedTuple):
    """The processes of a run, as one of them knows them."""

    coordinator: str
    n_processes: int
    process: int
    local_devices: Sequence[int] | None = None


def start_processes(
    coordinator: str | None = None,
    n_processes: int | None = None,
    process: int | None = None,
    *,
    init_timeout: float = INIT_SECONDS,
    report: Callable[[PeerError], None] | None = None,
) -> None:
    """Join the other processes of a multi-process run, if this is one.

    The group is the one that the arguments describe, or else COMPOSABLE_COORDINATOR,
    COMPOSABLE_PROCESSES and COMPOSABLE_PROCESS, or else what jax detects (Cloud TPU, GKE, Slurm,
    Open MPI). Without any of them this does nothing. Call it before anything else touches jax;
    a second call does nothing.

    From then on a process that dies or fails ends all others with exit code 76, so that none waits
    for it; each shows which one it was.

    Args:
        coordinator: Address of process 0, `host:port`.
        n_processes: Number of processes.
        process: Index of this one.
        init_timeout: Seconds that all processes have to start.
        report: Shows the error with which this process ends when another one has; by default a line
            on standard error.

    Raises:
        TrainingError: If the group is described in part.
        PeerError: If processes are missing.

    Example:
        >>> start_processes()  # one process: nothing to join
    """
    if jax.distributed.is_initialized():
        return
    group = _given_group(coordinator, n_processes, process) or _detected_group(init_timeout)
    if group is None:
        return
    coordinator, n_processes, process, local_devices = group
    if not 0 <= process < n_processes:
        raise TrainingError(
            f"process {process} is not one of 0 to {n_processes - 1}", where="group"
        )
    os.environ.pop(_JAX_COORDINATOR, None)
    if n_processes > 1:
        connections = meet(coordinator, n_processes, process, init_timeout)
        _peers.append(Peers(process, connections, report or partial(_print_error, process)))
        _fail_on_uncaught()
    jax.distributed.initialize(
        coordinator,
        n_processes,
        process,
        local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(init_timeout)),
    )
    # After jax's own, so that it runs before jax waits for the others.
    atexit.register(leave_group)


def leave_group(error: BaseException | None = None, code: int = 1) -> None:
    """Tell the other processes of a run, if there are any, that this one is about to end.

    After an error it does not return: this process ends, and the others then do with exit code 76.
    An interpreter that exits, or fails with an uncaught error, calls this by itself.

    Args:
        error: What it ended with, already shown; None if its work is done.
        code: The exit code for the error.

    Example:
        >>> leave_group()  # one process: nobody to tell
    """
    for peers in _peers:
        if error is None or (isinstance(error, PreemptedError) and error.is_shared):
            peers.leave()
        else:
            if threading.current_thread() is threading.main_thread():
                # SIGTERM now would end this process before it has told the others.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            peers.fail(error, code)


def exchange(text: str) -> list[str]:
    """Return what every process of the run gave, in their order.

    All processes call it equally often, and in the same order; it is for a few kilobytes.

    Args:
        text: What this process gives.

    Example:
        >>> exchange("the only process")
        ['the only process']
    """
    client = global_state.client
    if client is None or jax.process_count() == 1:
        return [text]
    number, n = next(_rounds), jax.process_count()
    mine, answer = f"composable/{number}/given", f"composable/{number}/all"
    client.key_value_set(f"{mine}/{jax.process_index()}", text)
    if is_first_process():
        given = [_wait_for_key(client, f"{mine}/{i}") for i in range(n)]
        client.key_value_set(answer, json.dumps(given))
        # All have read the answer before they came here again.
        if number:
            client.key_value_delete(f"composable/{number - 1}/")
        return given
    found: list[str] = json.loads(_wait_for_key(client, answer))
    return found


def _wait_for_key(client: Any, key: str) -> str:
    """Return what a process has set, however long it takes; signals are handled meanwhile.

    A process that died ends the others by `peers`, not by a deadline here.
    """
    while True:
        try:
            value: str = client.blocking_key_value_get(key, _WAIT_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        else:
            return value


def current_process() -> int | None:
    """Return the index of this process in its group; None without a group.

    Example:
        >>> current_process() is None
        True
    """
    return jax.process_index() if jax.distributed.is_initialized() else None


def is_first_process() -> bool:
    """Return whether this process writes files and prints for all.

    Example:
        >>> is_first_process()
        True
    """
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Return when every process of the run has called this for the same thing.

    Args:
        what: What they wait for.

    Example:
        >>> wait_for_all("text")  # one process: nobody to wait for
    """
    # Not by the devices: their collectives give up before another process is done. Nor by a barrier
    # of jax: a process that waits in one handles no signal.
    exchange(what)


def _print_error(process: int, error: PeerError) -> None:
    print(f"error: process {process}: {error}", file=sys.stderr)


def _fail_on_uncaught() -> None:
    """Let an error that no code catches end the other processes too, after it was shown."""
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        show(kind, error, trace)
        leave_group(error, 130 if isinstance(error, KeyboardInterrupt) else 1)

    sys.excepthook = hook


def _given_group(
    coordinator: str | None, n_processes: int | None, process: int | None
) -> _Group | None:
    """Return the group that arguments or variables describe, arguments first.

    Raises:
        TrainingError: If only a part of it is described.
    """
    arguments = [None if x is None else str(x) for x in (coordinator, n_processes, process)]
    variables = [os.environ.get(name) for name in _VARIABLES]
    is_given = any(value is not None for value in arguments)
    values = arguments if is_given else variables
    if not any(values):
        return None
    names = ("--coordinator", "--num-processes", "--process-id") if is_given else _VARIABLES
    if missing := [name for name, value in zip(names, values, strict=True) if value is None]:
        raise TrainingError(
            f"{', '.join(missing)} not set",
            where="group",
            hint=f"a multi-process run needs all of {', '.join(names)}",
        )
    stale = zip((*_VARIABLES, _JAX_COORDINATOR), (*values, values[0]), strict=True)
    _report_stale({name: value for name, value in stale if value is not None})
    try:
        return _Group(str(values[0]), int(str(values[1])), int(str(values[2])))
    except ValueError as error:
        raise TrainingError(
            f"{names[1]} {values[1]!r} and {names[2]} {values[2]!r} are not whole numbers",
            where="group",
        ) from error


def _detected_group(timeout: float) -> _Group | None:
    """Return the group that jax detects; None if there is none."""
    # Set by an earlier start, it would be taken for the coordinator of this one.
    left_over = os.environ.pop(_JAX_COORDINATOR, None)
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, round(timeout)
        )
    finally:
        if left_over is not None:
            os.environ[_JAX_COORDINATOR] = left_over
    coordinator, n_processes, process, devices = found
    if coordinator is None or n_processes is None or process is None:
        return None
    _report_stale({_JAX_COORDINATOR: coordinator})
    return _Group(coordinator, n_processes, process, devices)


def _report_stale(used: dict[str, str]) -> None:
    """Warn of variables that name another group than the one that is used."""
    for name, value in used.items():
        found = os.environ.get(name)
        if found is not None and found != value:
            warnings.warn(
                ComposableWarning(f"{name}={found} is not used; this run has {value}"), stacklevel=4
            )
