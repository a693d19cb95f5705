"""Valid names of packages and files: safe in a path, and hard to confuse with one another."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from composable.errors import ManifestError

MAX_NAME_LENGTH: Final = 64
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_WINDOWS_RESERVED: Final = frozenset(
    ["con", "prn", "aux", "nul"] + [f"{port}{n}" for port in ("com", "lpt") for n in range(10)]
)
# Letters that a reader may confuse, and pairs of letters that look like one.
_LETTERS: Final = str.maketrans("1i|05", "lllos")
_PAIRS: Final = (("rn", "m"), ("vv", "w"), ("cl", "d"))


def is_package_name(text: object) -> bool:
    """Return whether `text` is a valid package name.

    Example:
        >>> is_package_name("set-mm"), is_package_name("../x")
        (True, False)
    """
    return (
        isinstance(text, str)
        and len(text) <= MAX_NAME_LENGTH
        and _NAME.fullmatch(text) is not None
        and text not in _WINDOWS_RESERVED
    )


def check_package_name(text: object, where: str | None = None) -> str:
    """Return `text` if it is a valid package name.

    Args:
        text: The name: lowercase ASCII letters, digits and single hyphens, a letter first, at
            most 64 characters, and not a reserved device name on Windows.
        where: Dotted path of the name, for the error.

    Raises:
        ManifestError: For any other value.
    """
    if isinstance(text, str) and is_package_name(text):
        return text
    shown = repr(text) if len(repr(text)) <= 80 else repr(text)[:79] + "…"
    if isinstance(text, str) and text in _WINDOWS_RESERVED:
        raise ManifestError(f"{shown} is a reserved device name on Windows", where=where)
    raise ManifestError(
        f"{shown} is not a package name",
        where=where,
        hint="use lowercase letters, digits and single hyphens, a letter first, "
        f"at most {MAX_NAME_LENGTH} characters",
    )


def check_file_name(text: object, where: str | None = None) -> str:
    """Return `text` if it is a valid name of a package file: flat, portable, not hidden.

    Raises:
        ManifestError: For separators, leading dots, device names and non-ASCII characters.
    """
    if (
        isinstance(text, str)
        and len(text) <= 100
        and _FILE_NAME.fullmatch(text)
        and text.split(".")[0].lower() not in _WINDOWS_RESERVED
    ):
        return text
    shown = repr(text) if len(repr(text)) <= 80 else repr(text)[:79] + "…"
    raise ManifestError(
        f"{shown} is not a file name allowed in a package",
        where=where,
        hint="use letters, digits, '-', '_' and '.', without folders",
    )


def confusable_key(name: str) -> str:
    """Return a key that two names share if a reader may confuse them.

    Case, accents, separators, `0`/`o`, `5`/`s`, `1`/`l`/`i` and pairs that look like one letter
    (`rn`/`m`, `vv`/`w`, `cl`/`d`) are folded, so `set-mm`, `SET_MM` and `set-rnm` share one key.

    Example:
        >>> confusable_key("set-mm") == confusable_key("SET_rnm")
        True
    """
    folded = unicodedata.normalize("NFKD", name).casefold()
    text = "".join(ch for ch in folded if not unicodedata.combining(ch) and ch not in "-_. ")
    text = text.translate(_LETTERS)
    for pair, letter in _PAIRS:
        text = text.replace(pair, letter)
    return text
