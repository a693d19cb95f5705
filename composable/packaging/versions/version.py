"""Semantic versions as values: SemVer 2.0.0, ordered and hashable. Ranges are in `constraint`."""

from __future__ import annotations

import functools
from typing import Final

import semver

from composable.errors import VersionError

MAX_LENGTH: Final = 255

# A prerelease as a sort key: whether it is empty, then its identifiers, numbers before words.
Precedence = tuple[bool, tuple[tuple[int, int, str], ...]]


@functools.total_ordering
class Version:
    """A semantic version, for example `1.4.0`, `2.0.0-rc.1` or `1.0.0+cuda`.

    Build metadata does not affect precedence, and so neither equality nor hash: `1.0.0+a` equals
    `1.0.0+b`. `str` returns the version as it was written, build metadata included.

    Args:
        text: Major, minor and patch, then optional prerelease and build; at most 255 characters.

    Raises:
        VersionError: If `text` is not a version by SemVer 2.0.0.

    Example:
        >>> Version("1.0.0-rc.2") < Version("1.0.0-rc.10") < Version("1.0.0")
        True
        >>> Version("1.4.0").release
        (1, 4, 0)

    References:
        Semantic Versioning 2.0.0, sections 2, 9, 10 and 11.
    """

    __slots__ = ("_text", "build", "major", "minor", "patch", "precedence", "prerelease")

    major: int
    minor: int
    patch: int
    prerelease: str
    build: str
    precedence: tuple[int, int, int, Precedence]

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or len(text) > MAX_LENGTH:
            shown = repr(text) if len(repr(text)) < 80 else f"{str(text)[:60]!r}…"
            raise VersionError(
                f"{shown} is not a semantic version: expected at most {MAX_LENGTH} characters"
            )
        try:
            parsed = semver.Version.parse(text)
        except ValueError as error:
            raise VersionError(
                f"{text!r} is not a semantic version", hint=_suggest_spelling(text)
            ) from error
        self._text = text
        self.major = int(parsed.major)
        self.minor = int(parsed.minor)
        self.patch = int(parsed.patch)
        self.prerelease = parsed.prerelease or ""
        self.build = parsed.build or ""
        self.precedence = (*self.release, precedence_of(self.prerelease))

    @property
    def release(self) -> tuple[int, int, int]:
        """Major, minor and patch."""
        return (self.major, self.minor, self.patch)

    @property
    def is_prerelease(self) -> bool:
        """Whether this version comes before the release of the same numbers."""
        return bool(self.prerelease)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Version({self._text!r})"

    def __hash__(self) -> int:
        return hash(self.precedence)

    def __eq__(self, other: object) -> bool:
        return self.precedence == other.precedence if isinstance(other, Version) else NotImplemented

    def __lt__(self, other: Version) -> bool:
        return self.precedence < other.precedence if isinstance(other, Version) else NotImplemented


def precedence_of(prerelease: str) -> Precedence:
    """Return the sort key of a prerelease string; the empty string, a release, sorts last.

    Example:
        >>> precedence_of("rc.1") < precedence_of("rc.1.0") < precedence_of("")
        True
    """
    identifiers = tuple(
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in prerelease.split(".")
        if prerelease
    )
    return (not prerelease, identifiers)


def _suggest_spelling(text: str) -> str:
    """Return a hint how to write the version that `text` seems to mean."""
    bare = text.strip().lstrip("vV=").strip()
    numbers = bare.split(".")
    if all(part.isascii() and part.isdigit() for part in numbers) and 1 <= len(numbers) <= 3:
        padded = [str(int(part[:20])) for part in numbers] + ["0"] * (3 - len(numbers))
        return f"write {'.'.join(padded)!r}"
    return "write MAJOR.MINOR.PATCH, for example '1.0.0' or '1.0.0-rc.1'"
