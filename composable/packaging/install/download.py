"""Downloads from registries into the store: verified, resumable and concurrent.

A file is streamed once and hashed as it is written. When a download is interrupted, the partial
file stays in the store. The next attempt, by any process, copies every chunk of it whose digest is
right and requests the rest from the registry. Partial files are always verified, so another process
may still be writing to one. Corrupt bytes are handled in the same way: only the chunks that contain
them are requested again.

Where the store has a file that a delta starts from, the delta is downloaded instead; where it has
not, and the registry has the file only as deltas, a base is downloaded first. What deltas make is
verified like what is downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from composable.errors import (
    DeltaError,
    DiskError,
    IntegrityError,
    MissingBlobError,
    MissingFileError,
    UnreachableError,
)
from composable.files.atomic import Sink
from composable.files.delta import apply_delta
from composable.files.reading import open_file
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import CHUNK_BYTES, Delta, PackageFile
from composable.packaging.registry.budget import StoppedError, stop_with
from composable.packaging.registry.registry import Registry
from composable.progress import ByteProgress

MAX_THREADS: Final = 8
# How many responses in a row may end too early, each with fewer bytes than this.
MAX_SHORT_RESPONSES: Final = 5
_LONG_RESPONSE_BYTES: Final = 1 << 16
# The registry that a file comes from, the file, and its label in errors and progress.
BlobRequest = tuple[Registry, PackageFile, str]
T = TypeVar("T")


def download_file(
    registry: Registry,
    store: Store,
    file: PackageFile,
    *,
    label: str,
    progress: ByteProgress | None = None,
) -> bool:
    """Download a file, or what makes it, into the store unless it is already there.

    Args:
        registry: The registry that holds the file.
        store: The store that it is written to.
        file: Its size and digest, the digests of its chunks, without which it is not resumable,
            and its deltas.
        label: Its name in errors and progress.
        progress: Called with `label`, bytes done and total bytes.

    Returns:
        Whether the file was downloaded.

    Raises:
        IntegrityError: When the bytes do not match size and digest; no partial file is kept.
        DeltaError: When the registry has only deltas of it, and none of the files that these start
            from.
        UnreachableError: When the registry cannot be reached, or the connection broke too often;
            the partial file is kept.
        RegistryError: When the registry has no such file.
    """
    if store.has(file.digest, file.size):
        return False
    steps = _find_steps(store, file)
    if steps and sum(step.size for step in steps) < file.size:
        try:
            _apply_deltas(registry, store, file, steps, label, progress)
            return True
        except (IntegrityError, MissingFileError):
            # What is damaged in the store is not used again; the registry may have the file whole.
            for digest in {digest for step in steps for digest in (step.digest, step.base)}:
                store.check(digest)
    try:
        _download_whole(registry, store, file, label, progress)
    except MissingFileError:
        if not file.deltas:
            raise
        _download_base(registry, store, file, label, progress)
    return True


def _find_steps(store: Store, file: PackageFile) -> tuple[Delta, ...]:
    """Return the deltas from the nearest base in the store; none if it has no base."""
    for n, delta in enumerate(file.deltas, 1):
        if store.has(delta.base, delta.base_size):
            return file.deltas[:n]
    return ()


def _download_base(
    registry: Registry,
    store: Store,
    file: PackageFile,
    label: str,
    progress: ByteProgress | None,
) -> None:
    """Download a file that deltas start from, and apply them.

    Raises:
        DeltaError: When none of the files that they start from leads to the file.
    """
    problem: IntegrityError | MissingFileError | None = None
    # The last base was whole when the release was published.
    for n in range(len(file.deltas), 0, -1):
        delta = file.deltas[n - 1]
        base = PackageFile(name=file.name, size=delta.base_size, digest=delta.base)
        try:
            if not store.has(base.digest, base.size):
                _download_whole(registry, store, base, f"{label} (base)", progress)
            _apply_deltas(registry, store, file, file.deltas[:n], label, progress)
            return
        except (IntegrityError, MissingFileError) as error:
            problem = error
    is_gone = isinstance(problem, MissingFileError)
    raise DeltaError(
        f"{label} is in {registry.location} only as a change of another file, "
        f"{'which is gone' if is_gone else 'which does not lead to it'}: {problem}",
        hint="install another version, or from a registry that has it whole; its publisher can add "
        "what is missing with `composable publish DIR --whole`",
    ) from problem


def _apply_deltas(
    registry: Registry,
    store: Store,
    file: PackageFile,
    steps: Sequence[Delta],
    label: str,
    progress: ByteProgress | None,
) -> None:
    """Make a file from one in the store, downloading the deltas.

    Args:
        registry: The registry that holds the deltas.
        store: The store with the base of the last delta.
        file: The file.
        steps: The deltas; the last one is applied first.
        label: The file's name in errors and progress.
        progress: As for `download_file`.
    """
    for n in reversed(range(len(steps))):
        step = steps[n]
        delta = PackageFile(name=file.name, size=step.size, digest=step.digest)
        if not store.has(delta.digest, delta.size):
            _download_whole(registry, store, delta, f"{label} (delta)", progress)
        digest, size = file.digest, file.size
        if n > 0:
            digest, size = steps[n - 1].base, steps[n - 1].base_size
        if store.has(digest, size):
            continue
        with store.sink(digest, size) as sink:
            for data in apply_delta(store.path(step.digest), store.path(step.base), size):
                sink.write(data)
        store.forget_partials(digest)


def _download_whole(
    registry: Registry,
    store: Store,
    file: PackageFile,
    label: str,
    progress: ByteProgress | None,
) -> None:
    """Download a file as it is."""
    for is_last in (False, True):
        partials = store.partials(file.digest) if file.chunks else []
        sink = store.sink(file.digest, file.size)

        def report(sink: Sink = sink) -> None:
            if progress is not None:
                progress(label, sink.size, file.size)

        try:
            _write_file(sink, registry, file, partials, report)
            sink.commit()
            break
        except MissingBlobError:
            if is_last:
                raise
        except IntegrityError as error:
            # The second attempt reuses the chunks that are right; if it fails too, none is kept.
            if file.chunks and not is_last:
                sink.keep()
                continue
            sink.discard()
            store.forget_partials(file.digest)
            raise IntegrityError(
                f"{label} from {registry.location}: {error.message}", hint=error.hint
            ) from error
        except BaseException:
            if file.chunks:
                sink.keep()
            else:
                sink.discard()
            raise
    store.forget_partials(file.digest)


def download_files(
    requests: Sequence[BlobRequest], store: Store, progress: ByteProgress | None = None
) -> None:
    """Download files into the store, concurrently if a registry is remote.

    Args:
        requests: The files, each with its registry and its label.
        store: The store that they are written to.
        progress: Called with a label, bytes done and total bytes, from several threads.

    Raises:
        IntegrityError: See `download_file`. The first error of any kind stops the other downloads;
            their partial files are kept.
        UnreachableError: See `download_file`.
        RegistryError: See `download_file`.
    """
    stop = threading.Event()

    def report(label: str, done: int, total: int) -> None:
        if stop.is_set():
            raise StoppedError
        if progress is not None:
            progress(label, done, total)

    def download(request: BlobRequest) -> None:
        registry, file, label = request
        download_file(registry, store, file, label=label, progress=report)

    is_remote = any(registry.storage.is_remote for registry, _, _ in requests)
    tasks = [partial(download, request) for request in requests]
    run_concurrently(tasks, n_threads=MAX_THREADS if is_remote else 1, stop=stop)


def run_concurrently(
    tasks: Sequence[Callable[[], T]],
    *,
    n_threads: int = MAX_THREADS,
    stop: threading.Event | None = None,
) -> list[T]:
    """Run tasks on threads and return their results in order.

    The first error, also Ctrl-C, is raised at once: it cancels the tasks that have not started, and
    ends the requests of those that have.

    Args:
        tasks: Functions without arguments.
        n_threads: The number of threads, at least 1; with 1 the tasks run on the caller's thread.
        stop: Set at the first error, so that running tasks can stop elsewhere too.

    Example:
        >>> run_concurrently([lambda: 1, lambda: 2])
        [1, 2]
    """
    if n_threads == 1 or len(tasks) < 2:
        return [task() for task in tasks]
    from concurrent.futures import ThreadPoolExecutor, as_completed  # here: a sync may need none

    is_over = stop or threading.Event()

    def run(task: Callable[[], T]) -> T:
        with stop_with(is_over):
            return task()

    with ThreadPoolExecutor(n_threads) as pool:
        futures = [pool.submit(run, task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def require_space(store: Store, files: Iterable[PackageFile]) -> None:
    """Check, before anything is downloaded, that the disk has space for the missing files.

    Raises:
        DiskError: When it has not; with the bytes needed and free.
    """
    sizes = {file.digest: file.size for file in files if not store.has(file.digest, file.size)}
    needed = sum(sizes.values())
    home = next(path for path in (store.root, *store.root.parents) if path.exists())
    free = shutil.disk_usage(home).free
    if needed > free:
        raise DiskError(
            f"{needed:,} bytes are needed, but only {free:,} are free",
            where=str(store.root),
            hint="free some space, or set COMPOSABLE_STORE to a folder on a larger disk",
        )


def _write_file(
    sink: Sink,
    registry: Registry,
    file: PackageFile,
    partials: Sequence[Path],
    report: Callable[[], None],
) -> None:
    """Write a file to `sink`: chunks that a partial file has, and the rest from the registry."""
    if not partials:
        _download_until(sink, registry, file, file.size, report)
        return
    with contextlib.ExitStack() as stack:
        opened = [found for path in partials if (found := _open_partial(path, stack)) is not None]
        missing = None  # the end of the current run of chunks that no partial file has
        for index, digest in enumerate(file.chunks):
            chunk = _find_chunk(opened, index * CHUNK_BYTES, digest)
            stop = min((index + 1) * CHUNK_BYTES, file.size)
            if chunk is None or len(chunk) != stop - index * CHUNK_BYTES:
                missing = stop
                continue
            if missing is not None:
                _download_until(sink, registry, file, missing, report)
                missing = None
            sink.write(chunk)
            report()
        if missing is not None:
            _download_until(sink, registry, file, missing, report)


def _download_until(
    sink: Sink, registry: Registry, file: PackageFile, stop: int, report: Callable[[], None]
) -> None:
    """Download the bytes from the end of `sink` to offset `stop`.

    The storage resumes interrupted responses, but it does not know the size of the file. A response
    that ends too early without an error is noticed here, and the rest is requested.
    """
    n_short = 0
    while sink.size < stop:
        before = sink.size
        for data in registry.stream(file.digest, sink.size):
            # At the end of the file, the sink refuses bytes beyond the expected size.
            sink.write(data if stop == file.size else data[: stop - sink.size])
            report()
            if sink.size == stop < file.size:
                return
        if sink.size == before:
            raise IntegrityError(f"only {sink.size:,} of {file.size:,} bytes arrived")
        n_short = 0 if sink.size - before >= _LONG_RESPONSE_BYTES else n_short + 1
        if n_short > MAX_SHORT_RESPONSES and sink.size < stop:
            raise UnreachableError("responses end too early", where=registry.location)


def _open_partial(path: Path, stack: contextlib.ExitStack) -> BinaryIO | None:
    try:
        return stack.enter_context(open_file(path))
    except (OSError, DiskError):
        return None  # completed or removed by the process that wrote it, or unreadable


def _find_chunk(files: Sequence[BinaryIO], offset: int, digest: str) -> bytes | None:
    """Return the chunk at an offset from the first file in which its digest is right."""
    for file in files:
        chunk = b""
        with contextlib.suppress(OSError):
            file.seek(offset)
            chunk = file.read(CHUNK_BYTES)
        if chunk and hashlib.sha256(chunk).hexdigest() == digest:
            return chunk
    return None
