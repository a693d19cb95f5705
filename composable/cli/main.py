"""`composable`: the entry point.

Only the table of commands is imported here, so that `composable --help` is fast; every other
call goes to `app`, which imports the file that holds the command.
"""

from __future__ import annotations

import os
import sys

from composable.cli.commands import format_help


def run() -> None:
    """Run the command line."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]) and "_COMPOSABLE_COMPLETE" not in os.environ:
        print(format_help(), end="")
        return
    from composable.cli.app import app

    app(prog_name="composable")
