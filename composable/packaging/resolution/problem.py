"""The problem that a solver is given: candidates, their requirements and which are preferred.

It asks its source for one package at a time, and for no package that the search does not need.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from composable.packaging.resolution.dependency_order import DependencyOrder
from composable.packaging.resolution.solver import ChoiceSet
from composable.packaging.resolution.universe import INTERFACE_PREFIX, Candidate, CandidateSource
from composable.packaging.versions.constraint import (
    ANY,
    Constraint,
    Requirement,
    join_extra,
    split_extra,
)
from composable.packaging.versions.version import Version

_NOTHING: Final[Mapping[str, ChoiceSet]] = {}


class ResolutionProblem:
    """A resolution as the solver's `Problem`, with the candidates of the packages seen so far.

    Args:
        source: Where candidates are found.
        requires: What the user requires.
        interface: Version of each router interface; None when interfaces are not checked.
        locked: Versions to prefer.
        with_yanked: Names whose yanked versions may be chosen, to try whether that would help.
        with_remedies: Remedies of refusals that count as done, to try whether that would help.
    """

    def __init__(
        self,
        source: CandidateSource,
        requires: Sequence[Requirement],
        interface: Mapping[str, Version] | None,
        locked: Mapping[str, Version],
        *,
        with_yanked: Iterable[str] = (),
        with_remedies: Iterable[str] = (),
    ) -> None:
        self.source = source
        self.requires = list(requires)
        self.interface = interface
        self.locked = locked
        self._with_yanked = frozenset(with_yanked)
        self._with_remedies = frozenset(with_remedies)
        self._tables: dict[str, CandidateTable] = {}
        self._dependency_order = DependencyOrder(self._dependencies_of_best)

    def table(self, name: str) -> CandidateTable:
        """Return the candidates of a package or interface."""
        if name not in self._tables:
            self._tables[name] = self._fill_table(name)
        return self._tables[name]

    def roots(self) -> list[tuple[str, ChoiceSet]]:
        """Return what the user requires, interfaces first, and a package before its extras."""
        interfaces = [(f"{INTERFACE_PREFIX}{name}", ANY) for name in sorted(self.interface or ())]
        wanted = [
            (name, requirement.constraint)
            for requirement in self.requires
            for name in (requirement.name, *_names_with_extras(requirement))
        ]
        return [(name, self.table(name).within(range_)) for name, range_ in interfaces + wanted]

    def best(self, name: str, allowed: ChoiceSet) -> int | None:
        """Return the locked candidate, or the newest that fits the interface, or the newest."""
        table = self.table(name)
        for preferred in (table.locked, table.fitting, table.selectable):
            found = allowed.bits & preferred
            if found:
                return found.bit_length() - 1
        return None

    def needs(self, name: str, choice: int) -> Mapping[str, ChoiceSet]:
        """Return what a candidate needs, its router interface included."""
        table = self.table(name)
        if choice not in table.needs:
            found = {
                other: self.table(other).within(range_)
                for other, range_ in self.requirements(table.candidates[choice])
            }
            package, extra = split_extra(name)
            if extra is not None:
                found = {package: ChoiceSet.singleton(choice), **found}
            for like in table.alike(choice):
                table.needs[like] = found
        return table.needs[choice]

    def conflicts(self, name: str, choice: int) -> Mapping[str, ChoiceSet]:
        """Return what a candidate conflicts with."""
        conflicts = self.table(name).candidates[choice].conflicts
        if not conflicts:
            return _NOTHING
        return {other: self.table(other).within(range_) for other, range_ in conflicts.items()}

    def alike(self, name: str, choice: int) -> ChoiceSet:
        """Return the candidates with the same needs and conflicts."""
        return self.table(name).alike(choice)

    def choices_among_known(self, name: str, allowed: ChoiceSet) -> Iterator[int]:
        """Yield the candidates that need and conflict with only packages already seen.

        So no registry is asked for a package that only an old release needs.
        """
        table = self.table(name)
        for choice in ChoiceSet(allowed.bits & table.selectable):
            candidate = table.candidates[choice]
            others = [other for other, _ in self.requirements(candidate)]
            if all(other in self._tables for other in (*others, *candidate.conflicts)):
                yield choice

    def decision_key(self, name: str, allowed: ChoiceSet) -> tuple[int, ...]:
        """Return a sort key that puts interfaces first, and a package after its dependents.

        By then all requirements on it are known, so it is not chosen too new and reverted, or
        worse, kept while one of its dependents is downgraded. Of packages that depend on each
        other, those nearer to the user come first.
        """
        choices = (allowed.bits & self.table(name).selectable).bit_count()
        chain = self._dependency_order.longest_chain(name)
        depth = self._depths.get(name, len(self._depths))
        return (not name.startswith(INTERFACE_PREFIX), choices > 1, -chain, depth, choices)

    def requirements(self, candidate: Candidate) -> list[tuple[str, Constraint]]:
        """Return what a candidate requires, its router interface first."""
        wanted = list(candidate.requires.items())
        if candidate.interface is not None and self.interface is not None:
            name, range_ = candidate.interface
            wanted.insert(0, (f"{INTERFACE_PREFIX}{name}", range_))
        return wanted

    def _fill_table(self, name: str) -> CandidateTable:
        if name.startswith(INTERFACE_PREFIX):
            version = (self.interface or {}).get(name.removeprefix(INTERFACE_PREFIX))
            table = CandidateTable([Candidate(version=version)] if version is not None else [])
            table.selectable = table.fitting = int(version is not None)
            return table
        package, extra = split_extra(name)
        if extra is not None:
            return self._fill_extra_table(package, extra)
        pinned = {r.constraint.pinned for r in self.requires if r.name == name}
        table = CandidateTable(self.source.candidates(name))
        for index, candidate in enumerate(table.candidates):
            is_locked = self.locked.get(name) == candidate.version
            allows_yanked = is_locked or candidate.version in pinned or name in self._with_yanked
            is_refused = candidate.refusal and candidate.remedy not in self._with_remedies
            if is_refused or (candidate.is_yanked and not allows_yanked):
                continue
            table.selectable |= 1 << index
            table.locked |= is_locked << index
            table.fitting |= self._fits_interface(candidate) << index
        return table

    def _fill_extra_table(self, package: str, extra: str) -> CandidateTable:
        """Number a package with an extra as the package alone; exclude versions that lack it."""
        alone = self.table(package)
        table = CandidateTable(
            _add_extra(package, candidate, extra) for candidate in alone.candidates
        )
        table.are_needs_unique = True
        has_extra = sum(1 << i for i, c in enumerate(table.candidates) if c.refusal is None)
        table.selectable = alone.selectable & has_extra
        table.fitting = alone.fitting & has_extra
        table.locked = alone.locked & has_extra
        return table

    def _fits_interface(self, candidate: Candidate) -> bool:
        if candidate.interface is None or self.interface is None:
            return True
        name, range_ = candidate.interface
        return name in self.interface and range_.contains(self.interface[name])

    @functools.cached_property
    def _depths(self) -> dict[str, int]:
        """Number of steps from the user's requirements to each package, by best candidates."""
        names = list(dict.fromkeys(name for name, _ in self.roots()))
        depths = dict.fromkeys(names, 0)
        for name in names:
            for other in self._dependencies_of_best(name):
                if other not in depths:
                    depths[other] = depths[name] + 1
                    names.append(other)
        return depths

    def _dependencies_of_best(self, name: str) -> Sequence[str]:
        """Return the packages that the best candidate depends on."""
        best = self.best(name, ChoiceSet.full())
        if best is None:
            return ()
        package, extra = split_extra(name)
        itself = () if extra is None else (package,)
        return (*itself, *self.table(name).candidates[best].requires)


