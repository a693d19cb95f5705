"""What commands print: data to standard output, everything else to standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final, TextIO

import typer

from composable.errors import ComposableError, ContributionWarning

_AS_JSON: Final = "composable.is_json"


def _note_json(ctx: typer.Context, value: bool) -> bool:
    """Note that errors are to be JSON as well, for whoever catches them."""
    ctx.meta[_AS_JSON] = value
    return value


Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON, errors included.", callback=_note_json),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Offline = Annotated[
    bool,
    typer.Option("--offline", help="Ask no network.", envvar="COMPOSABLE_OFFLINE"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")]


def complete_names(incomplete: str) -> list[str]:
    """Return the experts of the project around here that begin so, for the shell to offer."""
    from composable.packaging.project.project import Project

    try:
        project = Project.find()
        names = {*project.experts, *(project.lock.versions if project.lock else ())}
    except ComposableError:
        return []  # no project here, or none that can be read: there is nothing to offer
    return sorted(name for name in names if name.startswith(incomplete))


def show(text: str, data: Any, *, as_json: bool, is_quiet: bool = False) -> None:
    """Print the outcome of a command: `data` as JSON where that is asked for, or else `text`."""
    if as_json:
        _print_json(data)
    elif text and not is_quiet:
        print(text)


def show_error(error: ComposableError, ctx: typer.Context) -> None:
    """Print an error: as JSON on standard output where JSON was asked for."""
    if ctx.meta.get(_AS_JSON, False):
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
    """Print a remark that is no data to standard error."""
    if not is_quiet:
        print(text, file=sys.stderr)


@contextmanager
def note_guards() -> Iterator[None]:
    """Note experts whose contributions a model counted as zero, each of them once."""
    told: set[str] = set()
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
        elif message.expert not in told:
            told.add(message.expert)
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", ContributionWarning)
        warnings.showwarning = show_warning
        yield


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a plain table in columns; nothing for no rows.

    Args:
        headers: Names of the columns; none at all leaves the head out.
        rows: Their cells, which are shown as `str` does.
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
    """Return a size as people read it: `4.2 MB`."""
    unit, *larger = "B", "kB", "MB", "GB", "TB"
    while size >= 1000 and larger:
        size, unit = size / 1000, larger.pop(0)
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def _print_json(data: Any) -> None:
    import json  # here: `--help` does without

    print(json.dumps(data, indent=2, ensure_ascii=False))
