"""Where a registry's files are stored: the port that registries are read and written through.

A storage knows paths and bytes; what they mean is the registry's. Here are the port and its
plainest end, a folder. Web servers are in `http`, object stores in `bucket`; `cache` keeps what
remote ones sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from composable.errors import RegistryError
from composable.files import atomic
from composable.interface.digest import digest_bytes
from composable.packaging.manifests.manifest import PackageFile
from composable.progress import ByteProgress

# Indexes and catalogues are read whole, so that a dishonest server must not be able to send more.
MAX_DOCUMENT_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Document:
    """A small file as it was read.

    Args:
        data: Its bytes.
        tag: What the storage calls this state of it: an entity tag, or a digest.
    """

    data: bytes
    tag: str | None


class Storage(Protocol):
    """A place with files that can be read by path; paths are relative, with forward slashes."""

    @property
    def location(self) -> str:
        """Where it is, as an error message shows it: without any secret."""

    @property
    def is_remote(self) -> bool:
        """Whether reads go over a network, so that several are better sent at once."""

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document, `known` itself where that is still its state, or None for none.

        Raises:
            RegistryError: For a document over 64 MiB, or a refusal.
            UnreachableError: When no answer can be had.
        """

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on.

        Raises:
            RegistryError: When there is no such file, or for a refusal.
            UnreachableError: When the answer breaks off, or none can be had.
        """


class WritableStorage(Storage, Protocol):
    """A storage that can be published to. What it acknowledges survives power loss."""

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files that lie directly in a folder, sorted."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless one is there; of many at once exactly one succeeds.

        Returns:
            Whether this call created it.
        """

    def replace(self, path: str, data: bytes, seen: Document | None) -> bool:
        """Write a document if its state is still the one seen; None means that there was none.

        Returns:
            Whether it was written.
        """

    def upload(
        self, path: str, source: Path, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Write a file by its digest unless it is there; it appears when it is whole.

        Raises:
            IntegrityError: When the source is no longer what `file` says.
        """

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""

    def settle(self, path: str) -> None:
        """Make what was read of a document survive power loss, whichever process wrote it."""


class Folder:
    """A folder of the file system. It can be published to.

    The state of a document is compared, then replaced, under a lock that others may not honour; so
    `replace` may overwrite a state that it did not see. Whoever publishes looks again afterwards.

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
        """Return a document, `known` itself where that is still its state, or None for none."""
        file = self.root / path
        try:
            with atomic.explained(file, "read"):
                if file.stat().st_size > MAX_DOCUMENT_BYTES:
                    raise RegistryError("is larger than 64 MiB", where=str(file))
                data = file.read_bytes()
        except FileNotFoundError:
            return None
        if known is not None and known.data == data:
            return known
        return Document(data, digest_bytes(data))

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on."""
        try:
            with atomic.explained(self.root / path, "read"), (self.root / path).open("rb") as file:
                file.seek(start)
                while data := file.read(atomic.CHUNK):
                    yield data
        except FileNotFoundError as error:
            raise RegistryError("has no such file", where=f"{self.location}: {path}") from error

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files that lie directly in a folder, sorted."""
        home = self.root / folder
        with atomic.explained(home, "read"):
            found = home.iterdir() if home.is_dir() else ()
            return sorted(path.name for path in found if not atomic.is_temporary(path))

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless one is there; of many at once exactly one succeeds."""
        return atomic.create_bytes(self.root / path, data)

    def replace(self, path: str, data: bytes, seen: Document | None) -> bool:
        """Write a document if its state is still the one seen."""
        target = self.root / path
        with atomic.advisory_lock(self.root / "locks" / digest_bytes(path.encode())[7:23]):
            now = self.read(path, seen)
            if now is not seen:
                return False
            atomic.write_bytes(target, data)
        return True

    def upload(
        self, path: str, source: Path, file: PackageFile, progress: ByteProgress | None
    ) -> None:
        """Write a file by its digest unless it is there; it appears when it is whole."""
        target = self.root / path
        if target.exists() and target.stat().st_size == file.size:
            atomic.settle(target)
            return
        with (
            source.open("rb") as stream,
            atomic.Sink(target, digest=file.digest, size=file.size, is_read_only=True) as sink,
        ):
            while data := stream.read(atomic.CHUNK):
                sink.write(data)
                if progress is not None:
                    progress(file.name, sink.size, file.size)

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        atomic.remove_file(self.root / path)

    def settle(self, path: str) -> None:
        """Make what was read of a document survive power loss, whichever process wrote it."""
        atomic.settle(self.root / path)
