"""Output folders: a command that writes a folder starts from an empty one."""

from __future__ import annotations

from pathlib import Path

from composable.errors import PackagingError


def require_empty_folder(path: Path) -> None:
    """Check that a folder does not exist yet, or is empty.

    Args:
        path: The folder that is about to be written.

    Raises:
        PackagingError: If it holds something, or is not a folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     require_empty_folder(Path(folder))
        ...     require_empty_folder(Path(folder) / "new")
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise PackagingError(
            "already exists",
            where=str(path),
            hint="choose another folder, or remove this one first",
        )
