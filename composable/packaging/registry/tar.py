"""Registries in one tar file, as `composable export` writes them. Read only."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from composable.errors import RegistryError
from composable.files import atomic
from composable.files.reading import open_file
from composable.packaging.registry.storage import MAX_DOCUMENT_BYTES, Document

# What the library raises for headers that are malformed on purpose.
_MALFORMED: Final = (
    tarfile.TarError,
    OSError,
    ValueError,
    ArithmeticError,
    LookupError,
    MemoryError,
    RecursionError,
)


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
            with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                self._members = dict(_list_members(tar, os.fstat(file.fileno()).st_size))
        except _MALFORMED as error:
            raise RegistryError(f"is not an export: {error}", where=str(path)) from error

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
        with open_file(self._path) as file, atomic.explained(self._path, "read"):
            file.seek(offset + start)
            left = size - start
            while left > 0:
                data = file.read(min(atomic.CHUNK, left))
                if not data:
                    raise RegistryError("was cut short while being read", where=str(self._path))
                left -= len(data)
                yield data


def _list_members(tar: tarfile.TarFile, file_bytes: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name, offset and size of each regular file; refuse sizes that cannot be true."""
    for member in tar:
        if member.size < 0 or member.offset_data + member.size > file_bytes:
            raise ValueError(f"{member.name[:80]!r} does not lie within the file")
        if member.isreg() and not member.issparse():
            yield member.name, (member.offset_data, member.size)
