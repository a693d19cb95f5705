"""Version ranges with the semantics of Cargo, and requirements on packages.

Operators as pip spells them are accepted too. A constraint is a list of comparators that must all
hold, each an interval in the order of versions. Whether a version exists, is yanked or fits the
router interface is not decided here, but by the resolver.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

from composable.errors import ConstraintError, ManifestError, VersionError
from composable.packaging.versions.names import check_package_name
from composable.packaging.versions.version import Version, precedence_of

MAX_COMPARATORS: Final = 32
MAX_LENGTH: Final = 1024
MAX_DIGITS: Final = 250
MAX_CACHED: Final = 4096
_SYNTAX: Final = re.compile(
    r"""(?P<op>==|!=|~=|>=|<=|=|>|<|\^|~)?[ \t]*
        (?P<major>0|[1-9][0-9]*)
        (?:\.(?P<minor>0|[1-9][0-9]*|[*xX])
        (?:\.(?P<patch>0|[1-9][0-9]*|[*xX])
        (?P<suffix>[-+].*)?)?)?""",
    re.VERBOSE | re.DOTALL,
)
_REQUIREMENT: Final = re.compile(
    r"""(?P<name>[A-Za-z0-9_.-]*?)
        (?:[ \t]*\[(?P<extras>[^\[\]]*)\])?
        [ \t]*(?P<rest>@.*|[\^~=!<>*].*|[ \t][0-9].*)?""",
    re.VERBOSE,
)
_WILDCARDS: Final = ("*", "x", "X")
_SAME_MEANING: Final = {"": "^", "==": "="}
_WRITTEN_ORDER: Final = ("=", "^", "~", ">=", ">", "<", "<=", "!=")

# A position between versions, in the order of `Version.precedence`.
_Bound = tuple[Any, ...]
_LOWEST: Final[_Bound] = ()
_HIGHEST: Final[_Bound] = (math.inf,)
_BEFORE_PRERELEASES: Final = (False, ())


@dataclass(frozen=True)
class Comparator:
    """One operator and a version whose minor and patch may be omitted.

    Args:
        op: One of `=`, `!=`, `^`, `~`, `>`, `>=`, `<`, `<=`.
        major: Major version.
        minor: Minor version, or None if omitted.
        patch: Patch version, or None if omitted.
        prerelease: Prerelease identifiers; empty for a release.
    """

    op: str
    major: int
    minor: int | None = None
    patch: int | None = None
    prerelease: str = ""

    @functools.cached_property
    def bounds(self) -> tuple[_Bound, _Bound]:
        """The half-open interval of versions; for `!=` the interval that is excluded."""
        numbers = (self.major, self.minor or 0, self.patch or 0)
        floor = (*numbers, precedence_of(self.prerelease))
        if self.minor is None:
            beyond = _start_of(self.major + 1)
        elif self.patch is None:
            beyond = _start_of(self.major, self.minor + 1)
        else:
            beyond = (*numbers, (*floor[3], 0))  # just after `floor`, before anything else
        match self.op:
            case ">=":
                return floor, _HIGHEST
            case ">":
                return beyond, _HIGHEST
            case "<":
                return _LOWEST, _start_of(*numbers) if self.patch is None else floor
            case "<=":
                return _LOWEST, beyond
            case "^" if self.major > 0 or self.minor is None:
                return floor, _start_of(self.major + 1)
            case "^" if self.minor or self.patch is None:
                return floor, _start_of(self.major, (self.minor or 0) + 1)
            case "^":
                return floor, _start_of(self.major, 0, (self.patch or 0) + 1)
            case "~" if self.minor is not None:
                return floor, _start_of(self.major, self.minor + 1)
            case "~":
                return floor, _start_of(self.major + 1)
        return floor, beyond

    def contains(self, version: Version) -> bool:
        """Return whether `version` is in the interval, without the prerelease rule."""
        lower, upper = self.bounds
        return (lower <= version.precedence < upper) is not (self.op == "!=")

    def names_prerelease_of(self, version: Version) -> bool:
        """Return whether this names a prerelease of `version`'s major.minor.patch."""
        named = (self.major, self.minor, self.patch)
        return bool(self.prerelease) and self.op != "!=" and named == version.release

    def __str__(self) -> str:
        numbers = [str(part) for part in (self.major, self.minor, self.patch) if part is not None]
        text = ".".join(numbers) + (f"-{self.prerelease}" if self.prerelease else "")
        if self.patch is None and self.op in ("=", "!="):
            return f"{self.op.removeprefix('=')}{text}.*"
        return self.op + text


