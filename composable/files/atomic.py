"""Every write of the project goes through this file.

A file is written under a unique temporary name on the same filesystem, hashed on the way, synced,
renamed into place, and then its directory is synced, and those above it that are not known to be
durable. A reader, or the next command after a crash or a power cut, sees the old content or the
new, never a mixture, and no caller needs a lock for that. What is found in place counts for no more
than what is written: whoever found it may have been killed before it synced, so `settle` does that.
Temporary files that were left over are known by their names and swept by the next who writes there.
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
READ_ONLY: Final = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
_TEMPORARY: Final = re.compile(r"\.tmp-[0-9]+-[0-9a-f]{16}")
# What a file system may refuse, and what to do about it; any other OSError is a bug of ours.
_CURES: Final = {
    errno.ENOSPC: "free some space, or set COMPOSABLE_STORE to a folder on a larger disk",
    errno.EDQUOT: "free some of your quota, or set COMPOSABLE_STORE to a folder on another disk",
    errno.EFBIG: "the file system or a limit (ulimit -f) does not allow files of that size",
    errno.EROFS: "the file system is mounted read only",
    errno.EACCES: "it is forbidden to you: change its permissions, or choose another folder",
    errno.EPERM: "it is forbidden to you: change its permissions, or choose another folder",
    errno.EIO: "the disk is failing",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.ENAMETOOLONG: "choose a folder with a shorter path",
}
_NO_LINKS: Final = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
# What file systems answer that cannot sync a directory, or on which nothing ever changes.
_NO_SYNC: Final = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)
# Directories, by device and inode, that this process made durable with all above them.
_SETTLED: Final[set[tuple[int, int]]] = set()


class Sink:
    """A file that appears under its name only when it is whole.

    Use it as a context manager: leaving the block normally commits, leaving it by an exception
    discards what was written.

    Args:
        path: Where the file shall appear; an older file there is replaced.
        digest: `sha256:…` that the bytes must have, if it is known beforehand.
        size: Bytes that must come, if known beforehand; more are refused as they arrive.
        is_read_only: Whether to take away write permission, as for content-addressed files.
        temporary: Where it lies until it is whole, on the same file system; by default under a
            name that `sweep` knows, beside `path`. A file of known digest may be taken away there
            by whoever put the same content in place.

    Attributes:
        digest: SHA-256 of what was written so far, as `sha256:…`.
        size: Bytes written so far.
        temporary: Where they lie until they are whole.
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
        """SHA-256 of what was written so far, as `sha256:…`."""
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
                f"more than the expected {self._expected_size:,} bytes arrived",
                where=str(self.path),
            )
        self._update_hash(data)
        with explained(self.path):
            self._file.write(data)

    def commit(self) -> None:
        """Verify, sync and move the file into place.

        Raises:
            IntegrityError: When size or digest is not the one promised.
            MissingBlobError: When what was written is gone, and nobody put it in place.
            DiskError: When the disk does not take it.
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
                        "was taken away before it was whole", where=str(self.temporary)
                    ) from error
            settle(self.path)
        self.keep()

    def keep(self) -> None:
        """Stop, and leave what was written where it is."""
        with contextlib.suppress(OSError):  # a full disk: what is not written is not kept
            self._file.close()
        if self._hasher is not None:
            self._hasher.shutdown()

    def discard(self) -> None:
        """Drop what was written."""
        self.keep()
        with contextlib.suppress(OSError):  # whatever comes of it, it is swept later
            self.temporary.unlink()

    def _update_hash(self, data: bytes | memoryview) -> None:
        """Hash `data`; what is long, and cannot change meanwhile, while it is being written."""
        self._finish_hashing()
        if len(data) < CHUNK or not isinstance(data, bytes):
            self._hash.update(data)
            return
        if self._hasher is None:
            from concurrent.futures import ThreadPoolExecutor  # here: few writers are that long

            self._hasher = ThreadPoolExecutor(1)
        self._hashing = self._hasher.submit(self._hash.update, data)

    def _finish_hashing(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def _verify(self) -> None:
        if self._expected_size is not None and self.size != self._expected_size:
            raise IntegrityError(
                f"only {self.size:,} of {self._expected_size:,} bytes arrived",
                where=str(self.path),
            )
        if self._expected_digest is not None and self.digest != self._expected_digest:
            raise IntegrityError(
                f"the bytes have digest {self.digest}, expected {self._expected_digest}",
                where=str(self.path),
                hint="the source is damaged or was changed; nothing was kept",
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
    """Write `data` to `path`, whole or not at all."""
    with Sink(path) as sink:
        sink.write(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def create_bytes(path: Path, data: bytes) -> bool:
    """Write `data` to `path` unless something is there; of many at once exactly one succeeds.

    Returns:
        Whether this call created the file; if not, what is there is durable now.
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


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link of `source`, or a copy where links cannot be made.

    The directory of `target` is not synced: a caller that places many files syncs once.

    Raises:
        FileExistsError: When `target` exists.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            with explained(target):
                raise
        if target.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(target)) from error
        with (
            explained(source, "read"),
            source.open("rb") as file,
            Sink(target, is_read_only=True) as sink,
        ):
            for chunk in iter(lambda: file.read(CHUNK), b""):
                sink.write(chunk)


