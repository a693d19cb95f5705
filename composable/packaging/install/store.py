"""The store: the files of all installed experts, each stored once under its SHA-256.

All projects share one store. A blob is verified while it is written, appears under its name only
when it is complete, and never changes afterwards. So writers need no lock: two processes that add
the same blob write the same bytes.

    blobs/<aa>/<sha256>     files, read only
    partial/<sha256>-<any>  an incomplete download; every writer has a file of its own
    quarantine/<sha256>     corrupt blobs
    projects/<key>          one line: the folder of a project that uses this store
    documents/<key>         cached documents of remote registries, see `registry/cache.py`
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from composable.files import atomic
from composable.files.blobs import blob_path, default_store, digest_file
from composable.files.reading import is_regular, open_file, read_bytes
from composable.files.strays import drop_strays
from composable.interface.digest import digest_bytes
from composable.progress import ByteProgress

# A blob is added to the store before the environment that needs it links to it.
PRUNE_GRACE_SECONDS: Final = 3600.0
_SHARD: Final = re.compile("[0-9a-f]{2}")
_BLOB: Final = re.compile("[0-9a-f]{64}")
_PARTIAL: Final = re.compile("[0-9a-f]{64}-.+")


@dataclass(frozen=True, kw_only=True)
class CorruptBlob:
    """A blob whose bytes do not match its name.

    Args:
        digest: The digest in its name.
        found: The digest of its bytes; other words for a folder, a pipe or a device.
        quarantine: The path that it was moved to.
    """

    digest: str
    found: str
    quarantine: Path


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What `Store.prune` removed.

    Args:
        digests: Digests of the removed blobs.
        bytes_freed: The total size of these blobs and of abandoned downloads. The disk gains less
            if an environment still links to a removed blob.
    """

    digests: tuple[str, ...]
    bytes_freed: int


