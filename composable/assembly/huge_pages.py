"""Memory of training in pages of 2 MB, where the system gives them to those who ask.

A step's temporary memory comes from the system and goes back, step after step. In pages of 4 KB,
each of which the system clears and accounts for alone, that takes a twentieth of a step on a CPU.
Nothing here changes what a program computes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_SETTING: Final = "glibc.malloc.hugetlb"
_VARIABLE: Final = "GLIBC_TUNABLES"
_ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask_for_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the setting of a process that makes its C library ask for large pages, if any does.

    Args:
        environment: Variables that it has otherwise; what they say of these pages is kept.

    Example:
        >>> ask_for_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
        {}
    """
    others = environment.get(_VARIABLE, "")
    if _SETTING in others or not _are_given():
        return {}
    return {_VARIABLE: ":".join(filter(None, [others, f"{_SETTING}=1"]))}


def restart_with_huge_pages() -> None:
    """Start this process again, as another program of the same number, if that gets large pages.

    The C library reads the setting once, before anything else runs: call this first.
    """
    setting = ask_for_huge_pages(os.environ)
    if setting and sys.executable:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **setting})


def _are_given() -> bool:
    """Return whether the system gives large pages to those who ask, and not to all."""
    try:
        return "[madvise]" in _ENABLED.read_text()
    except OSError:
        return False