def make_directory(path: Path) -> None:
    """Create `path` and its parents, each one synced into its parent."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with explained(path):
        path.mkdir(exist_ok=True)
    sync_directory(path.parent)
    if _identify(path.parent) in _SETTLED:
        _SETTLED.add(_identify(path))


def make_scratch_directory(parent: Path) -> Path:
    """Create an empty directory under `parent` that `sweep` removes if a crash leaves it."""
    make_directory(parent)
    path = _temporary_name(parent)
    with explained(path):
        path.mkdir()
    return path


def rename_directory(source: Path, target: Path) -> bool:
    """Give the finished directory `source` its name, unless the name is taken.

    Returns:
        Whether `target` is now what `source` was.
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
    """Remove a file, if it is there, for good; say whether it was there."""
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
    """Remove a directory and all in it, under a temporary name first so that it goes at once."""
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
        How many were removed.
    """
    import shutil

    count = 0
    found: list[Path] = []
    with contextlib.suppress(OSError):  # there is nothing to sweep, or nothing that could be
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
    """Make durable that `path` is there, or that it is not, whoever brought that about.

    Its directory is synced. So are those above on the same file system, up to one that this process
    has settled before or may not write to: a process that was killed may have made them without
    syncing theirs.
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
                return  # a sandbox forbids what the permissions allow
            raise
        _SETTLED.add(found)
        folder = above


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a small file.

    Raises:
        FileNotFoundError: When there is none.
        DiskError: When it cannot be read.
    """
    with explained(path, "read"):
        return path.read_bytes()


def list_directory(path: Path) -> list[Path]:
    """Return what lies directly in a directory, sorted; nothing where there is none.

    Raises:
        DiskError: When it cannot be read.
    """
    try:
        with explained(path, "read"):
            return sorted(path.iterdir())
    except FileNotFoundError:
        return []


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive power loss, where the platform can."""
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
    """Turn what a file system refuses in this block into an error that says what to do.

    Args:
        path: What the block works on.
        what: What could not be done to it.

    Raises:
        DiskError: For a disk that is full, read only or failing, or a place that is forbidden.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _CURES:
            raise
        reason = (error.strerror or str(error)).lower()
        raise DiskError(
            f"cannot be {what}: {reason}", where=str(path), hint=_CURES[error.errno]
        ) from error


@contextlib.contextmanager
def polite_lock(path: Path) -> Iterator[None]:
    """Hold a file lock for the block, or go on without one after a while.

    Only an optimisation, so that concurrent writers do not redo each other's work. File locks lie
    on some network filesystems; nothing that is correct with this lock may be wrong without it.
    """
    import filelock

    lock = filelock.FileLock(path, timeout=10)
    held = False
    with contextlib.suppress(OSError, filelock.Timeout, NotImplementedError):
        make_directory(path.parent)
        lock.acquire()
        held = True
    try:
        yield
    finally:
        if held:
            lock.release()


def is_temporary(path: Path) -> bool:
    """Say whether a path has the name of a file that is not whole yet."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _temporary_name(directory: Path) -> Path:
    return directory / f".tmp-{os.getpid()}-{os.urandom(8).hex()}"


def _identify(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino


def _create_without_links(path: Path, data: bytes) -> bool:
    """Create exclusively where hard links are missing; a crash may leave a cut file."""
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