class Store:
    """A content-addressed folder of files.

    Args:
        path: The folder; by default `$COMPOSABLE_STORE`, or else `store` in the user's cache.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store(folder)
        ...     digest = digest_bytes(b"hello")
        ...     path = store.add(b"hello", digest)
        ...     store.read(digest)
        b'hello'
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.root = Path(path).absolute() if path is not None else default_store()

    def path(self, digest: str) -> Path:
        """Return the path of a blob, whether or not it exists.

        Raises:
            IntegrityError: For text that is not a digest.
        """
        return self.root / blob_path(digest)

    def has(self, digest: str, size: int | None = None) -> bool:
        """Return whether a blob exists and, if a size is given, has that size."""
        path = self.path(digest)
        try:
            with atomic.explained(path, "read"):
                status = path.stat()
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and size in (None, status.st_size)

    def check(self, digest: str) -> bool:
        """Return whether a blob exists and is intact; move a corrupt one to quarantine."""
        path = self.path(digest)
        try:
            found = _digest_blob(path)
        except FileNotFoundError:
            return False
        if found != digest:
            self._quarantine(path, found)
        return found == digest

    def read(self, digest: str) -> bytes | None:
        """Return the bytes of a small blob; None if it is missing or corrupt."""
        path = self.path(digest)
        if not self.has(digest):
            return None
        try:
            data = read_bytes(path)
        except FileNotFoundError:  # pruned by another process
            return None
        if digest_bytes(data) == digest:
            return data
        self._quarantine(path, digest_bytes(data))
        return None

    def add(self, source: BinaryIO | bytes | Path, digest: str, size: int | None = None) -> Path:
        """Add a blob unless it already exists.

        Args:
            source: A binary stream, bytes, or the path of a file.
            digest: The expected digest.
            size: The expected size in bytes, if it is known.

        Returns:
            The path of the blob.

        Raises:
            IntegrityError: When digest or size do not match; nothing is kept then.
        """
        if self.has(digest, size):
            return self.path(digest)
        if isinstance(source, Path):
            with open_file(source) as stream, atomic.explained(source, "read"):
                return self.add(stream, digest, size)
        with self.sink(digest, size) as sink:
            if isinstance(source, bytes):
                sink.write(source)
            else:
                for chunk in iter(lambda: source.read(atomic.CHUNK), b""):
                    sink.write(chunk)
        self.forget_partials(digest)
        return self.path(digest)

    def sink(self, digest: str, size: int | None = None) -> atomic.Sink:
        """Return a sink that adds a blob to the store if its digest and size match."""
        path = self.path(digest)
        temporary = self.root / "partial" / f"{path.name}-{os.getpid()}-{os.urandom(8).hex()}"
        return atomic.Sink(path, digest=digest, size=size, is_read_only=True, temporary=temporary)

    def partials(self, digest: str) -> list[Path]:
        """Return the unverified partial files of a blob, the largest first.

        Other processes may still be writing to them.
        """
        found: list[tuple[int, Path]] = []
        for path in self._partials(f"{self.path(digest).name}-"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_size, path))
        return [path for _, path in sorted(found, reverse=True)]

    def forget_partials(self, digest: str) -> None:
        """Remove the partial files of a blob, even if another process still writes to one."""
        for path in self.partials(digest):
            with contextlib.suppress(OSError):  # the next `prune` removes what is left
                path.unlink()

    def digests(self) -> list[str]:
        """Return the digests of all blobs, sorted."""
        return sorted(f"sha256:{path.name}" for path in self._blobs())

    def linked(self) -> set[str]:
        """Return the digests of the blobs that an environment of any project links to."""
        return {f"sha256:{path.name}" for path in self._blobs() if _count_links(path) > 1}

    def register(self, project: Path) -> None:
        """Record that a project uses this store, so that `prune` keeps the files it needs."""
        line = os.fsencode(project.absolute()) + b"\n"
        entry = self.root / "projects" / digest_bytes(line)[7:39]
        if not entry.exists():
            atomic.write_bytes(entry, line)

    def projects(self) -> list[Path]:
        """Return the folders of the registered projects, sorted, including deleted ones."""

        def is_record(path: Path) -> bool:
            return is_regular(path) and digest_bytes(read_bytes(path))[7:39] == path.name

        kept = self._entries("projects", is_record, "the record of a project")
        lines = map(read_bytes, kept)
        return sorted(Path(os.fsdecode(line.removesuffix(b"\n"))) for line in lines)

    def verify(self, progress: ByteProgress | None = None) -> list[CorruptBlob]:
        """Verify every blob and move corrupt ones to quarantine.

        The next `sync` downloads them again.

        Args:
            progress: Called with `verify`, blobs done and total blobs.

        Returns:
            The corrupt blobs.
        """
        corrupt = []
        blobs = self._blobs()
        for done, path in enumerate(blobs, 1):
            with contextlib.suppress(FileNotFoundError):  # pruned by another process
                found = _digest_blob(path)
                if found != f"sha256:{path.name}":
                    corrupt.append(self._quarantine(path, found))
            if progress is not None:
                progress("verify", done, len(blobs))
        return corrupt

    def prune(self, keep: Iterable[str], older_than_seconds: float = PRUNE_GRACE_SECONDS) -> Pruned:
        """Remove blobs that no project needs.

        Args:
            keep: Digests to keep.
            older_than_seconds: Keep younger blobs: an install may be about to use them. Partial
                files are kept for at least an hour.

        Returns:
            The removed blobs and their size.
        """
        kept = set(keep)
        removed: list[str] = []
        freed = 0
        for path in self._blobs():
            digest = f"sha256:{path.name}"
            with contextlib.suppress(FileNotFoundError), atomic.explained(path, "removed"):
                status = path.stat()
                if digest in kept or time.time() - status.st_mtime < older_than_seconds:
                    continue
                path.unlink()
                removed.append(digest)
                freed += status.st_size
        for path in self._partials():
            with contextlib.suppress(FileNotFoundError), atomic.explained(path, "removed"):
                status = path.stat()
                # A recently written partial file is a download in progress.
                if time.time() - status.st_mtime >= max(older_than_seconds, PRUNE_GRACE_SECONDS):
                    path.unlink()
                    freed += status.st_size
        return Pruned(digests=tuple(removed), bytes_freed=freed)

    def size(self) -> int:
        """Return the total size of all blobs, in bytes."""
        return sum(path.stat().st_size for path in self._blobs())

    def _blobs(self) -> list[Path]:
        def is_shard(path: Path) -> bool:
            return _SHARD.fullmatch(path.name) is not None and path.is_dir()

        def is_blob(path: Path) -> bool:
            return _BLOB.fullmatch(path.name) is not None and path.name[:2] == path.parent.name

        shards = self._entries("blobs", is_shard, "a folder of blobs")
        found = (self._entries(f"blobs/{path.name}", is_blob, "a blob") for path in shards)
        return [path for paths in found for path in paths]

    def _partials(self, start: str = "") -> list[Path]:
        def is_partial(path: Path) -> bool:
            return _PARTIAL.fullmatch(path.name) is not None and not path.is_dir()

        found = self._entries("partial", is_partial, "an incomplete download")
        return [path for path in found if path.name.startswith(start)]

    def _entries(self, folder: str, belongs: Callable[[Path], bool], expected: str) -> list[Path]:
        """Return the entries that belong in a folder, sorted; warn about the others."""
        home = self.root / folder
        names = [path.name for path in atomic.list_directory(home)]
        kept = drop_strays(names, lambda name: belongs(home / name), str(home), expected)
        return [home / name for name in kept]

    def _quarantine(self, path: Path, found: str) -> CorruptBlob:
        target = self.root / "quarantine" / path.name
        atomic.make_directory(target.parent)
        if target.is_dir():  # a folder and a file do not replace each other
            atomic.remove_directory(target)
        elif path.is_dir():
            atomic.remove_file(target)
        with atomic.explained(path, "moved"):
            path.replace(target)
        return CorruptBlob(digest=f"sha256:{path.name}", found=found, quarantine=target)


def _digest_blob(path: Path) -> str:
    """Return the digest of a blob; of what is no regular file, words that are no digest."""
    with atomic.explained(path, "read"):
        is_file = stat.S_ISREG(path.stat().st_mode)
    return digest_file(path) if is_file else "not a regular file"


def _count_links(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_nlink
    return 0
