"""Atomic and durable writes; every file of the project is written here.

A file is written under a unique temporary name on the same file system, hashed on the way, synced
and renamed into place. Then its directory is synced, and all parents that are not known to be
durable. A reader, or the next command after a crash or a power failure, sees the old content or the
new, never a mixture, and no lock is needed for that. A file that already exists is not necessarily
durable: its writer may have been killed before syncing. `settle` syncs what is found as well as
what is written. Leftover temporary files are recognized by name and removed by the next writer in
the same directory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Final, Self

from composable.errors import DiskError, IntegrityError, MissingBlobError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

CHUNK: Final = 1 << 20
# So many bytes at a time are worth a disk's while.
_FLUSH_EVERY: Final = 64 << 20
READ_ONLY: Final = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
_TEMPORARY: Final = re.compile(r"\.tmp-[0-9]+-[0-9a-f]{16}")
# Errors of a file system that a user can fix, with a hint; any other OSError is a bug of ours.
_HINTS: Final = {
    errno.ENOSPC: "free some space, or set COMPOSABLE_STORE to a folder on a larger disk",
    errno.EDQUOT: "free some of your quota, or set COMPOSABLE_STORE to a folder on another disk",
    errno.EFBIG: "the file system or a limit (ulimit -f) does not allow files of that size",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "permission denied: change its permissions, or choose another folder",
    errno.EPERM: "permission denied: change its permissions, or choose another folder",
    errno.EIO: "the disk may be failing",
    errno.ENOTDIR: "expected a folder, found a file",
    errno.EISDIR: "expected a file, found a folder",
    errno.ELOOP: "the links of the path lead back to themselves: remove one of them",
    errno.ENXIO: "expected a file, found a socket or a device",
    errno.ENODEV: "expected a file, found a socket or a device",
    errno.ESTALE: "the network file system has lost the file: run the same command again",
    errno.ENAMETOOLONG: "choose a folder with a shorter path",
}
_NO_LINKS: Final = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
# Errors of file systems that cannot sync a directory, or that never change.
_NO_SYNC: Final = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)
# Directories, by device and inode, that this process made durable together with their parents.
_SETTLED: Final[set[tuple[int, int]]] = set()


class Sink:
    """A file that appears under its name only when it is complete.

    Use it as a context manager: leaving the block normally commits; an exception discards what was
    written.

    Args:
        path: Path of the finished file; an existing file is replaced.
        digest: Expected digest, as `sha256:…`, if known beforehand.
        size: Expected number of bytes, if known beforehand; excess bytes are refused on arrival.
        is_read_only: Whether to remove write permission, as for content-addressed files.
        temporary: Path until the file is complete, on the same file system; by default in the
            directory of `path`, under a name that `sweep` recognizes. Another process that has put
            the same content in place may remove a temporary file of known digest.

    Attributes:
        digest: SHA-256 of what was written so far, as `sha256:…`.
        size: Bytes written so far.
        temporary: Path until the file is complete.
    """

    def __init__(
        self,
        path: Path,
        *,
        digest: str | None = None,
        size: int | None = None,
        is_read_only: bool = False,
        temporary: Path | None = None,
    ) -> None:
        self.path = path
        self.size = 0
        self._n_flushed = 0
        self._expected_digest = digest
        self._expected_size = size
        self._is_read_only = is_read_only
        self._hash = hashlib.sha256()
        self._hasher: ThreadPoolExecutor | None = None
        self._hashing: Future[None] | None = None
        if temporary is None:
            sweep(path.parent)
        self.temporary = temporary or _temporary_name(path.parent)
        make_directory(path.parent)
        make_directory(self.temporary.parent)
        with explained(path):
            self._file: BinaryIO = self.temporary.open("xb")

    @property
    def digest(self) -> str:
        """The digest of what was written so far."""
        self._finish_hashing()
        return f"sha256:{self._hash.hexdigest()}"

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`.

        Raises:
            IntegrityError: When more arrives than `size` allows.
        """
        self.size += len(data)
        if self._expected_size is not None and self.size > self._expected_size:
            raise IntegrityError(
                f"more than the expected {self._expected_size:,} bytes received",
                where=str(self.path),
            )
        self._update_hash(data)
        with explained(self.path):
            self._file.write(data)
            if self.size - self._n_flushed >= _FLUSH_EVERY:
                self._start_flushing()

    def commit(self) -> None:
        """Verify, sync and move the file into place.

        Raises:
            IntegrityError: When size or digest does not match.
            MissingBlobError: When the temporary file is gone and no other process put the same
                content in place.
            DiskError: When the file cannot be written.
        """
        self._verify()
        with explained(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            try:
                if self._is_read_only:
                    self.temporary.chmod(READ_ONLY)
                self.temporary.replace(self.path)
            except FileNotFoundError as error:
                if self._expected_digest is None or not self.path.exists():
                    raise MissingBlobError(
                        "was removed before it was complete", where=str(self.temporary)
                    ) from error
            settle(self.path)
        self.keep()

    def keep(self) -> None:
        """Stop writing, and leave what was written under its temporary name."""
        with contextlib.suppress(OSError):  # a full disk: only what was written is kept
            self._file.close()
        if self._hasher is not None:
            self._hasher.shutdown()

    def discard(self) -> None:
        """Remove what was written."""
        self.keep()
        with contextlib.suppress(OSError):  # if it stays, it is swept later
            self.temporary.unlink()

    def _start_flushing(self) -> None:
        """Let the disk begin with what was written, so that `commit` has less to wait for.

        Linux starts to write pages that it is advised to forget, and does not forget them before
        they are written.
        """
        self._file.flush()
        if hasattr(os, "posix_fadvise"):
            n_bytes = self.size - self._n_flushed
            os.posix_fadvise(self._file.fileno(), self._n_flushed, n_bytes, os.POSIX_FADV_DONTNEED)
        self._n_flushed = self.size

    def _update_hash(self, data: bytes | memoryview) -> None:
        """Hash `data`; long immutable data in a thread, in parallel with writing it."""
        self._finish_hashing()
        if len(data) < CHUNK or not isinstance(data, bytes):
            self._hash.update(data)
            return
        if self._hasher is None:
            from concurrent.futures import ThreadPoolExecutor  # late: few writes are that long

            self._hasher = ThreadPoolExecutor(1)
        self._hashing = self._hasher.submit(self._hash.update, data)

    def _finish_hashing(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def _verify(self) -> None:
        if self._expected_size is not None and self.size != self._expected_size:
            raise IntegrityError(
                f"only {self.size:,} of {self._expected_size:,} bytes received",
                where=str(self.path),
            )
        if self._expected_digest is not None and self.digest != self._expected_digest:
            raise IntegrityError(
                f"the bytes have digest {self.digest}, expected {self._expected_digest}",
                where=str(self.path),
                hint="the source is damaged or was changed; the data was discarded",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.discard()
            return
        try:
            self.commit()
        except BaseException:
            self.discard()
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, completely or not at all."""
    with Sink(path) as sink:
        sink.write(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, completely or not at all."""
    write_bytes(path, text.encode())


def create_bytes(path: Path, data: bytes) -> bool:
    """Write `data` to `path` unless it exists; of concurrent calls exactly one succeeds.

    Returns:
        Whether this call created the file; if not, the existing one is durable now.
    """
    if path.exists():
        settle(path)
        return False
    make_directory(path.parent)
    temporary = _temporary_name(path.parent)
    try:
        with Sink(temporary) as sink:
            sink.write(data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            settle(path)
            return False
        except OSError as error:
            with explained(path):
                if error.errno not in _NO_LINKS:
                    raise
                return _create_without_links(path, data)
        settle(path)
        return True
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def create_marker(path: Path, data: bytes) -> bool:
    """Create a short file unless it exists; of concurrent calls exactly one succeeds.

    Quicker than `create_bytes`: nothing is synced, so that a power failure may take the file away
    again, and a process that is killed may leave it without its content.

    Returns:
        Whether this call created the file.
    """
    make_directory(path.parent)
    with explained(path):
        try:
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
    return True


def make_directory(path: Path) -> None:
    """Create `path` and its parents, each one synced into its parent."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with explained(path):
        try:
            path.mkdir(exist_ok=True)
        except (FileExistsError, FileNotFoundError) as error:
            is_file = isinstance(error, FileExistsError)
            reason = "is not a folder" if is_file else "no folder can be created there"
            raise DiskError(
                f"cannot be created: {reason}",
                where=str(path),
                hint="choose another folder, for the store with COMPOSABLE_STORE",
            ) from error
    sync_directory(path.parent)
    if _identify(path.parent) in _SETTLED:
        _SETTLED.add(_identify(path))


def make_scratch_directory(parent: Path) -> Path:
    """Create an empty directory under `parent` that `sweep` removes if a crash leaves it behind."""
    make_directory(parent)
    path = _temporary_name(parent)
    with explained(path):
        path.mkdir()
    return path


def rename_directory(source: Path, target: Path) -> bool:
    """Rename the finished directory `source` to `target`, unless `target` exists.

    Returns:
        Whether it was renamed.
    """
    sync_directory(source)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) or target.exists():
            return False
        with explained(target):
            raise
    settle(target)
    return True


def remove_file(path: Path) -> bool:
    """Remove a file durably, if it exists, and return whether it existed."""
    try:
        with explained(path):
            path.unlink()
    except FileNotFoundError:
        if path.parent.is_dir():
            settle(path)
        return False
    settle(path)
    return True


def remove_directory(path: Path) -> None:
    """Remove a directory and its contents; renamed first, so that it disappears at once."""
    import shutil

    doomed = path if is_temporary(path) else _temporary_name(path.parent)
    if doomed != path:
        try:
            with explained(path):
                path.rename(doomed)
        except FileNotFoundError:
            return
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(directory: Path, older_than_seconds: float = 3600.0) -> int:
    """Remove temporary files and directories that crashed writers left directly in `directory`.

    Returns:
        Number of files and directories removed.
    """
    import shutil

    count = 0
    found: list[Path] = []
    with contextlib.suppress(OSError):  # it does not exist or cannot be read
        found = [path for path in directory.iterdir() if is_temporary(path)]
    for path in found:
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime < older_than_seconds:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
            count += 1
    return count


def settle(path: Path) -> None:
    """Make the existence or absence of `path` durable, whichever process caused it.

    Syncs its directory and the parents on the same file system, up to one that this process has
    synced before or may not write to: a process that was killed may have created them without
    syncing.
    """
    folder = path.parent
    sync_directory(folder)
    for above in folder.parents:
        found = _identify(folder)
        if found in _SETTLED or not os.access(above, os.W_OK):
            return
        if _identify(above)[0] != found[0]:
            return
        try:
            sync_directory(above)
        except DiskError as error:
            if isinstance(error.__cause__, PermissionError):
                return  # forbidden by a sandbox, though the permissions allow it
            raise
        _SETTLED.add(found)
        folder = above


def list_directory(path: Path) -> list[Path]:
    """Return the entries of a directory, sorted; empty if it does not exist.

    Raises:
        DiskError: When it cannot be read.
    """
    try:
        with explained(path, "read"):
            return sorted(path.iterdir())
    except FileNotFoundError:
        return []


def sync_directory(path: Path) -> None:
    """Make the entries of a directory survive power loss, where the platform supports it."""
    if os.name == "nt":
        return  # Windows has no handle to sync; its file systems journal names
    with explained(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path, what: str = "written") -> Iterator[None]:
    """Raise errors of the file system in this block as `DiskError`, with a hint.

    Args:
        path: The file or directory that the block works on.
        what: Participle for the message: "written", "read", "removed".

    Raises:
        DiskError: For a disk that is full, read-only or failing, or missing permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _HINTS:
            raise
        reason = (error.strerror or str(error)).lower()
        raise DiskError(
            f"cannot be {what}: {reason}", where=str(path), hint=_HINTS[error.errno]
        ) from error


@contextlib.contextmanager
def advisory_lock(path: Path) -> Iterator[None]:
    """Hold a file lock for the block, or continue without it after a timeout.

    Only an optimization, so that concurrent writers do not repeat each other's work. File locks are
    unreliable on some network file systems: callers must be correct without it.
    """
    import filelock

    lock = filelock.FileLock(path, timeout=10)
    held = False
    with contextlib.suppress(OSError, DiskError, filelock.Timeout, NotImplementedError):
        make_directory(path.parent)
        lock.acquire()
        held = True
    try:
        yield
    finally:
        if held:
            lock.release()


def is_temporary(path: Path) -> bool:
    """Return whether a path has the name of an incomplete file."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _temporary_name(directory: Path) -> Path:
    return directory / f".tmp-{os.getpid()}-{os.urandom(8).hex()}"


def _identify(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino


def _create_without_links(path: Path, data: bytes) -> bool:
    """Create exclusively where links are not supported; a crash may leave a truncated file."""
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        settle(path)
        return False
    settle(path)
    return True
