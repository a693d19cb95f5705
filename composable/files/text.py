"""Incoming text: what every argument, line, prompt, document and TOML file passes through.

Text is UTF-8. A byte order mark at its start is dropped; everything else that is not UTF-8 is an
error that says what it is, never a guess.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from composable.errors import ComposableError, TextError

# Names of files with one JSON object per line end so, in capitals or not.
JSON_LINES: Final = (".jsonl", ".ndjson")
# How files start that are something else: (first bytes, what they are, the cure). UTF-32 is before
# UTF-16, with which it begins.
_ICONV: Final = "convert it with `iconv -f {} -t UTF-8`"
_OTHERS: Final = (
    (codecs.BOM_UTF32_LE, "UTF-32", _ICONV.format("UTF-32")),
    (codecs.BOM_UTF32_BE, "UTF-32", _ICONV.format("UTF-32")),
    (codecs.BOM_UTF16_LE, "UTF-16", _ICONV.format("UTF-16")),
    (codecs.BOM_UTF16_BE, "UTF-16", _ICONV.format("UTF-16")),
    (b"\x1f\x8b", "compressed with gzip", "unpack it with `gunzip`"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with `unzstd`"),
    (b"PK\x03\x04", "a zip archive", "unpack it with `unzip`"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it with `unxz`"),
    *(
        (b"BZh%d1AY&SY" % level, "compressed with bzip2", "unpack it with `bunzip2`")
        for level in range(1, 10)
    ),
    (b"%PDF-", "a PDF document", "extract its text, for example with `pdftotext`"),
)


def decode_text(data: bytes, where: str, error: type[ComposableError] = TextError) -> str:
    r"""Return the text that some bytes hold, without a byte order mark at its start.

    Args:
        data: The bytes.
        where: The file, or what else they are from, for errors.
        error: The class of the errors raised.

    Raises:
        ComposableError: For bytes that are not UTF-8.

    Example:
        >>> decode_text(b"\xef\xbb\xbfhi", "greeting.txt")
        'hi'
    """
    for start, kind, hint in _OTHERS:
        if data.startswith(start):
            raise error(f"the text is {kind}, expected UTF-8", where=where, hint=hint)
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        if problem.reason == "unexpected end of data":
            message = f"not UTF-8 at byte {problem.start}, where it ends inside a character"
            hint = "cut text between characters"
        else:
            message = f"not UTF-8 at byte {problem.start}"
            hint = "save it as UTF-8; if it is Latin-1, " + _ICONV.format("LATIN1")
        raise error(message, where=where, hint=hint) from problem


def check_text(
    text: str, where: str | None = None, error: type[ComposableError] = TextError
) -> str:
    r"""Return text that is in memory already, if UTF-8 can encode it.

    Args:
        text: An argument, or a string of JSON: both may hold half characters.
        where: What it is, for errors.
        error: The class of the errors raised.

    Raises:
        ComposableError: For half of a character.

    Example:
        >>> check_text("naïve")
        'naïve'
    """
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        half = ord(text[problem.start])
        # Python keeps a byte of an argument that is not UTF-8 as one of these.
        if 0xDC80 <= half <= 0xDCFF:
            message = f"not UTF-8 at character {problem.start} (byte 0x{half - 0xDC00:02x})"
            hint = "cut text between characters, and use a UTF-8 terminal"
        else:
            message = (
                f"half of a surrogate pair at character {problem.start}, which UTF-8 cannot encode"
            )
            hint = "cut text between characters; most emoji are two UTF-16 units"
        raise error(message, where=where, hint=hint) from problem
    return text


def has_json_lines(path: Path) -> bool:
    """Return whether a file has one JSON object per line, by its name.

    Example:
        >>> has_json_lines(Path("DATA.JSONL")), has_json_lines(Path("data.json"))
        (True, False)
    """
    return path.suffix.lower() in JSON_LINES


def parse_json_lines(
    data: bytes, where: str, fields: Sequence[str]
) -> Iterator[tuple[dict[str, str], str]]:
    """Yield the text fields of each line, and the place of the line; blank lines are skipped.

    Args:
        data: The file's bytes.
        where: The file, for errors.
        fields: Names of the fields to read; others are ignored.

    Raises:
        TextError: For a line that is not a JSON object with these fields, all of them text.

    Example:
        >>> list(parse_json_lines(b'{"prompt": "hi"}', "p.jsonl", ["prompt"]))
        [({'prompt': 'hi'}, 'p.jsonl:1')]
    """
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            here = f"{where}:{number}"
            yield _parse_line(decode_text(line, here), here, fields), here


def parse_plain_text(data: bytes, where: str, fields: Sequence[str]) -> str:
    """Return the content of a text file.

    Args:
        data: The file's bytes.
        where: The file, for errors.
        fields: Fields that a JSON lines file would have in its place.

    Raises:
        TextError: For bytes that are not UTF-8, or JSON with these fields, which would be read
            with its braces and quotes.
    """
    text = decode_text(data, where)
    if _is_json_with(text, fields):
        raise TextError(
            f"JSON with the field {fields[-1]!r} in a file that is read as plain text",
            where=where,
            hint=f"write one object per line into a file that ends in {JSON_LINES[0]}",
        )
    return text


def _parse_line(line: str, where: str, fields: Sequence[str]) -> dict[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"not JSON: {error}", where=where) from error
    if not isinstance(record, dict):
        raise TextError(f"a {type(record).__name__}, expected an object", where=where)
    found = {}
    for field in fields:
        if field not in record:
            raise TextError(f"no field {field!r}, found {sorted(record)}", where=where)
        if not isinstance(record[field], str):
            kind = type(record[field]).__name__
            raise TextError(f"the field {field!r} is a {kind}, expected a string", where=where)
        found[field] = check_text(record[field], where)
    return found


def _is_json_with(text: str, fields: Sequence[str]) -> bool:
    """Return whether text starts with a JSON object with the last field, or a list of such."""
    start = text.lstrip()
    if not start.startswith(("{", "[")):
        return False
    try:
        value: Any = json.JSONDecoder().raw_decode(start)[0]
    except (ValueError, RecursionError):
        return False
    if isinstance(value, list):
        value = value[0] if value else None
    return isinstance(value, dict) and fields[-1] in value
