"""Second names for the bytes of a file: a clone where the file system can, or else a hard link.

A clone (reflink: Btrfs, XFS, bcachefs) shares the disk space and not the file: who edits one leaves
the other as it was. A hard link is one file under two names. A copy needs the space twice and is
left for file systems without either. `benchmarks.placing` measures all three.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import BinaryIO, Final

from composable.files import atomic
from composable.files.reading import open_file

# The request number of FICLONE in <linux/fs.h>, the same on x86 and ARM.
_FICLONE: Final = 0x4004_9409
_NO_LINKS: Final = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
# Devices of folders that have refused to clone a file.
_CANNOT_CLONE: Final[set[int]] = set()


def place_file(source: Path, target: Path) -> None:
    """Give the bytes of `source` a second name: a clone, or else a hard link, or else a copy.

    The directory of `target` is not synced: a caller that places many files syncs once.

    Args:
        source: A regular file.
        target: The new name, in an existing directory.

    Raises:
        FileNotFoundError: When `source` does not exist.
        FileExistsError: When `target` exists.
        DiskError: When the file cannot be read or written.
    """
    with open_file(source) as file:
        if _clone(file, target):
            return
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                with atomic.explained(target):
                    raise
            if target.exists():
                raise FileExistsError(errno.EEXIST, "already exists", str(target)) from error
            with atomic.Sink(target, is_read_only=True) as sink:
                while chunk := file.read(atomic.CHUNK):
                    sink.write(chunk)


def _clone(file: BinaryIO, target: Path) -> bool:
    """Create `target` as a clone of an open file; return False where that is not supported."""
    device = target.parent.stat().st_dev
    if sys.platform != "linux" or device in _CANNOT_CLONE:
        return False
    import fcntl

    with atomic.explained(target):
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.ioctl(descriptor, _FICLONE, file.fileno())
        os.fchmod(descriptor, atomic.READ_ONLY)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EXDEV:  # another source may be on the same file system
            _CANNOT_CLONE.add(device)
        with contextlib.suppress(OSError):
            target.unlink()
        return False
    finally:
        os.close(descriptor)
    return True
