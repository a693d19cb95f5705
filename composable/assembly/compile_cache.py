"""Compiled programs on disk, so that only the first process that needs one compiles it.

The cache is that of jax, in the user's cache folder. Nothing changes where jax is configured
otherwise: `JAX_COMPILATION_CACHE_DIR` names another folder, and
`JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import filelock
import jax
import platformdirs
from jax.experimental.compilation_cache import compilation_cache

# The least recently used programs are removed beyond this; one of a small model takes 0.3 MB.
_MAX_BYTES: Final = 500_000_000
# jax takes this lock to read, write and remove programs.
_LOCK: Final = ".lockfile"
_LOCK_SECONDS: Final = 2.0


def use_compile_cache() -> Path | None:
    """Keep what jax compiles from now on in the user's cache folder.

    Returns:
        The folder that programs are kept in; None if they are not kept.

    Example:
        >>> folder = use_compile_cache()
        >>> use_compile_cache() == folder
        True
    """
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"]:
        return None
    if (configured := settings["jax_compilation_cache_dir"]) is not None:
        return Path(configured)
    folder = Path(platformdirs.user_cache_dir("composable", appauthor=False)) / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
    except OSError:
        return None  # a folder that is not ours to write, such as a confined process's
    for setting, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_compilation_cache_max_size", _MAX_BYTES),
        # Small programs, too: a command runs dozens of them before its first token.
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
    ):
        jax.config.update(setting, value)
    # jax decides once, when it first compiles, whether there is a cache.
    compilation_cache.reset_cache()
    return folder


def _remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed left behind.

    jax writes a program, and then the time of its last use beside it. Of a program without that
    time it cannot remove others to make room, and then it keeps nothing any more.

    Raises:
        OSError: If the folder cannot be written.
    """
    try:
        with filelock.FileLock(folder / _LOCK, timeout=_LOCK_SECONDS):
            for program in folder.glob("*-cache"):
                used = program.with_name(program.name.removesuffix("-cache") + "-atime")
                if not (used.is_file() and used.stat().st_size and program.stat().st_size):
                    program.unlink()
    except filelock.Timeout:
        pass  # another process is at work in the folder, and checked it when it started
