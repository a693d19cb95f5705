"""Work on a vetting job with a pool of processes on this machine.

Every process does the same, `PeerWorker.run`, and shares the work through the folder of results, so
the pool only starts processes and replaces those that were killed. Cores are divided between them,
and there are no more than memory allows. With one process nothing is started.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any, Final

from composable.assembly.backbones import LoadedBackbone
from composable.errors import ComposableError, VettingError
from composable.progress import CountProgress
from composable.vetting.card import Check
from composable.vetting.peers import count_bytes
from composable.workflows.capacity import available_memory
from composable.workflows.peer_units import PeerJob, PeerWorker

# With fewer peers to measure, starting processes and loading the backbone takes longer than it
# saves.
_WORTH_A_POOL: Final = 8
# Interpreter, libraries and compiled programs of one process.
_PROCESS_BYTES: Final = 600 << 20
# Share of the available memory that a pool plans with.
_MEMORY_SHARE: Final = 0.8
_POLL_SECONDS: Final = 0.5
# Processes that die one after the other without a result in between, as a multiple of the pool's
# size: then a unit kills them, or the machine does.
_MAX_DEATHS: Final = 3


def vet_in_units(
    job: PeerJob,
    loaded: LoadedBackbone,
    n_jobs: int | None = None,
    progress: CountProgress | None = None,
) -> tuple[list[Check], dict[str, Any]]:
    """Compute what has no result yet, and return the checks and figures of all peers.

    Args:
        job: The job, with all peers as its share.
        loaded: The backbone.
        n_jobs: Processes; by default as many as cores and memory allow, and one for few peers.
        progress: Called with the number of peers done and in all.

    Raises:
        PackagingError: If an expert cannot be installed or loaded.
        VettingError: If tensors changed since the job was made, or processes keep dying.
    """
    worker = PeerWorker(job, loaded)
    compute_units(worker, loaded, n_jobs=n_jobs, progress=progress)
    return worker.gather()


def compute_units(
    worker: PeerWorker,
    loaded: LoadedBackbone,
    *,
    n_jobs: int | None = None,
    progress: CountProgress | None = None,
) -> None:
    """Compute what has no result yet of a job's share; arguments and errors as `vet_in_units`."""
    n_left = len(worker.groups) - worker.count_done()
    if n_jobs is None:
        n_jobs = count_processes(loaded, n_left) if n_left >= _WORTH_A_POOL else 1
    if min(n_jobs, n_left) > 1:
        _run_pool(worker, min(n_jobs, n_left), progress)
    # What is left: everything without a pool, otherwise nothing.
    worker.run(progress)


def count_processes(loaded: LoadedBackbone, n_units: int) -> int:
    """Return how many processes cores and memory allow, at least one.

    Args:
        loaded: The backbone.
        n_units: How many processes could be used.
    """
    memory, fitting = available_memory(), n_units
    if memory is not None:
        each = _PROCESS_BYTES + count_bytes(loaded.backbone)
        fitting = int(_MEMORY_SHARE * memory / each)
    return max(1, min(_count_cores(), fitting, n_units))


def work(job: PeerJob, n_threads: int) -> int:
    """Work on a job in a process of its own; return the number of units that it computed.

    Args:
        job: The job.
        n_threads: Cores that the process has; no bit of a result depends on it.
    """
    # Read by jax when it uses its first device.
    os.environ["PJRT_NPROC"] = str(n_threads)
    return PeerWorker(job).run()


def _run_pool(worker: PeerWorker, n_jobs: int, progress: CountProgress | None) -> None:
    """Run processes until every unit has a result."""
    deaths, done = Deaths(worker, n_jobs), worker.count_done()
    n_threads = max(1, _count_cores() // n_jobs)
    running = [_Process(worker.job, n_threads) for _ in range(n_jobs)]
    try:
        while running:
            connection.wait([it.process.sentinel for it in running], timeout=_POLL_SECONDS)
            done = report_done(worker, done, progress)
            for it in [it for it in running if not it.process.is_alive()]:
                running.remove(it)
                it.raise_error()
                code = it.process.exitcode or 0
                if code == 0:
                    continue
                if code > 0:
                    raise VettingError(
                        f"a process of the pool failed with exit code {code}; see above"
                    )
                deaths.count(f"signal {-code}")
                running.append(_Process(worker.job, n_threads))
    finally:
        for it in running:
            it.process.kill()
            it.process.join()


def report_done(worker: PeerWorker, before: int, progress: CountProgress | None) -> int:
    """Report how many peers are done, if there are more than before, and return that."""
    done = worker.count_done()
    if progress and done > before:
        progress(done, len(worker.groups))
    return done


class Deaths:
    """Counts processes that are killed one after the other, without a result in between.

    Args:
        worker: A worker on the same job.
        n_jobs: Processes at once.
    """

    def __init__(self, worker: PeerWorker, n_jobs: int) -> None:
        self._worker, self._most = worker, _MAX_DEATHS * n_jobs
        self._n, self._n_done = 0, worker.count_done()

    def count(self, cause: str) -> None:
        """Count one more.

        Args:
            cause: What ended the process.

        Raises:
            VettingError: If there are too many: the machine kills them, or a unit does.
        """
        n_done = self._worker.count_done()
        self._n = 1 if n_done > self._n_done else self._n + 1
        self._n_done = n_done
        if self._n > self._most:
            raise VettingError(
                f"{self._n} processes were killed one after the other, the last by {cause}",
                where=self._worker.job.results,
                hint="if memory is short, use fewer processes: --jobs 1",
            )


class _Process:
    """A process of the pool.

    Args:
        job: The job.
        n_threads: Cores that it has.
    """

    def __init__(self, job: PeerJob, n_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._errors, sender = context.Pipe(duplex=False)
        self.process: SpawnProcess = context.Process(target=_run, args=(job, n_threads, sender))
        self.process.start()
        sender.close()

    def raise_error(self) -> None:
        """Raise the error that the process ended with, if it reported one."""
        try:
            error = self._errors.recv() if self._errors.poll() else None
        except EOFError:
            error = None
        if error is not None:
            raise error


def _run(job: PeerJob, n_threads: int, errors: connection.Connection) -> None:
    """Be a process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(job, n_threads)
    except ComposableError as error:
        errors.send(error)
        sys.exit(error.exit_code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
