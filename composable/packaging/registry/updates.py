"""Updates of documents that several publishers write: indexes, the catalogue, the advisories."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from composable.errors import RegistryError, UnreachableError
from composable.packaging.registry.budget import current_budget, format_time
from composable.packaging.registry.storage import MAX_DOCUMENT_BYTES, Document, WritableStorage

MIN_ATTEMPTS: Final = 10


def update_document(
    storage: WritableStorage, path: str, compile_document: Callable[[Document | None], bytes]
) -> None:
    """Write the content that a document should have; repeat until a read confirms it.

    Other publishers may change it in between. They are waited for as long as for a server.

    Args:
        storage: The storage of the registry.
        path: Path of the document.
        compile_document: Returns the content that follows from the one that is there.

    Raises:
        RegistryError: When the document would be too large.
        UnreachableError: When other publishers change it all the time.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from composable.packaging.registry.storage import Folder
        >>> with tempfile.TemporaryDirectory() as name:
        ...     update_document(Folder(Path(name)), "catalog.jsonl", lambda seen: b"{}")
        ...     (Path(name) / "catalog.jsonl").read_bytes()
        b'{}'
    """
    budget = current_budget()
    began = time.monotonic()
    until = began + min(budget.request_seconds, max(budget.left, 0.0))
    attempts = 0
    while True:
        seen = storage.read(path)
        wanted = compile_document(seen)
        check_size(path, len(wanted), storage.location)
        if seen is not None and seen.data == wanted:
            storage.settle(path)
            return
        attempts += 1
        if not storage.replace(path, wanted, seen):
            pause = random.uniform(0, min(0.01 * 2 ** min(attempts, 10), 1.0))
            time.sleep(pause)
            budget.charge(pause)
        now = time.monotonic()
        if now > until and attempts >= MIN_ATTEMPTS:
            raise UnreachableError(
                f"other publishers changed it {attempts} times in {now - began:.0f} s",
                where=f"{storage.location}/{path}",
                hint="the release is recorded: run the same command again to list it",
            )
        if now - began > budget.notice_seconds:
            budget.notify(
                f"{storage.location}/{path}: other publishers are changing it; trying until "
                f"{format_time(until - now)} at the latest"
            )


def check_size(path: str, size: int, location: str) -> None:
    """Refuse a document that clients would refuse to read.

    Raises:
        RegistryError: For more bytes than a document may have.
    """
    if size > MAX_DOCUMENT_BYTES:
        raise RegistryError(
            f"would have {size:,} bytes, of which clients read at most {MAX_DOCUMENT_BYTES:,}",
            where=f"{location}/{path}",
            hint="publish under another name, or to another registry",
        )
