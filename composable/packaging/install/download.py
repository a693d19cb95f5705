"""From registries into the store: verified, resumed where it broke off, several at once.

A file comes in one pass and is hashed as it is written. Where it breaks off, what has arrived stays
in the store; the next attempt, by any process, takes from there every chunk that proves right and
asks the registry for the rest. Nothing that was left there is trusted, so nobody needs to know
whether another process is still writing it. Bytes that arrived wrong are narrowed down to their
chunk in the same way, and only that is asked for again.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from composable.errors import DiskError, IntegrityError, MissingBlobError, UnreachableError
from composable.files.atomic import Sink
from composable.packaging.install.store import Store
from composable.packaging.manifests.manifest import CHUNK_BYTES, PackageFile
from composable.packaging.registry.registry import Registry
from composable.progress import ByteProgress

MAX_AT_ONCE: Final = 8
# How often in a row a registry may break off without having sent anything new.
MAX_FAILURES: Final = 5
_FIRST_WAIT_SECONDS: Final = 0.2
# A file, where it comes from, and what errors and progress call it.
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
    """Put a file into the store unless it is there.

    Args:
        registry: Where it comes from.
        store: Where it goes.
        file: Its size and digest and, for it to be resumed, its chunks.
        label: What errors and progress call it.
        progress: Called with `label`, bytes done and bytes in all.

    Returns:
        Whether it was not there.

    Raises:
        IntegrityError: When the registry sends other bytes than promised; nothing is kept.
        UnreachableError: When it cannot be reached, or broke off too often; what came is kept.
        RegistryError: When it has no such file.
    """
    if store.has(file.digest, file.size):
        return False
    for is_last in (False, True):
        partials = store.partials(file.digest) if file.chunks else []
        sink = store.sink(file.digest, file.size)

        def report(sink: Sink = sink) -> None:
            if progress is not None:
                progress(label, sink.size, file.size)

        try:
            _fill(sink, registry, file, partials, report)
            sink.commit()
            break
        except MissingBlobError:
            if is_last:
                raise
        except IntegrityError as error:
            # The next attempt keeps the chunks that are right; if it fails too, nothing is.
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
    return True


def download_files(
    wanted: Sequence[BlobRequest], store: Store, progress: ByteProgress | None = None
) -> None:
    """Put files into the store, several at once where they come from afar.

    Args:
        wanted: The files and where each comes from.
        store: Where they go.
        progress: Called with a label, bytes done and bytes in all; from several threads.

    Raises:
        The first error of `download_file`; it ends the other downloads, and what came is kept.
    """
    stop = threading.Event()

    def report(label: str, done: int, total: int) -> None:
        if stop.is_set():
            raise _StoppedError
        if progress is not None:
            progress(label, done, total)

    def download(item: BlobRequest) -> None:
        registry, file, label = item
        download_file(registry, store, file, label=label, progress=report)

    is_remote = any(registry.storage.is_remote for registry, _, _ in wanted)
    tasks = [partial(download, item) for item in wanted]
    run_at_once(tasks, n_at_once=MAX_AT_ONCE if is_remote else 1, stop=stop)


def run_at_once(
    tasks: Sequence[Callable[[], T]],
    *,
    n_at_once: int = MAX_AT_ONCE,
    stop: threading.Event | None = None,
) -> list[T]:
    """Return what tasks return; the first error ends what has not begun, and is raised.

    Args:
        tasks: What to run.
        n_at_once: How many at a time, each on a thread of its own.
        stop: Set at the first error, for tasks that look at it.
    """
    if n_at_once == 1 or len(tasks) < 2:
        return [task() for task in tasks]
    from concurrent.futures import ThreadPoolExecutor, as_completed  # here: a sync may need none

    with ThreadPoolExecutor(n_at_once) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            if stop is not None:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def require_space(store: Store, files: Iterable[PackageFile]) -> None:
    """Refuse, before anything is fetched, what the disk cannot hold.

    Raises:
        DiskError: With the bytes that are missing.
    """
    sizes = {file.digest: file.size for file in files if not store.has(file.digest, file.size)}
    needed = sum(sizes.values())
    home = next(path for path in (store.root, *store.root.parents) if path.exists())
    free = shutil.disk_usage(home).free
    if needed > free:
        raise DiskError(
            f"{needed:,} bytes are to be fetched, but only {free:,} are free",
            where=str(store.root),
            hint="free some space, or set COMPOSABLE_STORE to a folder on a larger disk",
        )


class _StoppedError(Exception):
    """Ends a download because another one failed; never seen outside this file."""


def _fill(
    sink: Sink,
    registry: Registry,
    file: PackageFile,
    partials: Sequence[Path],
    report: Callable[[], None],
) -> None:
    """Write all of a file to `sink`: from partials what is right there, else from the registry."""
    if not partials:
        _copy(sink, registry, file, file.size, report)
        return
    with contextlib.ExitStack() as stack:
        opened = [found for path in partials if (found := _open(path, stack)) is not None]
        missing = None  # where the run of chunks that nobody has begins
        for index, digest in enumerate(file.chunks):
            chunk = _find_chunk(opened, index * CHUNK_BYTES, digest)
            stop = min((index + 1) * CHUNK_BYTES, file.size)
            if chunk is None or len(chunk) != stop - index * CHUNK_BYTES:
                missing = stop
                continue
            if missing is not None:
                _copy(sink, registry, file, missing, report)
                missing = None
            sink.write(chunk)
            report()
        if missing is not None:
            _copy(sink, registry, file, missing, report)


def _copy(
    sink: Sink, registry: Registry, file: PackageFile, stop: int, report: Callable[[], None]
) -> None:
    """Copy from where `sink` is to offset `stop`, asking again where the registry breaks off."""
    failures = 0
    while sink.size < stop:
        before = sink.size
        try:
            for data in registry.stream(file.digest, sink.size):
                # What is more than promised is for the sink to refuse, at the file's end.
                sink.write(data if stop == file.size else data[: stop - sink.size])
                report()
                if sink.size == stop < file.size:
                    return
            if sink.size < stop:
                if sink.size == before:
                    raise IntegrityError(f"only {sink.size:,} of {file.size:,} bytes arrived")
                raise UnreachableError("response truncated", where=registry.location)
        except UnreachableError:
            failures = 0 if sink.size > before else failures + 1
            if failures == MAX_FAILURES:
                raise
            time.sleep(_FIRST_WAIT_SECONDS * 2**failures * random.uniform(0.5, 1.0))


def _open(path: Path, stack: contextlib.ExitStack) -> BinaryIO | None:
    try:
        return stack.enter_context(path.open("rb"))
    except OSError:
        return None  # whoever wrote it has put it in place or thrown it away, or it is unreadable


def _find_chunk(files: Sequence[BinaryIO], offset: int, digest: str) -> bytes | None:
    """Return the chunk at an offset from the first file in which it is right."""
    for file in files:
        chunk = b""
        with contextlib.suppress(OSError):
            file.seek(offset)
            chunk = file.read(CHUNK_BYTES)
        if chunk and hashlib.sha256(chunk).hexdigest() == digest:
            return chunk
    return None
