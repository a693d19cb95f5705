"""Strays: files in a shared folder that do not belong there.

Synchronised and network folders gain files that nobody wrote on purpose: `.DS_Store`,
`._1.2.0.json`, `1.2.0 (conflicted copy).json`. They are ignored, and named in a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from composable.errors import StrayWarning
from composable.files import atomic


def drop_strays(
    names: Iterable[str], belongs: Callable[[str], object], where: str, expected: str
) -> list[str]:
    """Return the names that belong in a folder, in order; warn about each of the others.

    Incomplete files of our own writers are left out without a warning.

    Args:
        names: Names of the entries.
        belongs: Returns a true value for the names that belong.
        where: The folder, for the warning.
        expected: What belongs in the folder, for the warning.

    Example:
        >>> drop_strays(["0a", ".tmp-7-0123456789abcdef"], str.isalnum, "blobs", "a digest")
        ['0a']
    """
    kept = []
    for name in names:
        if belongs(name):
            kept.append(name)
        elif not atomic.is_temporary(Path(name)):
            warn_about_stray(name, where, expected)
    return kept


def warn_about_stray(name: str, where: str, expected: str) -> None:
    """Warn that a file was ignored; arguments as for `drop_strays`."""
    warnings.warn(StrayWarning(name, where, expected), stacklevel=3)
