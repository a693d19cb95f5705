"""Snapshots of installed files: size, inode and time of change, recorded when they are installed.

An edit in place changes the time, a replaced file has another inode. So a file whose state is the
recorded one is taken to be as it was installed, and is not read. Any other file is read and its
digest compared. What no file system notices, such as a bit that flips on the disk, is found by
reading every file: `composable verify` does, and every load of a model.
"""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from composable.errors import DiskError
from composable.files import atomic
from composable.files.blobs import digest_file
from composable.files.reading import read_bytes

SNAPSHOT_FILE: Final = "snapshot.json"
# Size in bytes, number of the inode, and time of the last change in nanoseconds.
State = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect_files` found.

    Args:
        intact: A path of each digest that is present and right.
        damaged: The files that are missing, or not what was installed.
    """

    intact: Mapping[str, Path]
    damaged: tuple[Path, ...]


def inspect_files(
    root: Path,
    digests: Mapping[str, str],
    *,
    is_thorough: bool = False,
    find_digest: Callable[[Path], str] = digest_file,
) -> Inspection:
    """Compare files with their digests, and record their state.

    Args:
        root: The folder that holds them and their snapshot.
        digests: The digest of each file, by its path relative to `root`.
        is_thorough: Whether to read also the files whose state is the recorded one.
        find_digest: Returns the digest of a file.

    Returns:
        The files that are intact, and those that are not.
    """
    recorded = _read_snapshot(root)
    known = {} if is_thorough else recorded
    intact: dict[str, Path] = {}
    damaged: list[Path] = []
    found: dict[str, State] = {}
    for name, digest in digests.items():
        path = root / name
        state = _state_of(path)
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            if state is not None and (known.get(name) == state or find_digest(path) == digest):
                intact[digest] = path
                found[name] = state
                continue
        damaged.append(path)
    if found != recorded:
        with contextlib.suppress(DiskError):  # in a read-only folder files are read every time
            atomic.write_text(root / SNAPSHOT_FILE, json.dumps(found, indent=1) + "\n")
    return Inspection(intact=intact, damaged=tuple(damaged))


def record_files(root: Path, names: Iterable[str]) -> None:
    """Record the state of files that were just installed from verified ones."""
    states = {name: _state_of(root / name) for name in names}
    atomic.write_text(root / SNAPSHOT_FILE, json.dumps(states, indent=1) + "\n")


def _state_of(path: Path) -> State | None:
    """Return the state of a regular file; None for anything else."""
    with atomic.explained(path, "read"):
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size, status.st_ino, status.st_mtime_ns


def _read_snapshot(root: Path) -> dict[str, State]:
    """Return the recorded states; none if they are missing or damaged, so that files are read."""
    try:
        states = json.loads(read_bytes(root / SNAPSHOT_FILE))
        return {name: (size, inode, time) for name, (size, inode, time) in states.items()}
    except (OSError, DiskError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
