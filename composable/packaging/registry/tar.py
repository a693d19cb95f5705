"""Registries in one tar file, as `composable export` writes them. Read only."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from composable.errors import RegistryError
from composable.files import atomic
from composable.packaging.registry.storage import MAX_DOCUMENT_BYTES, Document


class TarFile:
    """An uncompressed tar file. Its files are read in place; nothing is unpacked.

    Args:
        path: The tar file.

    Raises:
        RegistryError: When it is not an uncompressed tar file.
    """

    is_remote: Final = False

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with tarfile.open(path, "r:") as tar:
                members = [member for member in tar if member.isreg()]
        except (tarfile.TarError, OSError) as error:
            raise RegistryError(f"is not an export: {error}", where=str(path)) from error
        self._members = {member.name: (member.offset_data, member.size) for member in members}

    @property
    def location(self) -> str:
        """The file."""
        return str(self._path)

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document; `known` itself if it is unchanged; None if it does not exist."""
        if path not in self._members:
            return None
        if self._members[path][1] > MAX_DOCUMENT_BYTES:
            raise RegistryError("is larger than 64 MiB", where=f"{self._path}: {path}")
        data = b"".join(self.stream(path))
        return known if known is not None and known.data == data else Document(data, None)

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on."""
        if path not in self._members:
            raise RegistryError("has no such file", where=f"{self._path}: {path}")
        offset, size = self._members[path]
        with self._path.open("rb") as file:
            file.seek(offset + start)
            left = size - start
            while left > 0 and (data := file.read(min(atomic.CHUNK, left))):
                left -= len(data)
                yield data