class Constraint:
    """A range of versions, for example `^1.2`, `>=1.2, <2`, `1.2.*`, `=1.2.3` or `*`.

    A prerelease is contained only if a comparator other than `!=` names a prerelease of the same
    major.minor.patch: `>=1.0.0-rc.1` contains `1.0.0-rc.2` but not `1.1.0-rc.1`. Constraints are
    equal if their canonical spellings are, which `str` returns.

    Args:
        text: Comparators separated by commas. `^` (the default), `~`, `=`, `>`, `>=`, `<`, `<=`
            and `*` have the meaning of Cargo; `==` is `=`, `!=` its complement, and `~=` is pip's.

    Raises:
        ConstraintError: For anything else.

    Example:
        >>> Constraint("^1.2").contains(Version("1.10.0"))
        True
        >>> Constraint("<2, >=1.2, !=1.5.0")
        Constraint('>=1.2, <2, !=1.5.0')

    References:
        The Cargo Book, "Specifying Dependencies"; PEP 440, "Compatible release".
    """

    __slots__ = ("_text", "comparators")

    comparators: tuple[Comparator, ...]

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or len(text) > MAX_LENGTH:
            shown = repr(text) if len(repr(text)) < 80 else repr(text)[:79] + "…"
            raise ConstraintError(f"{shown} is not a version range")
        self.comparators, self._text = _parse_constraint(text)

    @classmethod
    def exactly(cls, version: Version) -> Self:
        """Return the range that contains exactly one version."""
        return cls(f"={version}")

    @property
    def pinned(self) -> Version | None:
        """The version of an exact pin such as `=1.2.3`; None for other ranges."""
        if len(self.comparators) != 1:
            return None
        only = self.comparators[0]
        return Version(str(only)[1:]) if only.op == "=" and only.patch is not None else None

    def contains(self, version: Version) -> bool:
        """Return whether `version` is in this range."""
        if not all(comparator.contains(version) for comparator in self.comparators):
            return False
        return not version.is_prerelease or any(
            comparator.names_prerelease_of(version) for comparator in self.comparators
        )

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Constraint({self._text!r})"

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Constraint) else NotImplemented


def _start_of(major: int, minor: int = 0, patch: int = 0) -> _Bound:
    """Return the position before every prerelease of `major.minor.patch`."""
    return (major, minor, patch, _BEFORE_PRERELEASES)


def _written_order(comparator: Comparator) -> tuple[object, ...]:
    """Sort lower bounds before upper bounds and exclusions, each from low to high.

    `^1` and `^1.0` have the same bounds; the text decides, so the order is deterministic.
    """
    lower, upper = comparator.bounds
    return (_WRITTEN_ORDER.index(comparator.op), lower, upper, str(comparator))


@functools.lru_cache(maxsize=MAX_CACHED)  # a registry repeats the same few ranges
def _parse_constraint(text: str) -> tuple[tuple[Comparator, ...], str]:
    """Return the comparators of a range, in written order, and its canonical spelling."""
    parts = [part.strip(" \t") for part in text.split(",")]
    if len(parts) > MAX_COMPARATORS:
        raise ConstraintError(f"{len(parts)} comparators, expected at most {MAX_COMPARATORS}")
    found: set[Comparator] = set()
    if parts[0] not in _WILDCARDS or len(parts) > 1:
        for part in parts:
            found.update(_parse_comparator(part, text))
    comparators = tuple(sorted(found, key=_written_order))
    return comparators, ", ".join(map(str, comparators)) or "*"


