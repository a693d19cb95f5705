"""TOML tables, read strictly and written in a fixed order.

Every table of the project's files is read through `Table`: each field is read once with its type,
and unknown fields are refused, with a hint at the closest known name.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from composable.errors import ManifestError, PackagingError, did_you_mean
from composable.files.reading import read_bytes
from composable.files.text import decode_text
from composable.files.user_files import BYTE_ORDER_MARK
from composable.packaging.versions.constraint import Constraint
from composable.packaging.versions.names import check_package_name
from composable.packaging.versions.version import Version

# Enough for the chunk digests of 100 GB, or for a lock of 1,000 experts.
MAX_TOML_BYTES: Final = 1 << 20
# Time and memory of the standard library's reader grow with the square of the number of parts of a
# key. This finds such keys, and text that looks like one; possessive, so in linear time.
MAX_KEY_PARTS: Final = 32
_DEEP_KEY: Final = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MAX_KEY_PARTS}}}"""
)
# Lines that version control leaves where two sides changed the same text.
_CONFLICT: Final = re.compile(r"^(?:<{7}|\|{7}|={7}|>{7})(?=[ \r\n]|\Z)", re.MULTILINE)
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
# Names of fields may be long in files of others.
MAX_SHOWN: Final = 100
_REQUIRED: Final = object()
T = TypeVar("T")


def read_toml_text(path: Path) -> str:
    """Return the text of a TOML file.

    Raises:
        ManifestError: When it does not exist, or is not UTF-8 text.
        DiskError: When it cannot be read.
    """
    try:
        data = read_bytes(path, MAX_TOML_BYTES)
    except FileNotFoundError as error:
        raise ManifestError("no such file", where=str(path)) from error
    return decode_text(data, str(path), ManifestError)


def parse_toml(text: str, where: str) -> Table:
    """Parse TOML text as a table whose fields are then read one by one.

    Args:
        text: The text. A byte order mark, which some editors write, is skipped.
        where: Name of the file, for errors.

    Raises:
        ManifestError: For text that is not TOML.
    """
    text = text.removeprefix(BYTE_ORDER_MARK)
    if len(text) > MAX_TOML_BYTES:
        raise ManifestError(
            f"{len(text):,} characters, expected at most {MAX_TOML_BYTES:,}", where=where
        )
    if _DEEP_KEY.search(text):
        raise ManifestError(f"a key has more than {MAX_KEY_PARTS} parts", where=where)
    try:
        return Table(tomllib.loads(text), where)
    except (ValueError, RecursionError) as error:
        line = find_conflict(text)
        if line is not None:
            raise ManifestError(
                f"a merge left conflict markers in line {line}",
                where=where,
                hint="edit it: keep one side of each conflict and remove the markers",
            ) from error
        raise ManifestError(f"not TOML: {error}", where=where) from error


def find_conflict(text: str) -> int | None:
    r"""Return the number of the first line with a conflict marker of a merge; None without any.

    Example:
        >>> find_conflict("a = 1\n<<<<<<< HEAD\nb = 2\n=======\nb = 3\n>>>>>>> x\n")
        2
    """
    found = _CONFLICT.search(text)
    return None if found is None else text.count("\n", 0, found.start()) + 1


