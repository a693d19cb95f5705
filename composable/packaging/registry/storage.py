"""The storage of a registry's files: the interface, and its implementation for folders.

A storage reads and writes bytes by path and does not interpret them. Web servers are in `http.py`,
object stores in `bucket.py`, exports in `tar.py`; `cache.py` caches documents of remote storages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from composable.errors import IntegrityError, MissingFileError
from composable.files import atomic
from composable.files.blobs import blob_path
from composable.files.reading import is_regular, open_file, read_bytes
from composable.files.strays import drop_strays
from composable.interface.digest import digest_bytes
from composable.packaging.manifests.manifest import PackageFile
from composable.progress import ByteProgress

# Documents are read into memory, so their size is limited in case a server is malicious.
MAX_DOCUMENT_BYTES: Final = 64 << 20
# Yields the bytes of a file from an offset on; may be called again, to resume.
ReadFrom = Callable[[int], Iterator[bytes]]
# The file that makes a storage a registry.
CONFIG_FILE: Final = "config.json"


@dataclass(frozen=True)
class Document:
    """The content of a small file at the time that it was read.

    Args:
        data: Its bytes.
        tag: The storage's identifier of this content: an entity tag, or a digest.
        is_length_known: Whether the storage knows that nothing is missing at its end.
    """

    data: bytes
    tag: str | None
    is_length_known: bool = dataclasses.field(default=True, compare=False)


class Storage(Protocol):
    """Files that can be read by path. Paths are relative, with forward slashes."""

    @property
    def location(self) -> str:
        """The location, without secrets, for error messages."""

    @property
    def is_remote(self) -> bool:
        """Whether reads go over a network, so that concurrent reads are faster."""

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document; `known` itself if it is unchanged; None if it does not exist.

        Raises:
            RegistryError: When the document is larger than 64 MiB, or access is denied.
            DiskError: The same, of a file on this machine; or when it is no regular file.
            UnreachableError: When the storage cannot be reached.
        """

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on.

        Raises:
            MissingFileError: When there is no such file.
            RegistryError: When access is denied.
            UnreachableError: When the storage cannot be reached, or the response is truncated.
        """

    def files_under(self, folder: str) -> list[str] | None:
        """Return the paths of all files in a folder and its folders, sorted.

        Returns:
            The paths; None if the storage cannot list files.
        """


@runtime_checkable
class WritableStorage(Storage, Protocol):
    """A storage for publishing. Writes survive power loss once they return."""

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder, sorted."""

    def create(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists; of concurrent calls exactly one succeeds.

        Returns:
            Whether this call created it.
        """

    def replace(self, path: str, data: bytes, seen: Document | None) -> bool:
        """Write a document if it has not changed since it was read as `seen`.

        Args:
            path: Path of the document.
            data: Its new content.
            seen: The document as it was read; None if it did not exist.

        Returns:
            Whether it was written.
        """

    def upload(
        self, path: str, source: ReadFrom, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Upload a blob unless it exists; it becomes visible when it is complete.

        Args:
            path: Path of the blob.
            source: Reads its bytes.
            file: Its name, size and digest.
            progress: Called with its name, bytes done and total bytes.

        Raises:
            IntegrityError: When the bytes do not match `file`; nothing becomes visible.
        """

    def remove(self, path: str) -> None:
        """Remove a file if it exists."""

    def settle(self, path: str) -> None:
        """Make a document that was read survive power loss, even if another process wrote it."""


class Folder:
    """A folder of the file system, for reading and publishing.

    `replace` compares and writes under an advisory lock, which other processes may ignore, so it
    can overwrite a change that it has not seen. Publishers read the document again afterwards.

    Args:
        root: The folder; it need not exist yet.
    """

    is_remote: Final = False

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.root)

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document; `known` itself if it is unchanged; None if it does not exist."""
        file = self.root / path
        try:
            data = read_bytes(file, MAX_DOCUMENT_BYTES)
        except FileNotFoundError:
            return None
        if known is not None and known.data == data:
            return known
        return Document(data, digest_bytes(data))

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on."""
        try:
            yield from LocalFile(self.root / path)(start)
        except FileNotFoundError as error:
            raise MissingFileError("has no such file", where=f"{self.location}: {path}") from error

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder, sorted."""
        home = self.root / folder
        try:
            with atomic.explained(home, "read"), os.scandir(home) as entries:
                found = {entry.name: entry.is_file() for entry in entries}
        except FileNotFoundError:
            return []

        def belongs(name: str) -> bool:
            return found[name] and not atomic.is_temporary(Path(name))

        return drop_strays(sorted(found), belongs, str(home), "a regular file")

    def files_under(self, folder: str) -> list[str]:
        """Return the paths of all files in a folder and its folders, sorted."""
        home = self.root / folder
        with atomic.explained(home, "read"):
            found = [path for path in home.rglob("*") if path.is_file()]
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in found
            if not atomic.is_temporary(path)
        )

    def create(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists; of concurrent calls exactly one succeeds."""
        return atomic.create_bytes(self.root / path, data)

    def replace(self, path: str, data: bytes, seen: Document | None) -> bool:
        """Write a document if it has not changed since it was read as `seen`."""
        target = self.root / path
        with atomic.advisory_lock(self.root / "locks" / digest_bytes(path.encode())[7:23]):
            now = self.read(path, seen)
            if now is not seen:
                return False
            atomic.write_bytes(target, data)
        return True

    def upload(
        self, path: str, source: ReadFrom, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Copy a blob unless it exists; it becomes visible when it is complete."""
        target = self.root / path
        if is_regular(target) and target.stat().st_size == file.size:
            atomic.settle(target)
            return
        with atomic.Sink(target, digest=file.digest, size=file.size, is_read_only=True) as sink:
            for data in source(0):
                sink.write(data)
                if progress is not None:
                    progress(file.name, sink.size, file.size)

    def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        atomic.remove_file(self.root / path)

    def settle(self, path: str) -> None:
        """Make a document that was read survive power loss, even if another process wrote it."""
        atomic.settle(self.root / path)


@dataclass(frozen=True)
class LocalFile:
    """Yields the bytes of a file of this machine from an offset on; see `ReadFrom`.

    Args:
        path: The file.
    """

    path: Path

    def __call__(self, start: int) -> Iterator[bytes]:
        """Yield its bytes from an offset on."""
        with open_file(self.path) as file, atomic.explained(self.path, "read"):
            file.seek(start)
            while data := file.read(atomic.CHUNK):
                yield data


def read_verified(
    source: ReadFrom, file: PackageFile, progress: ByteProgress | None = None
) -> Iterator[bytes]:
    """Yield a file's bytes and verify them: an error at the end keeps an upload from completing.

    Args:
        source: Reads the bytes.
        file: Their expected size and digest.
        progress: Called with the file's name, bytes done and total bytes.

    Raises:
        IntegrityError: When they do not match, or as soon as there are too many.
    """
    state, done = hashlib.sha256(), 0
    pieces = source(0)
    try:
        for data in pieces:
            state.update(data)
            done += len(data)
            if done > file.size:
                break
            yield data
            if progress is not None:
                progress(file.name, done, file.size)
    finally:
        if isinstance(pieces, Generator):
            pieces.close()  # it may hold a connection
    if done != file.size or f"sha256:{state.hexdigest()}" != file.digest:
        raise IntegrityError(
            f"{file.name} is not what was expected: {file.size:,} bytes with digest {file.digest}",
            hint="the source is damaged, or changed while it was being published",
        )


def put_blob(storage: WritableStorage, digest: str, data: bytes) -> None:
    """Write a small blob unless it exists and is intact."""
    path = blob_path(digest)
    seen = storage.read(path)
    while seen is None or digest_bytes(seen.data) != digest:
        if storage.replace(path, data, seen):
            return
        seen = storage.read(path)
    storage.settle(path)