def _parse_comparator(part: str, whole: str) -> list[Comparator]:
    """Parse one comparator; `~=1.2`, which Cargo cannot express in one, becomes two."""
    match = _SYNTAX.fullmatch(part)
    if match is None:
        raise ConstraintError(f"{whole!r} is not a version range", hint=_suggest_spelling(part))
    op = _SAME_MEANING.get(match["op"] or "", match["op"] or "")
    minor, patch = match["minor"], match["patch"]
    is_wild = minor in _WILDCARDS or patch in _WILDCARDS
    if minor in _WILDCARDS and patch is not None and patch not in _WILDCARDS:
        raise ConstraintError(f"{whole!r} is not a version range: nothing may follow a wildcard")
    if match["suffix"] and is_wild:
        raise ConstraintError(f"{whole!r} is not a version range: nothing may follow a wildcard")
    if is_wild and not match["op"]:
        op = "="
    prerelease = ""
    if match["suffix"]:
        try:
            prerelease = Version(f"0.0.0{match['suffix']}").prerelease
        except VersionError as error:
            raise ConstraintError(
                f"{whole!r} is not a version range", hint=_suggest_spelling(part)
            ) from error
    numbers = [match["major"], *(n for n in (minor, patch) if n and n not in _WILDCARDS)]
    if any(len(number) > MAX_DIGITS for number in numbers):
        raise ConstraintError(f"{whole[:60]!r}… is not a version range: a number is too long")
    major, *rest = map(int, numbers)
    minor_number = rest[0] if rest else None
    patch_number = rest[1] if len(rest) == 2 else None
    if op != "~=":
        return [Comparator(op, major, minor_number, patch_number, prerelease)]
    if is_wild or minor_number is None:
        raise ConstraintError(
            f"{whole!r} is not a version range: '~=' needs at least major and minor",
            hint=f"write '^{major}'",
        )
    if patch_number is not None:
        return [Comparator("~", major, minor_number, patch_number, prerelease)]
    return [Comparator(">=", major, minor_number), Comparator("<", major + 1)]


def _suggest_spelling(part: str) -> str:
    """Return a hint how to write the range that `part` seems to mean."""
    if not part:
        return "write '*' for any version"
    if "||" in part:
        return "alternatives are not supported: write one range that contains both"
    if " - " in part:
        low, _, high = part.partition(" - ")
        return f"write '>={low.strip()}, <={high.strip()}'"
    if part.lstrip("^~=<> ").startswith("v"):
        return "leave out the 'v'"
    if " " in part.lstrip("^~=!<> "):
        return "separate comparators with a comma"
    return "for example, write '^1.2', '>=1.2, <2', '1.2.*' or '=1.2.3'"


ANY: Final = Constraint("*")


def have_common_version(ranges: Iterable[Constraint]) -> bool:
    """Return whether some version, existing or not, is in all ranges.

    The lowest such version is where a range begins, or just after a version that one excludes.

    Example:
        >>> have_common_version([Constraint("^1.2"), Constraint("<1.3")])
        True
    """
    ranges = list(ranges)
    return any(all(range_.contains(start) for range_ in ranges) for start in _starts(ranges))


def is_within(inner: Constraint, outer: Constraint) -> bool:
    """Return whether `outer` contains every version that `inner` contains.

    The lowest that is missing is where `inner` begins, or where `outer` ends or has a gap.

    Example:
        >>> is_within(Constraint("~1.2"), Constraint("^1"))
        True
    """
    starts = _starts((inner, outer))
    return all(outer.contains(start) for start in starts if inner.contains(start))


def _starts(ranges: Iterable[Constraint]) -> set[Version]:
    """Return the versions at which ranges may begin or end."""
    starts = {Version("0.0.0")}
    for comparator in (c for range_ in ranges for c in range_.comparators):
        major, minor, patch = comparator.major, comparator.minor or 0, comparator.patch or 0
        if comparator.prerelease:
            starts.add(Version(f"{major}.{minor}.{patch}-{comparator.prerelease}"))
            starts.add(Version(f"{major}.{minor}.{patch}-{comparator.prerelease}.0"))
        starts |= {
            Version(f"{major}.{minor}.{patch}"),
            Version(f"{major}.{minor}.{patch + 1}"),
            Version(f"{major}.{minor + 1}.0"),
            Version(f"{major + 1}.0.0"),
        }
    return starts