class Table:
    """A table of one file, with the dotted path that leads to it.

    Args:
        data: What the TOML reader returned.
        file: Name of the file, for errors.
        path: Dotted path of this table, empty for the whole file.
    """

    def __init__(self, data: Mapping[str, Any], file: str, path: str = "") -> None:
        self._data = data
        self._file = file
        self._path = path
        self._read_fields: dict[str, None] = {}

    def where(self, field: str = "") -> str:
        """Return the location of a field, for example `expert.toml: requires.german`."""
        path = ".".join(part for part in (self._path, field[:MAX_SHOWN]) if part)
        return f"{self._file}: {path}" if path else self._file

    def __contains__(self, field: str) -> bool:
        return field in self._data

    def names(self) -> list[str]:
        """Return the names of all fields."""
        return list(self._data)

    def is_table(self, field: str) -> bool:
        """Return whether a field exists and is a table."""
        return isinstance(self._data.get(field), dict)

    def text(self, field: str, default: Any = _REQUIRED, *, max_length: int = 10_000) -> str:
        """Return a field as text.

        Raises:
            ManifestError: When it is missing without a default, or not text, or too long.
        """
        value = self._get(field, str, "text", default)
        if isinstance(value, str) and len(value) > max_length:
            raise ManifestError(
                f"{len(value):,} characters, expected at most {max_length:,}",
                where=self.where(field),
            )
        return cast(str, value)

    def integer(self, field: str, default: Any = _REQUIRED, *, minimum: int = 0) -> int:
        """Return a field as a whole number of at least `minimum`.

        Raises:
            ManifestError: When it is missing without a default, or not such a number.
        """
        value = self._get(field, int, "a whole number", default)
        if isinstance(value, int) and not minimum <= value < 1 << 63:
            raise ManifestError(
                f"{value} is not a whole number of at least {minimum}", where=self.where(field)
            )
        return cast(int, value)

    def number(self, field: str, default: Any = _REQUIRED) -> float:
        """Return a field as a number that is finite and not negative."""
        value = self._get(field, (int, float), "a number", default)
        if isinstance(value, int | float):
            if not 0 <= value < float("inf"):
                raise ManifestError(
                    f"{value} is not a finite number of at least 0", where=self.where(field)
                )
            return float(value)
        return cast(float, value)

    def boolean(self, field: str, default: Any = _REQUIRED) -> bool:
        """Return a field as true or false."""
        if field not in self._data:
            return cast(bool, self._get(field, bool, "true or false", default))
        value = self._data[field]
        self._read_fields[field] = None
        if not isinstance(value, bool):
            raise ManifestError(
                f"{str(value)[:80]!r} is not true or false", where=self.where(field)
            )
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """Return a field as a list of text, empty when it is missing."""
        value = self._get(field, list, "a list of text", [])
        for index, item in enumerate(value):
            if not isinstance(item, str) or len(item) > 1000:
                raise ManifestError(
                    f"{str(item)[:80]!r} is not text", where=self.where(f"{field}[{index}]")
                )
        return tuple(value)

    def value(self, field: str, read: Callable[[str], T], default: Any = _REQUIRED) -> T:
        """Return a text field converted by `read`; errors are raised with its location."""
        text = self.text(field, default)
        if text is default:
            return cast(T, default)
        try:
            return read(text)
        except PackagingError as error:
            raise ManifestError(error.message, where=self.where(field), hint=error.hint) from error

    def version(self, field: str) -> Version:
        """Return a field as a version."""
        return self.value(field, Version)

    def ranges(self, field: str) -> dict[str, Constraint]:
        """Return a table of package name to range, empty when it is missing."""
        table = self.table(field, {})
        found: dict[str, Constraint] = {}
        for name in table.names():
            check_package_name(name, table.where(name if _is_bare(name) else json.dumps(name)))
            found[name] = table.value(name, Constraint)
        return found

    def table(self, field: str, default: Any = _REQUIRED) -> Table:
        """Return a field as a table."""
        value = self._get(field, dict, "a table", default)
        return Table(value, self._file, f"{self._path}.{field}" if self._path else field)

    def tables(self, field: str) -> list[Table]:
        """Return a field as a list of tables, empty when it is missing."""
        value = self._get(field, list, "a list of tables", [])
        path = ".".join(part for part in (self._path, field) if part)
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise ManifestError(
                    f"{str(item)[:80]!r} is not a table", where=self.where(f"{field}[{index}]")
                )
        return [Table(item, self._file, f"{path}[{index}]") for index, item in enumerate(value)]

    def finish(self, also: Iterable[str] = ()) -> None:
        """Refuse fields that have not been read.

        Raises:
            ManifestError: With the field and a hint at the closest known one.
        """
        known = [*self._read_fields, *also]
        for field in self._data:
            if field not in known:
                shown = field if _is_bare(field) else json.dumps(field[:80])
                hint = did_you_mean(field, known) or f"known fields: {', '.join(known)}"
                raise ManifestError("unknown field", where=self.where(shown), hint=hint)

    def _get(self, field: str, kind: type | tuple[type, ...], expected: str, default: Any) -> Any:
        self._read_fields[field] = None
        if field not in self._data:
            if default is _REQUIRED:
                raise ManifestError(
                    f"missing, expected {expected}",
                    where=self.where(field),
                    hint=self._hint_at_misspelling(field),
                )
            return default
        value = self._data[field]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ManifestError(f"{str(value)[:80]!r} is not {expected}", where=self.where(field))
        return value

    def _hint_at_misspelling(self, field: str) -> str | None:
        import difflib

        close = difflib.get_close_matches(field, self._data.keys() - self._read_fields.keys(), n=1)
        return f"is the unknown field {close[0]!r} a misspelling?" if close else None


def format_toml(tables: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Write tables as TOML text.

    Args:
        tables: Headers as written in the file (empty, `expert` or `[files]` for a list entry) and
            their fields in order; fields that are None and tables without fields are omitted.

    Example:
        >>> print(format_toml([("expert", {"name": "german", "license": None})]), end="")
        [expert]
        name = "german"
    """
    blocks = []
    for header, fields in tables:
        lines = [
            f"{format_key(key)} = {format_value(value)}"
            for key, value in fields.items()
            if value is not None
        ]
        if lines:
            blocks.append("\n".join([f"[{header}]"] * bool(header) + lines))
    return "\n\n".join(blocks) + "\n"


def format_key(key: str) -> str:
    """Return a key as TOML writes it."""
    return key if _is_bare(key) else format_value(key)


def format_value(value: Any) -> str:
    """Return text, a number, a boolean, or a list or table of them, as TOML writes it.

    A list of tables is written one per line, so that a change affects one line.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        return "[\n" + "".join(f"  {format_value(item)},\n" for item in value) + "]"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        items = (f"{format_key(key)} = {format_value(item)}" for key, item in value.items())
        return f"{{ {', '.join(items)} }}" if value else "{}"
    # JSON's escapes are TOML's, except for the delete character, which TOML requires escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _is_bare(key: str) -> bool:
    return _BARE_KEY.fullmatch(key) is not None
