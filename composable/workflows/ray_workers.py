"""Work on a vetting job with the workers of a Ray cluster.

Ray only places processes on the cluster's nodes, one per core, and reports which died. The work is
shared through the folder of results, as in a pool (`worker_pool.py`), so every node must see that
folder, the backbone, the new expert, and the registry or its server. Needs the extra `ray`.
"""

from __future__ import annotations

from typing import Any, Final

from composable.errors import ComposableError, VettingError
from composable.progress import CountProgress
from composable.workflows.peer_units import PeerJob, PeerWorker
from composable.workflows.worker_pool import Deaths, report_done, work

_POLL_SECONDS: Final = 0.5


def compute_on_ray(
    worker: PeerWorker, n_workers: int, progress: CountProgress | None = None
) -> None:
    """Compute what has no result yet of a job's share; Ray is initialised.

    Args:
        worker: A worker on the job in this process, which computes nothing.
        n_workers: Ray workers, of one core each.
        progress: Called with the number of peers done and in all.

    Raises:
        ComposableError: What a worker fails with.
        VettingError: If workers keep dying, or Ray is not installed.
    """
    try:
        import ray
        from ray.exceptions import RayTaskError, WorkerCrashedError
    except ImportError as error:
        raise VettingError("Ray is not installed", hint="pip install '.[ray]'") from error
    # Ray would start a task again without an end, or without looking whether anything is done.
    task = ray.remote(num_cpus=1, max_retries=0)(_work)
    deaths, done = Deaths(worker, n_workers), worker.count_done()
    running = [task.remote(worker.job) for _ in range(n_workers)]
    try:
        while running:
            ended, running = ray.wait(running, timeout=_POLL_SECONDS)
            done = report_done(worker, done, progress)
            for it in ended:
                try:
                    ray.get(it)
                except WorkerCrashedError:
                    deaths.count("an unknown signal")
                    running.append(task.remote(worker.job))
                except RayTaskError as error:
                    if isinstance(error.cause, ComposableError):
                        raise error.cause from None
                    raise
    finally:
        for it in running:
            ray.cancel(it, force=True)


def _work(job: PeerJob) -> Any:
    return work(job, 1)
