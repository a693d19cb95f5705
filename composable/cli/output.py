"""Output of commands: data to standard output, everything else to standard error.

All text is made printable here, since any of it may quote what others wrote; JSON stays exact.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import typer

from composable.cli.options import AS_JSON, PROCESS
from composable.errors import ComposableError, ComposableWarning
from composable.printable import printable, printable_json


def show(text: str, data: Any, *, as_json: bool, is_quiet: bool = False) -> None:
    """Print the result of a command: `data` as JSON with --json, `text` otherwise.

    Text has lines of its own: what others wrote comes from `format_table` or `printable`.
    """
    if as_json:
        print(printable_json(data, indent=2))
    elif text and not is_quiet:
        print(printable(text, keep="\n"))


def show_error(error: ComposableError, ctx: typer.Context) -> None:
    """Print an error: with --json on standard output, otherwise as text on standard error.

    In a run of many processes it names the one that failed.
    """
    process = ctx.meta.get(PROCESS)
    if ctx.meta.get(AS_JSON, False):
        data = {
            "kind": type(error).__name__,
            "message": error.message,
            "where": error.where,
            "hint": error.hint,
        }
        if process is not None:
            data["process"] = process
        print(printable_json({"error": data}, indent=2))
    else:
        who = "" if process is None else f"process {process}: "
        print(f"error: {who}{error}", file=sys.stderr)


def note(text: str, *, is_quiet: bool = False) -> None:
    """Print a message that is not data, in one line, to standard error."""
    if not is_quiet:
        print(printable(text), file=sys.stderr)


@contextmanager
def note_warnings() -> Iterator[None]:
    """Print the project's warnings as one line each, once for each topic."""
    warned: set[str] = set()
    show_others = warnings.showwarning

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not isinstance(message, ComposableWarning):
            show_others(message, category, filename, lineno, file, line)
        elif message.topic not in warned:
            warned.add(message.topic)
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", ComposableWarning)
        warnings.showwarning = show_warning
        yield


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a plain table; an empty string without rows.

    Args:
        headers: Column names; without any, no head is printed.
        rows: Cells, converted with `str`; each stays in its row, whatever it holds.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if not cells:
        return ""
    if headers:
        cells.insert(0, list(headers))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    return "\n".join(lines)


def format_bytes(size: float) -> str:
    """Return a size in bytes with a decimal unit, such as `4.2 MB`."""
    unit, *larger = "B", "kB", "MB", "GB", "TB"
    while size >= 1000 and larger:
        size, unit = size / 1000, larger.pop(0)
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