class CandidateTable:
    """The candidates of one package, numbered by version, oldest first.

    Args:
        candidates: In any order.

    Attributes:
        candidates: Sorted by version.
        selectable: Bits of those that may be chosen.
        fitting: Bits of those that may be chosen and fit the router interface.
        locked: Bit of the one that is locked.
        needs: What choices need, by choice, as far as computed.
        are_needs_unique: Whether no two choices have the same needs, even if their candidates do.
    """

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self.candidates = sorted(candidates, key=lambda candidate: candidate.version)
        self.selectable = self.fitting = self.locked = 0
        self.needs: dict[int, Mapping[str, ChoiceSet]] = {}
        self.are_needs_unique = False
        self._order = [candidate.version.precedence for candidate in self.candidates]
        self._prereleases = [
            (index, candidate.version)
            for index, candidate in enumerate(self.candidates)
            if candidate.version.is_prerelease
        ]
        self._within: dict[Constraint, ChoiceSet] = {}
        self._alike: dict[int, ChoiceSet] = {}

    def within(self, range_: Constraint) -> ChoiceSet:
        """Return the candidates that a range contains.

        If it contains none, a bit beyond all candidates represents the range: a set that nothing
        can be chosen from, but that still distinguishes one range from another in a proof.
        """
        found = self._within.get(range_)
        if found is None:
            bits = self._bits_within(range_)
            found = ChoiceSet(bits or 1 << (len(self.candidates) + len(self._within)))
            self._within[range_] = found
        return found

    def alike(self, choice: int) -> ChoiceSet:
        """Return the candidates with the same needs and conflicts."""
        if self.are_needs_unique:
            return ChoiceSet.singleton(choice)
        if not self._alike:
            groups: dict[object, int] = {}
            keys = [_needs_key(candidate) for candidate in self.candidates]
            for index, key in enumerate(keys):
                groups[key] = groups.get(key, 0) | 1 << index
            self._alike = {index: ChoiceSet(groups[key]) for index, key in enumerate(keys)}
        return self._alike[choice]

    def ranges_of(self, choices: ChoiceSet) -> list[Constraint]:
        """Return the ranges seen so far that contain exactly these choices."""
        return [range_ for range_, contained in self._within.items() if contained == choices]

    def versions(self, choices: ChoiceSet) -> list[Version]:
        """Return the versions of choices, oldest first."""
        return [c.version for i, c in enumerate(self.candidates) if i in choices]

    def _bits_within(self, range_: Constraint) -> int:
        """Intersect the comparators' intervals, then apply the prerelease rule."""
        bits = (1 << len(self.candidates)) - 1
        for comparator in range_.comparators:
            lower, upper = comparator.bounds
            start = bisect.bisect_left(self._order, lower)
            stop = bisect.bisect_left(self._order, upper)
            interval = (1 << max(stop, start)) - (1 << start)
            bits &= ~interval if comparator.op == "!=" else interval
        for index, version in self._prereleases:
            if bits >> index & 1 and not range_.contains(version):
                bits &= ~(1 << index)
        return bits


def _names_with_extras(requirement: Requirement) -> list[str]:
    return [join_extra(requirement.name, extra) for extra in requirement.extras]


def _add_extra(package: str, candidate: Candidate, extra: str) -> Candidate:
    """Return what an extra adds to a candidate; with a refusal if it has no such extra."""
    requires = dict(candidate.extras.get(extra, {}))
    own = requires.pop(package, None)  # the same version is needed in any case
    refusal = None
    if extra not in candidate.extras:
        refusal = f"has no extra {extra!r}"
    elif own is not None and not own.contains(candidate.version):
        refusal = f"has an extra {extra!r} that needs {package} {own}"
    return Candidate(
        version=candidate.version,
        requires=requires,
        is_yanked=candidate.is_yanked,
        refusal=refusal,
    )


def _needs_key(candidate: Candidate) -> object:
    return (
        tuple(sorted((name, str(range_)) for name, range_ in candidate.requires.items())),
        tuple(sorted((name, str(range_)) for name, range_ in candidate.conflicts.items())),
        candidate.interface,
    )
