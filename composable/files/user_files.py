"""Files that the user owns and this project edits: only their text changes.

Links are followed, and permissions, line endings and a byte order mark are kept. The write itself
is atomic, so a hard link is the one thing that an edit separates.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from composable.errors import DiskError
from composable.files import atomic
from composable.files.reading import read_bytes

BYTE_ORDER_MARK: Final = "\ufeff"
_LONE_NEWLINE: Final = re.compile(r"(?<!\r)\n")


def replace_text(path: Path, text: str) -> bool:
    r"""Give a file another text in the style that it has; create it if it does not exist.

    Args:
        path: The file, or a link to it.
        text: The whole text, with `\n` or the file's own line endings.

    Returns:
        Whether the file was written; not if it holds that text already.

    Raises:
        DiskError: When a link leads nowhere, or the file cannot be written.
    """
    target = _follow(path)
    try:
        before = read_bytes(target)
    except FileNotFoundError:
        atomic.write_text(target, text)
        return True
    data = match_style(text, before.decode(errors="replace")).encode()
    if data == before:
        atomic.settle(target)
        return False
    with atomic.Sink(target) as sink:
        sink.write(data)
        with atomic.explained(target):
            sink.temporary.chmod(stat.S_IMODE(target.stat().st_mode))
    return True


def match_style(text: str, before: str) -> str:
    r"""Return text with the byte order mark and the line endings of the text before it.

    Example:
        >>> match_style("a\nb\n", "\ufeffa\r\n")
        '\ufeffa\r\nb\r\n'
    """
    if "\r\n" in before and not _LONE_NEWLINE.search(before):
        text = _LONE_NEWLINE.sub("\r\n", text)
    if before.startswith(BYTE_ORDER_MARK) and not text.startswith(BYTE_ORDER_MARK):
        text = BYTE_ORDER_MARK + text
    return text


def _follow(path: Path) -> Path:
    """Return the file at the end of all links."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink() or not target.parent.is_dir():
        raise DiskError(
            f"is a link that leads nowhere: {os.readlink(path)!r}",  # noqa: PTH115 - as written
            where=str(path),
            hint="correct the link or remove it",
        )
    return target