@dataclass(frozen=True)
class Requirement:
    """A package, a range of its versions, and the extras of it that are required.

    Args:
        name: Package name.
        constraint: Range of versions.
        extras: Names of optional extras, in any order; stored sorted, without duplicates.

    Raises:
        ConstraintError: For an extra whose name is not valid as a package name.

    Example:
        >>> Requirement.parse("german[news,code]>=1.2,<2")
        Requirement(name='german', constraint=Constraint('>=1.2, <2'), extras=('code', 'news'))
    """

    name: str
    constraint: Constraint = ANY
    extras: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for extra in self.extras:
            try:
                check_package_name(extra)
            except ManifestError as error:
                message = error.message.replace("a package name", "the name of an extra")
                raise ConstraintError(message, hint=error.hint) from error
        object.__setattr__(self, "extras", tuple(sorted(set(self.extras))))

    @property
    def target(self) -> str:
        """Package and extras, without the range: `german` or `german[code,news]`."""
        return f"{self.name}[{','.join(self.extras)}]" if self.extras else self.name

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `german`, `german>=1.2,<2`, `german ^1.2`, `german[code]>=1.2` or `german@1.2.0`.

        `@` pins exactly one version; extras are separated by commas.

        Raises:
            ConstraintError: For a bad name, extra or range; the message quotes the whole text.
        """
        match = _REQUIREMENT.fullmatch(text)
        if match is None:
            raise ConstraintError(
                f"{text!r} is not a requirement",
                hint="write NAME or NAME>=1.2,<2 or NAME@1.2.0 or NAME[EXTRA]>=1.2",
            )
        name, rest = match["name"], (match["rest"] or "*").strip()
        try:
            check_package_name(name)
            extras = _split_extras(match["extras"])
            if not rest.startswith("@"):
                return cls(name, Constraint(rest), extras)
            return cls(name, Constraint.exactly(Version(rest[1:].strip())), extras)
        except VersionError as error:
            raise ConstraintError(
                f"{text!r}: expected a full version after '@'",
                hint=f"write a range after the name, for example '{name}>=1.2'",
            ) from error
        except (ConstraintError, ManifestError) as error:
            raise ConstraintError(f"{text!r}: {error.message}", hint=error.hint) from error

    def __str__(self) -> str:
        return self.target if self.constraint == ANY else f"{self.target} {self.constraint}"


def parse_target(text: str) -> tuple[str, tuple[str, ...]]:
    """Parse package and extras, without a range: `german` or `german[code,news]`.

    Returns:
        The package and its extras, sorted.

    Raises:
        ConstraintError: For a bad name, a bad extra or trailing text.

    Example:
        >>> parse_target("german[news,code]")
        ('german', ('code', 'news'))
    """
    match = _REQUIREMENT.fullmatch(text)
    if match is None or match["rest"]:
        raise ConstraintError(
            f"{text!r} is neither NAME nor NAME[EXTRA]", hint="leave out the range"
        )
    try:
        name = check_package_name(match["name"])
        return name, Requirement(name, ANY, _split_extras(match["extras"])).extras
    except (ConstraintError, ManifestError) as error:
        message = f"{text!r}: {error.message}" if "[" in text else error.message
        raise ConstraintError(message, hint=error.hint) from error


def _split_extras(text: str | None) -> tuple[str, ...]:
    """Return the names between the brackets; empty without brackets."""
    if text is None:
        return ()
    if not text.strip(" \t"):
        raise ConstraintError(
            "no extra between the brackets", hint="name an extra, or leave out the brackets"
        )
    return tuple(part.strip(" \t") for part in text.split(","))


def join_extra(name: str, extra: str) -> str:
    """Return the name of a package with one of its extras.

    Example:
        >>> join_extra("german", "code")
        'german[code]'
    """
    return f"{name}[{extra}]"


def split_extra(name: str) -> tuple[str, str | None]:
    """Return package and extra of a name that `join_extra` returned, or a plain name and None.

    Example:
        >>> split_extra("german[code]"), split_extra("german")
        (('german', 'code'), ('german', None))
    """
    package, bracket, rest = name.partition("[")
    return package, rest.removesuffix("]") if bracket else None
