"""`composable`: the entry point.

Only the table of commands is imported here, so that `composable --help` is fast; every other
call goes to `app`, which imports the file that holds the command.
"""

from __future__ import annotations

import gc
import os
import sys

from composable.assembly.huge_pages import restart_with_huge_pages
from composable.cli.commands import format_help


def run() -> None:
    """Run the command line."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]) and "_COMPOSABLE_COMPLETE" not in os.environ:
        print(format_help(), end="")
        return
    if sys.argv[1:2] == ["train"]:
        restart_with_huge_pages()
    # Libraries make hundreds of thousands of objects while they load, of which few are garbage: to
    # look for it as often as Python does takes a tenth of the start of a command that needs jax.
    gc.set_threshold(10_000, 10, 10)
    from composable.cli.app import app

    app(prog_name="composable")
