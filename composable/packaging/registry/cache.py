"""An on-disk cache of the documents of remote registries.

Cached documents are revalidated, and downloaded again only if they changed; offline, they are used
as they are. Only documents are cached here (configuration, indexes, catalogues); blobs are in the
store. Documents are checked when they arrive and, by their digest, when they are read again: a
lost or damaged entry costs one more download, and what arrives damaged, or lacks releases that were
listed before, is not cached.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from composable.errors import DiskError, RegistryError, UnreachableError
from composable.files import atomic
from composable.files.reading import read_bytes
from composable.interface.digest import digest_bytes
from composable.packaging.registry.lines import check_document, find_lost, key_fields
from composable.packaging.registry.storage import MAX_DOCUMENT_BYTES, Document, Storage

# A document and the line before it.
MAX_ENTRY_BYTES: Final = MAX_DOCUMENT_BYTES + 10_000
_LATER: Final = (
    "run the same command again later; if it still fails, the registry's files are damaged, and "
    "publishing to it again repairs them"
)
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

    @property
    def commit(self) -> str | None:
        """The commit that is read, of a storage that has commits."""
        return getattr(self._inner, "commit", None)

    def read(self, path: str, known: Document | None = None) -> Document | None:
        """Return the current state of a document; offline, its cached state.

        Raises:
            UnreachableError: Offline, when the document is not cached.
        """
        entry = self._folder / digest_bytes(f"{self.location}\n{path}".encode())[7:]
        cached = known or self._read_entry(entry, path)
        if self._is_offline:
            if cached is None:
                raise UnreachableError(
                    _OFFLINE,
                    where=f"{self.location}/{path}",
                    hint="run this once without --offline",
                )
            return cached
        found = self._read_undamaged(path, cached, entry)
        if found is None:
            atomic.remove_file(entry)
        elif found != cached:
            atomic.write_bytes(entry, self._format_entry(path, found))
        return found

    def _read_undamaged(self, path: str, cached: Document | None, entry: Path) -> Document | None:
        """Read a document; one that arrives damaged, truncated or outdated is requested again."""
        found = self._inner.read(path, cached)
        if found is None or found is cached:
            return found
        try:
            self._check(path, found, cached, entry)
            return found
        except RegistryError:
            found = self._inner.read(path, None)
        try:
            if found is not None:
                self._check(path, found, cached, entry)
        except RegistryError as error:
            raise UnreachableError(
                f"{error.message}, twice in a row", where=error.where, hint=error.hint or _LATER
            ) from error
        return found

    def _check(self, path: str, found: Document, cached: Document | None, entry: Path) -> None:
        """Check a document that arrived, also against what was read before."""
        where = f"{self.location}/{path}"
        check_document(path, found, where)
        if cached is None or not path.endswith(".jsonl"):
            return
        if lost := find_lost(cached, found, key_fields(path)):
            more = f" and {len(lost) - 1:,} more" if len(lost) > 1 else ""
            raise RegistryError(
                f"no longer lists {lost[-1]}{more}, which it listed before",
                where=where,
                hint="run the same command again later; if it was removed on purpose, forget what "
                f"was read before: rm {shlex.quote(str(entry))}",
            )

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

    def files_under(self, folder: str) -> list[str] | None:
        """Return the paths of all files in a folder; None offline, or if they cannot be listed."""
        return None if self._is_offline else self._inner.files_under(folder)

    def _format_entry(self, path: str, document: Document) -> bytes:
        head = {
            "location": self.location,
            "path": path,
            "tag": document.tag,
            "digest": digest_bytes(document.data),
        }
        return json.dumps(head).encode() + b"\n" + document.data

    def _read_entry(self, entry: Path, path: str) -> Document | None:
        """Return a cached document; None if it is missing or damaged."""
        try:
            text, _, data = read_bytes(entry, MAX_ENTRY_BYTES).partition(b"\n")
            head = json.loads(text)
            tag, digest = head["tag"], head.get("digest")
            is_entry = (head["location"], head["path"]) == (self.location, path)
        except (
            OSError,
            DiskError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ):
            return None
        if not is_entry or digest not in (None, digest_bytes(data)):
            return None
        # Entries without a digest are older. Without their tag, they are used only offline.
        return Document(data, tag if isinstance(tag, str) and digest is not None else None)
