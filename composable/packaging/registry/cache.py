"""An on-disk cache of the documents of remote registries.

Cached documents are revalidated, and downloaded again only if they changed; offline, they are used
as they are. Only documents are cached here (configuration, indexes, catalogues); blobs are in the
store. A lost or damaged entry costs one more download.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from composable.errors import UnreachableError
from composable.files import atomic
from composable.interface.digest import digest_bytes
from composable.packaging.registry.storage import Document, Storage

_OFFLINE: Final = "not cached, and --offline is set"


class CachedStorage:
    """A remote storage whose documents are cached.

    Args:
        inner: The storage.
        folder: The cache; several storages can share it.
        is_offline: Whether to use only the cache.
    """

    def __init__(self, inner: Storage, folder: Path, *, is_offline: bool = False) -> None:
        self._inner = inner
        self._folder = folder
        self._is_offline = is_offline

    @property
    def location(self) -> str:
        """The location of the storage."""
        return self._inner.location

    @property
    def is_remote(self) -> bool:
        """Whether reads go over a network; false when offline."""
        return self._inner.is_remote and not self._is_offline

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return the current state of a document; offline, its cached state.

        Raises:
            UnreachableError: Offline, when the document is not cached.
        """
        entry = self._folder / digest_bytes(f"{self.location}\n{path}".encode())[7:]
        cached = known or _read_entry(entry)
        if self._is_offline:
            if cached is None:
                raise UnreachableError(
                    _OFFLINE,
                    where=f"{self.location}/{path}",
                    hint="run this once without --offline",
                )
            return cached
        found = self._inner.read(path, cached)
        if found is None:
            atomic.remove_file(entry)
        elif found != cached:
            head = json.dumps({"location": self.location, "path": path, "tag": found.tag})
            atomic.write_bytes(entry, head.encode() + b"\n" + found.data)
        return found

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on.

        Raises:
            UnreachableError: When offline.
        """
        if self._is_offline:
            raise UnreachableError(
                "not in the store, and --offline is set",
                where=f"{self.location}/{path}",
                hint="run this once without --offline, or use an export: see `composable export`",
            )
        return self._inner.stream(path, start)


def _read_entry(entry: Path) -> Document | None:
    """Return a cached document; None if it is missing or damaged."""
    try:
        head, _, data = entry.read_bytes().partition(b"\n")
        tag = json.loads(head)["tag"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Document(data, tag if isinstance(tag, str) else None)
