"""What remote registries answered, kept on disk: asked for again only if it changed, or offline.

Only documents are kept here (configuration, indexes, catalogues); blobs have their place in the
store. A lost or damaged entry costs one more question and nothing else.
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
    """A remote storage whose documents are kept.

    Args:
        inner: The storage.
        folder: Where documents are kept, of any number of storages.
        is_offline: Whether to answer from what is kept alone.
    """

    def __init__(self, inner: Storage, folder: Path, *, is_offline: bool = False) -> None:
        self._inner = inner
        self._folder = folder
        self._is_offline = is_offline

    @property
    def location(self) -> str:
        """Where the storage is."""
        return self._inner.location

    @property
    def is_remote(self) -> bool:
        """Whether reads go over a network: not when offline."""
        return self._inner.is_remote and not self._is_offline

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return a document, as it is now or, offline, as it was when last asked for.

        Raises:
            UnreachableError: Offline, for a document that was never asked for.
        """
        entry = self._folder / digest_bytes(f"{self.location}\n{path}".encode())[7:]
        kept = known or _read_entry(entry)
        if self._is_offline:
            if kept is None:
                raise UnreachableError(
                    _OFFLINE, where=f"{self.location}/{path}", hint="run it once without --offline"
                )
            return kept
        found = self._inner.read(path, kept)
        if found is None:
            atomic.remove_file(entry)
        elif found != kept:
            head = json.dumps({"location": self.location, "path": path, "tag": found.tag})
            atomic.write_bytes(entry, head.encode() + b"\n" + found.data)
        return found

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from offset `start` on.

        Raises:
            UnreachableError: Offline.
        """
        if self._is_offline:
            raise UnreachableError(
                "not in the store, and --offline is set",
                where=f"{self.location}/{path}",
                hint="run it once without --offline, or bring an export: see `composable export`",
            )
        return self._inner.stream(path, start)


def _read_entry(entry: Path) -> Document | None:
    """Return a document that was kept, or None for one that was not, or is damaged."""
    try:
        head, _, data = entry.read_bytes().partition(b"\n")
        tag = json.loads(head)["tag"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Document(data, tag if isinstance(tag, str) else None)
