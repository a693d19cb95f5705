"""Reads of files that others may have put in place: regular files of bounded size.

A path in a shared folder may lead to a named pipe, a device, a folder or a loop of links. Opening a
pipe waits for a writer, and a device such as `/dev/zero` has no end and no size. Therefore every
file is opened here: without waiting, and only if it is a regular file. Links are followed, because
users link files and folders of their own; what they lead to is checked.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Final

from composable.errors import DiskError
from composable.files import atomic

# Files that are read into memory whole; tensors and blobs are read in pieces.
MAX_FILE_BYTES: Final = 64 << 20
# Neither wait for the writer of a pipe nor become the owner of a terminal. Windows has no such
# flags, and no such files.
_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file for reading, without waiting.

    Args:
        path: The file; links are followed.

    Raises:
        FileNotFoundError: When it does not exist.
        DiskError: When it cannot be read, or is a folder, a pipe, a device or a loop of links.

    Example:
        >>> with open_file(Path(__file__)) as file:
        ...     file.read(3)
        b'\"\"\"'
    """
    with atomic.explained(path, "read"):
        descriptor = os.open(path, _FLAGS)
        try:
            kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
            if kind != stat.S_IFREG:
                raise DiskError(
                    f"is {_KINDS.get(kind, 'something else')}, expected a regular file",
                    where=str(path),
                    hint="remove it, or give another path",
                )
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise


def read_bytes(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the bytes of a regular file, if it is not too large.

    Args:
        path: The file; links are followed.
        max_bytes: The greatest size in bytes. Not more than that is read, whatever size the file
            system states.

    Raises:
        FileNotFoundError: When it does not exist.
        DiskError: When it cannot be read, is no regular file, or is too large.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "file").write_bytes(b"text")
        ...     read_bytes(Path(folder) / "file")
        b'text'
    """
    pieces: list[bytes] = []
    left = max_bytes
    with open_file(path) as file, atomic.explained(path, "read"):
        while left >= 0 and (piece := file.read(atomic.CHUNK)):
            pieces.append(piece)
            left -= len(piece)
    if left < 0:
        raise DiskError(f"is larger than {_format_limit(max_bytes)}", where=str(path))
    return b"".join(pieces)


def is_regular(path: Path) -> bool:
    """Return whether a path is a regular file and no link.

    Raises:
        DiskError: When that cannot be found out.
    """
    try:
        with atomic.explained(path, "read"):
            return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _format_limit(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size:,} bytes"
