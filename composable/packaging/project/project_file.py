"""Edits of the text of `composable.toml` that leave everything else as the user wrote it.

Order, comments, spacing and line endings outside the edited entries are kept. What the entries mean
and whether an edit is allowed is decided in `project.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from composable.errors import PackagingError
from composable.files.user_files import BYTE_ORDER_MARK, match_style
from composable.packaging.manifests.toml import format_value

if TYPE_CHECKING:
    from tomlkit.items import Item, Key

    # The lines of a table as tomlkit holds them: values and tables have a key, comments and blank
    # lines have none. Edits change these lists, which is all that rendering reads: the mapping
    # interface of tomlkit can neither choose a place nor edit a split table.
    Body = list[tuple[Key | None, Item]]


def edit_experts(text: str, entries: Mapping[str, str | Mapping[str, Any] | None]) -> str:
    r"""Return the text of a project file with entries of `[experts]` added, replaced or removed.

    Args:
        text: A valid project file.
        entries: A version range, a table of fields, or None to remove the entry, by expert name.

    Returns:
        The edited text. A new entry takes one line after the existing ones; an existing entry keeps
        its place, its comment and its form (one line, dotted keys, or a table of its own).

    Raises:
        PackagingError: When the TOML library cannot edit the text.

    Example:
        >>> edit_experts('[experts]\ngerman = "^1"  # mine\n', {"german": "^2"})
        '[experts]\ngerman = "^2"  # mine\n'
    """
    from tomlkit.exceptions import TOMLKitError  # here: reading a project does not need it

    edited = text.removeprefix(BYTE_ORDER_MARK)
    edited = edited if edited.endswith("\n") else f"{edited}\n"
    for name, entry in entries.items():
        try:
            edited = _edit_expert(edited, name, entry)
        except TOMLKitError as error:
            raise PackagingError(f"cannot edit {name!r}: {error}") from error
    return match_style(edited, text)


def _edit_expert(text: str, name: str, entry: str | Mapping[str, Any] | None) -> str:
    """Return the text with the entry of one expert edited."""
    import tomlkit
    from tomlkit.items import Table

    document = tomlkit.parse(text)
    # One table, one value, or several tables where others stand between them.
    places = _find_key(document.body, "experts")
    if not places:
        if entry is None:
            return text
        return f"{text.rstrip()}\n\n[experts]\n{name} = {format_value(entry)}\n"
    parts = [item for _, item in (document.body[place] for place in places)]
    tables = [item for item in parts if isinstance(item, Table)]
    if not tables:
        experts = {**parts[0].unwrap(), name: entry}
        given = {key: value for key, value in experts.items() if value is not None}
        _replace_value(document.body, places[0], given)
        return document.as_string()
    found = [(table.value.body, i) for table in tables for i in _find_key(table.value.body, name)]
    if entry is None:
        _remove_items(found)
    elif found:
        body, place = found[0]
        item = body[place][1]
        _remove_items(found[1:])
        if isinstance(item, Table):
            _set_fields(item.value.body, {"version": entry} if isinstance(entry, str) else entry)
        else:
            _replace_value(body, place, entry)
    else:
        with_header = [table for table in tables if not table.is_super_table()]
        _add_value((with_header or tables)[0].value.body, name, entry)
    return document.as_string()


def _find_key(body: Body, name: str) -> list[int]:
    """Return where a key is; dotted keys and split tables may repeat it."""
    return [i for i, (key, _) in enumerate(body) if key is not None and key.key == name]


def _set_fields(body: Body, fields: Mapping[str, Any]) -> None:
    """Give a table exactly these fields; those with the same value stay as they are."""
    _remove_items([(body, i) for i, (key, _) in enumerate(body) if key and key.key not in fields])
    for field, value in fields.items():
        place = next(iter(_find_key(body, field)), None)
        if place is None:
            _add_value(body, field, value)
        elif body[place][1].unwrap() != value:
            _replace_value(body, place, value)


def _replace_value(body: Body, place: int, value: Any) -> None:
    """Replace a value, and keep its key, the spaces around it and the comment after it."""
    import tomlkit

    key, old = body[place]
    item = tomlkit.value(format_value(value))
    item.trivia.indent, item.trivia.trail = old.trivia.indent, old.trivia.trail
    item.trivia.comment_ws, item.trivia.comment = old.trivia.comment_ws, old.trivia.comment
    body[place] = (key, item)


def _add_value(body: Body, name: str, value: Any) -> None:
    """Add a value after the last one: before the blank lines and comments that follow it."""
    import tomlkit
    from tomlkit.items import SingleKey, Whitespace

    item = tomlkit.value(format_value(value))
    stop = next((i for i, line in enumerate(body) if _has_header(line)), len(body))
    values = [i for i, (key, _) in enumerate(body[:stop]) if key is not None]
    # Comments right below the header of an empty table are about the table.
    blank = [i for i, (_, other) in enumerate(body[:stop]) if isinstance(other, Whitespace)]
    place = values[-1] + 1 if values else next(iter(blank), stop)
    item.trivia.trail = "\n\n" if place < len(body) and _has_header(body[place]) else "\n"
    body.insert(place, (SingleKey(name), item))


def _has_header(line: tuple[Key | None, Item]) -> bool:
    """Return whether an item is a table with a `[header]`, not one of dotted keys."""
    from tomlkit.items import Table

    key, item = line
    return isinstance(item, Table) and key is not None and not key.is_dotted()


def _remove_items(found: Sequence[tuple[Body, int]]) -> None:
    """Remove values and tables, but not the comments below a table: they are about what follows."""
    from tomlkit.items import Table, Whitespace

    for body, place in reversed(found):
        kept: Body = []
        item = body[place][1]
        if isinstance(item, Table) and _has_header(body[place]):
            inner = item.value.body
            kept = inner[max((i + 1 for i, (key, _) in enumerate(inner) if key), default=0) :]
            is_below_value = place > 0 and not isinstance(body[place - 1][1], Table | Whitespace)
            if kept and isinstance(kept[0][1], Whitespace) and not is_below_value:
                kept = kept[1:]  # the blank line above the table is enough
        body[place : place + 1] = kept
