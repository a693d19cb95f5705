"""Output of commands: data to standard output, everything else to standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import typer

from composable.cli.options import AS_JSON
from composable.errors import ComposableError, ContributionWarning


def show(text: str, data: Any, *, as_json: bool, is_quiet: bool = False) -> None:
    """Print the result of a command: `data` as JSON with --json, `text` otherwise."""
    if as_json:
        _print_json(data)
    elif text and not is_quiet:
        print(text)


def show_error(error: ComposableError, ctx: typer.Context) -> None:
    """Print an error: with --json on standard output, otherwise as text on standard error."""
    if ctx.meta.get(AS_JSON, False):
        data = {
            "kind": type(error).__name__,
            "message": error.message,
            "where": error.where,
            "hint": error.hint,
        }
        _print_json({"error": data})
    else:
        print(f"error: {error}", file=sys.stderr)


def note(text: str, *, is_quiet: bool = False) -> None:
    """Print a message that is not data to standard error."""
    if not is_quiet:
        print(text, file=sys.stderr)


@contextmanager
def note_guards() -> Iterator[None]:
    """Print a warning, once per expert, when a model counts contributions as zero."""
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
        if not isinstance(message, ContributionWarning):
            show_others(message, category, filename, lineno, file, line)
        elif message.expert not in warned:
            warned.add(message.expert)
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", ContributionWarning)
        warnings.showwarning = show_warning
        yield


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a plain table; an empty string without rows.

    Args:
        headers: Column names; without any, no head is printed.
        rows: Cells, converted with `str`.
    """
    cells = [[str(cell) for cell in row] for row in rows]
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


def _print_json(data: Any) -> None:
    import json  # here, because `--help` does not need it

    print(json.dumps(data, indent=2, ensure_ascii=False))
