"""What packages and files may be called, so that a name is safe in a path and to a reader's eye."""

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
# Letters that a reader may take for one another, and pairs that run together into one.
_LETTERS: Final = str.maketrans("1i|05", "lllos")
_PAIRS: Final = (("rn", "m"), ("vv", "w"), ("cl", "d"))


def is_package_name(text: object) -> bool:
    """Say whether `text` may name a package."""
    return (
        isinstance(text, str)
        and len(text) <= MAX_NAME_LENGTH
        and _NAME.fullmatch(text) is not None
        and text not in _WINDOWS_RESERVED
    )


def check_package_name(text: object, where: str | None = None) -> str:
    """Return `text` if it may name a package.

    Args:
        text: The name: lowercase ASCII letters, digits and single hyphens, a letter first, at
            most 64 characters, not a name that Windows keeps for devices.
        where: Dotted path of the name, for the error.

    Raises:
        ManifestError: For any other value.
    """
    if isinstance(text, str) and is_package_name(text):
        return text
    shown = repr(text) if len(repr(text)) <= 80 else repr(text)[:79] + "…"
    if isinstance(text, str) and text in _WINDOWS_RESERVED:
        raise ManifestError(f"{shown} is a device name on Windows", where=where)
    raise ManifestError(
        f"{shown} is not a package name",
        where=where,
        hint="use lowercase letters, digits and single hyphens, a letter first, "
        f"at most {MAX_NAME_LENGTH} characters",
    )


def check_file_name(text: object, where: str | None = None) -> str:
    """Return `text` if it may name a file of a package: flat, portable, not hidden.

    Raises:
        ManifestError: For separators, leading dots, device names and anything but plain ASCII.
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
        f"{shown} is not a file name of a package",
        where=where,
        hint="packages are flat: letters, digits, '-', '_' and '.', no folders",
    )


def confusable_key(name: str) -> str:
    """Return a key that two names share when a reader may take one for the other.

    Case, accents, separators, `0`/`o`, `5`/`s`, `1`/`l`/`i` and pairs that run together (`rn`/`m`,
    `vv`/`w`, `cl`/`d`) are folded, so `set-mm`, `SET_MM` and `set-rnm` share one key.
    """
    folded = unicodedata.normalize("NFKD", name).casefold()
    text = "".join(ch for ch in folded if not unicodedata.combining(ch) and ch not in "-_. ")
    text = text.translate(_LETTERS)
    for pair, letter in _PAIRS:
        text = text.replace(pair, letter)
    return text
