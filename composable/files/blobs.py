"""Content addresses: the digest of a file, the path of a blob, and the store of the user."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

from composable.errors import IntegrityError
from composable.files import atomic
from composable.files.reading import open_file
from composable.interface.digest import is_digest

STORE_VARIABLE: Final = "COMPOSABLE_STORE"


def digest_file(path: Path) -> str:
    """Return the digest of a file's bytes, as `sha256:` and 64 hex digits, read in blocks.

    Raises:
        FileNotFoundError: When it does not exist.
        DiskError: When it cannot be read, or is no regular file.
    """
    with open_file(path) as file, atomic.explained(path, "read"):
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def blob_path(digest: str) -> str:
    """Return the path of a blob relative to the root of a registry or a store.

    Raises:
        IntegrityError: For text that is not a digest, so that no other text gets into a path.

    Example:
        >>> blob_path("sha256:" + "ab" * 32)[:12]
        'blobs/ab/aba'
    """
    if not is_digest(digest):
        raise IntegrityError(f"{digest[:80]!r} is not a digest (sha256: and 64 hex digits)")
    hex_digits = digest.removeprefix("sha256:")
    return f"blobs/{hex_digits[:2]}/{hex_digits}"


def default_store() -> Path:
    """Return the store that all projects of the user share.

    It is `$COMPOSABLE_STORE`, or else `store` in the user's cache directory.
    """
    named = os.environ.get(STORE_VARIABLE)
    if named:
        return Path(named).absolute()
    import platformdirs  # late: not needed if the variable is set

    return Path(platformdirs.user_cache_dir("composable", appauthor=False)) / "store"
