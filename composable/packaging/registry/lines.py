"""Documents of JSON lines with checksums: indexes, catalogues, feeds of advisories and records.

A document states its own extent: every line has the number of lines in ``whole.lines``, and the
first also has ``whole.rest``, the SHA-256 of all bytes after the first line. A document that lost
lines is therefore an error, never an older state. Clients that do not know the field ignore it;
documents without it were written before 0.3 and are read without that check.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from composable.errors import RegistryError
from composable.interface.digest import canonical_json, digest_bytes
from composable.packaging.registry.storage import Document

# A line repeats parts of a manifest, which is smaller than this.
MAX_LINE_BYTES: Final = 1 << 20
CHECKSUM: Final = "check"
EXTENT: Final = "whole"
CATALOG_FILE: Final = "catalog.jsonl"
ADVISORIES_FILE: Final = "advisories.jsonl"
_INDEX_KEY: Final = ("name", "version")
_KEYS: Final = {CATALOG_FILE: ("name",), ADVISORIES_FILE: ("id",)}


def format_line(fields: Mapping[str, Any]) -> bytes:
    """Return the fields as a line of JSON that includes a checksum over them.

    Example:
        >>> format_line({"name": "german"})
        b'{"check":"a0b71369af16c9bc","name":"german"}'
    """
    return canonical_json({**fields, CHECKSUM: _checksum_of(fields)})


def parse_line(line: bytes, where: str, *, needs_checksum: bool = False) -> dict[str, Any]:
    """Parse a line of JSON and verify its checksum.

    Args:
        line: One JSON object.
        where: File and line number, for errors.
        needs_checksum: Whether a line without a checksum is refused; catalogues that were written
            before 0.3 have none.

    Returns:
        The fields, without the checksum.

    Raises:
        RegistryError: When the line is too long, not a JSON object, or does not match its checksum.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RegistryError(
            f"a line of {len(line):,} bytes, expected at most {MAX_LINE_BYTES:,}", where=where
        )
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("expected a JSON object")
        checksum = fields.pop(CHECKSUM, None)
        is_older = checksum is None and EXTENT not in fields and not needs_checksum
        if not is_older and checksum != _checksum_of(fields):
            raise ValueError("the checksum does not match")
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"damaged: {error}", where=where) from error
    return fields


def format_document(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a document with one line for each row, which states its extent."""
    if not rows:
        return b""
    extent: dict[str, Any] = {"lines": len(rows)}
    rest = b"".join(format_line({**row, EXTENT: extent}) + b"\n" for row in rows[1:])
    first = format_line({**rows[0], EXTENT: {**extent, "rest": digest_bytes(rest)}})
    return first + b"\n" + rest


def check_extent(document: Document, where: str) -> None:
    """Check that a document is as long as it states, with the bytes that it states.

    Raises:
        RegistryError: When it is empty, truncated or changed; or when neither the document nor the
            response states its length.
    """
    lines = document.data.splitlines()
    if not lines:
        raise RegistryError("is empty", where=where)
    stated = parse_line(lines[0], f"{where}:1").get(EXTENT)
    if stated is None:
        if not document.is_length_known:
            raise RegistryError(
                "may be truncated: neither the response nor the document states its length",
                where=where,
            )
        return
    if not isinstance(stated, dict) or stated.get("lines") != len(lines):
        expected = stated.get("lines") if isinstance(stated, dict) else None
        raise RegistryError(
            f"truncated or damaged: it has {len(lines)} lines, expected {str(expected)[:20]}",
            where=where,
        )
    if stated.get("rest") != digest_bytes(document.data.partition(b"\n")[2]):
        raise RegistryError("damaged: it does not match its digest", where=where)


def key_fields(path: str) -> tuple[str, ...]:
    """Return what identifies a line of a document, by the document's path in the registry.

    Example:
        >>> key_fields("index/ge/german.jsonl")
        ('name', 'version')
    """
    return _KEYS.get(path, _INDEX_KEY)


def find_lost(older: Document, newer: Document, fields: Sequence[str]) -> list[str]:
    """Return the lines that an earlier state of a document had and a later one has not.

    Releases, packages and advisories are never removed, so a state without one of them is not the
    later one, even if it is whole: a server, or something between, has gone back to an older copy.

    Args:
        older: The earlier state.
        newer: The later state.
        fields: What identifies a line, as `key_fields` returns it.

    Example:
        >>> rows = [{"name": "german", "version": f"1.{minor}.0"} for minor in range(2)]
        >>> older, newer = (Document(format_document(rows[:n]), None) for n in (2, 1))
        >>> find_lost(older, newer, ["name", "version"])
        ['german 1.1.0']
        >>> find_lost(newer, older, ["name", "version"])
        []
    """
    before, after = (_read_keys(document, fields) for document in (older, newer))
    return [key for key in before if key not in after]


def has_same_lines(data: bytes, other: bytes) -> bool:
    """Return whether two documents have the same undamaged lines, though written differently."""

    def read(text: bytes) -> list[dict[str, Any]]:
        rows = [parse_line(line, "") for line in text.splitlines()]
        return [{key: row[key] for key in row.keys() - {EXTENT}} for row in rows]

    with contextlib.suppress(RegistryError):
        return read(data) == read(other)
    return False


def _read_keys(document: Document, fields: Sequence[str]) -> dict[str, None]:
    """Return what identifies each undamaged line, in order."""
    keys: dict[str, None] = {}
    for line in document.data.splitlines():
        with contextlib.suppress(RegistryError):
            row = parse_line(line, "")
            keys[" ".join(str(row.get(field))[:100] for field in fields)] = None
    return keys


def check_document(path: str, document: Document, where: str) -> None:
    """Check that a document is undamaged, as far as it can be told without reading its fields.

    Args:
        path: Its path in the registry; `.jsonl` are lines, any other is one JSON value.
        document: The document.
        where: Its location, for errors.

    Raises:
        RegistryError: When it is damaged or truncated.
    """
    if path.endswith(".jsonl"):
        for number, line in enumerate(document.data.splitlines(), 1):
            parse_line(line, f"{where}:{number}")
        check_extent(document, where)
        return
    try:
        json.loads(document.data)
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"damaged: {error}", where=where) from error


def _checksum_of(fields: Mapping[str, Any]) -> str:
    return digest_bytes(canonical_json(fields)).removeprefix("sha256:")[:16]
