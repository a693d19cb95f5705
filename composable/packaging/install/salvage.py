"""What is kept of a lock that cannot be read, so that locking again cures it.

Locks are committed, so merges leave conflict markers in them, or one expert twice. What all sides
agree on is kept; the rest is resolved again. A lock that was cut short or emptied keeps nothing.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from composable.errors import ComposableWarning, LockError, ManifestError
from composable.files.reading import read_bytes
from composable.packaging.install.lock import Lock, LockedExpert, read_entries
from composable.packaging.manifests.toml import find_conflict


def read_lock_to_keep(path: Path) -> Lock | None:
    """Read a lock whose versions are to be kept where possible; None if there is no file.

    Of a lock that cannot be read, the experts are returned that are the same on every side of a
    merge, with a warning.

    Raises:
        LockError: When a newer version of composable wrote it.
    """
    try:
        return Lock.read(path)
    except LockError as error:
        if not path.exists():
            return None
        if error.is_newer:
            raise
        text = read_bytes(path).decode(errors="replace")
        kept = _keep_agreed(text, path.name)
        n = len(kept.experts)
        what = f"the {n} expert{'s' * (n != 1)} that its sides agree on" if n else "nothing of it"
        warnings.warn(
            ComposableWarning(f"{error.where}: {error.message}; kept {what}"), stacklevel=2
        )
        return kept


def split_sides(text: str) -> list[str]:
    r"""Return the text as each side of a merge has it; the text itself without conflict markers.

    Example:
        >>> split_sides("a\n<<<<<<< HEAD\nb\n||||||| base\nc\n=======\nd\n>>>>>>> x\ne\n")
        ['a\nb\ne\n', 'a\nd\ne\n']
    """
    if find_conflict(text) is None:
        return [text]
    sides: tuple[list[str], list[str]] = ([], [])
    inside: tuple[list[str], ...] = sides
    for line in text.splitlines(keepends=True):
        if find_conflict(line) is None:
            for side in inside:
                side.append(line)
        else:
            inside = {"<": sides[:1], "|": (), "=": sides[1:], ">": sides}[line[0]]
    return ["".join(side) for side in sides]


def _keep_agreed(text: str, where: str) -> Lock:
    """Return the experts of which no two entries, on any side, differ in what they install."""
    try:
        sides = [read_entries(side, where) for side in split_sides(text)]
    except ManifestError:
        return Lock()
    entries: dict[str, list[LockedExpert]] = {}
    for _, experts in sides:
        for expert in experts:
            entries.setdefault(expert.name, []).append(expert)
    agreed = [
        found[0] for found in entries.values() if all(_is_same(found[0], e) for e in found[1:])
    ]
    registries = {name: location for places, _ in sides for name, location in places.items()}
    return Lock(registries=registries, experts=tuple(sorted(agreed, key=lambda e: e.name)))


def _is_same(one: LockedExpert, other: LockedExpert) -> bool:
    return (one.version, one.origin, one.digests) == (other.version, other.origin, other.digests)
