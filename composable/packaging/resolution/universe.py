"""The candidates to choose from, by name, from plain data or from registries.

The resolver sees packages only through the `CandidateSource` port, one name at a time, so that a
registry is asked only for the packages that matter.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

from composable.errors import ConstraintError, ManifestError, VersionError
from composable.packaging.manifests.toml import Table
from composable.packaging.versions.constraint import Constraint, Requirement, parse_target
from composable.packaging.versions.names import check_package_name
from composable.packaging.versions.version import Version

INTERFACE_PREFIX: Final = "interface:"
_FIELDS: Final = ("requires", "conflicts", "extras", "interface", "yanked")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One version of a package as the resolver sees it.

    Args:
        version: The version.
        requires: Packages that it needs.
        conflicts: Packages that it cannot be installed with.
        extras: Packages that each of its optional extras needs in addition, by name of the extra.
        interface: Name and range of the router interface that it plugs into, if it needs one.
        is_yanked: Whether it may be chosen only when locked or pinned exactly.
        refusal: Why it must not be chosen, as the end of a sentence; None if it may be.
        remedy: What the user can do so that it may be, as a command; None if there is nothing.
    """

    version: Version
    requires: Mapping[str, Constraint] = dataclasses.field(default_factory=dict)
    conflicts: Mapping[str, Constraint] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, Mapping[str, Constraint]] = dataclasses.field(default_factory=dict)
    interface: tuple[str, Constraint] | None = None
    is_yanked: bool = False
    refusal: str | None = None
    remedy: str | None = None


class CandidateSource(Protocol):
    """The port through which the resolver finds candidates."""

    def candidates(self, name: str) -> Sequence[Candidate]:
        """Return all versions of a package in any order; none for an unknown name."""

    def names(self) -> Sequence[str]:
        """Return the known names, for a hint when a name is misspelled."""

    def alternatives(self, name: str) -> Mapping[str, str]:
        """Return packages to use instead of one, the best first, with what they have in common."""


@dataclass(frozen=True, kw_only=True)
class Universe:
    """A self-contained resolution problem as data: candidates, requirements and locked versions.

    Args:
        packages: Candidates by package name.
        requires: What the user requires.
        interface: Version of each available router interface; None when interfaces are not
            checked at all.
        locked: Versions to prefer.

    Example:
        >>> universe = Universe.from_dict(
        ...     {"packages": {"german": {"1.0.0": {}, "1.1.0": {"yanked": True}}}}
        ... )
        >>> [(str(c.version), c.is_yanked) for c in universe.candidates("german")]
        [('1.0.0', False), ('1.1.0', True)]
    """

    packages: Mapping[str, Sequence[Candidate]]
    requires: Sequence[Requirement] = ()
    interface: Mapping[str, Version] | None = None
    locked: Mapping[str, Version] = dataclasses.field(default_factory=dict)

    def candidates(self, name: str) -> Sequence[Candidate]:
        """Return all versions of a package; none for an unknown name."""
        return self.packages.get(name, ())

    def names(self) -> Sequence[str]:
        """Return all package names."""
        return list(self.packages)

    def alternatives(self, name: str) -> Mapping[str, str]:
        """Return nothing: plain data does not say what a package is for."""
        return {}

    @classmethod
    def from_dict(cls, data: Any, where: str = "universe") -> Self:
        """Read a universe from plain data.

        Args:
            data: `{"interface": {NAME: VERSION}, "packages": {NAME: {VERSION: {"requires":
                {NAME: RANGE}, "conflicts": {NAME: RANGE}, "extras": {EXTRA: {NAME: RANGE}},
                "interface": RANGE, "yanked": BOOL}}}, "requires": {NAME: RANGE}, "locked":
                {NAME: VERSION}}`; every part may be omitted. A candidate's `interface` is a range
                on the only interface. At the top level, `requires` may name `NAME[EXTRA]`.
            where: Name of the file, for errors.

        Raises:
            ManifestError: `where` is the dotted path of the bad field.
        """
        if not isinstance(data, Mapping):
            raise ManifestError("expected a table", where=where)
        top = Table(data, where)
        interface = _read_versions(top, "interface") if "interface" in top else None
        packages = {}
        table = top.table("packages", {})
        for name in table.names():
            versions = table.table(name)
            packages[name] = [
                _read_candidate(versions.table(text), _read_key(versions, text), interface)
                for text in versions.names()
            ]
        universe = cls(
            packages=packages,
            requires=_read_requirements(top),
            interface=interface,
            locked=_read_versions(top, "locked"),
        )
        top.finish(also=("interface",))
        return universe


def _read_versions(top: Table, field: str) -> dict[str, Version]:
    table = top.table(field, {})
    return {name: table.version(name) for name in table.names()}


def _read_requirements(top: Table) -> list[Requirement]:
    table = top.table("requires", {})
    found = []
    for target in table.names():
        range_ = table.value(target, Constraint)
        try:
            name, extras = parse_target(target)
        except ConstraintError as error:
            where = table.where(json.dumps(target))
            raise ManifestError(error.message, where=where, hint=error.hint) from error
        found.append(Requirement(name, range_, extras))
    return found


def _read_extras(table: Table) -> dict[str, dict[str, Constraint]]:
    extras = table.table("extras", {})
    for name in extras.names():
        check_package_name(name, extras.where(json.dumps(name)))
    return {name: extras.ranges(name) for name in extras.names()}


def _read_candidate(
    table: Table, version: Version, interface: Mapping[str, Version] | None
) -> Candidate:
    need: tuple[str, Constraint] | None = None
    if "interface" in table:
        only = next(iter(interface)) if interface else ""
        need = (only, table.value("interface", Constraint))
    # A universe may have tens of thousands of releases: missing fields must cost nothing.
    candidate = Candidate(
        version=version,
        requires=table.ranges("requires") if "requires" in table else {},
        conflicts=table.ranges("conflicts") if "conflicts" in table else {},
        extras=_read_extras(table) if "extras" in table else {},
        interface=need,
        is_yanked=table.boolean("yanked", False) if "yanked" in table else False,
    )
    table.finish(also=_FIELDS)
    return candidate


def _read_key(table: Table, text: str) -> Version:
    try:
        return _parse_version_cached(text)
    except VersionError as error:
        raise ManifestError(error.message, where=table.where(), hint=error.hint) from error


# Packages share version numbers, and versions are immutable.
_parse_version_cached = functools.lru_cache(maxsize=4096)(Version)
