"""The story of a failed resolution: what was asked, what stands in the way, what would help.

A proof of the solver is a list of facts about sets of choices. Here they become sentences about
versions and ranges as the user and the authors wrote them. Every cure that is offered was tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from composable.packaging.constraint import (
    ANY,
    Constraint,
    Requirement,
    have_common_version,
    split_extra,
)
from composable.packaging.names import did_you_mean
from composable.packaging.resolver import World
from composable.packaging.solver import ChoiceSet, Fact, Proof, Solver
from composable.packaging.universe import INTERFACE_PREFIX, Candidate

MAX_CURES: Final = 4
MAX_SUSPECTS: Final = 8
_ORDER: Final = {"root": 0, "need": 1, "conflict": 2, "none": 3}
_Ranges = Callable[[Candidate], Mapping[str, Constraint]]


def explain_failure(world: World, proof: Proof, solver: Solver) -> str:
    """Return why a problem has no solution and what would make it solvable.

    Args:
        world: The problem.
        proof: What the solver found.
        solver: Tries out the cures.
    """
    sentences: dict[str, None] = {}
    for fact in sorted(_join(proof.facts), key=lambda fact: _reading_order(world, fact)):
        sentences |= dict.fromkeys(_tell(world, fact))
    cures = _Cures(world, proof, solver).find()
    story = "".join(f"\n  {sentence}" for sentence in sentences)
    if not cures:
        return f"what you ask for cannot be installed together:\n{story}"
    one = "Any one of these would make it solvable" if len(cures) > 1 else "This would solve it"
    advice = "".join(f"\n  - {cure}" for cure in cures)
    return f"what you ask for cannot be installed together:\n{story}\n\n{one}:\n{advice}"


def _join(facts: Iterable[Fact]) -> list[Fact]:
    """Make one fact of those that say the same of different versions."""
    joined: dict[object, Fact] = {}
    for fact in facts:
        is_joinable = fact.kind in ("need", "conflict")
        key = (fact.kind, fact.name, fact.other, fact.allowed) if is_joinable else fact
        before = joined.get(key)
        choices = fact.choices | before.choices if before is not None else fact.choices
        joined[key] = dataclasses.replace(fact, choices=choices)
    return list(joined.values())


def _reading_order(world: World, fact: Fact) -> tuple[int, int]:
    """Put what the user asks for first, as the user ordered it; then needs; then dead ends."""
    names = [requirement.name for requirement in world.requires]
    package, _ = split_extra(fact.name)
    asked = names.index(package) if package in names else len(names)
    return (_ORDER[fact.kind], asked if fact.kind == "root" else 0)


def _tell(world: World, fact: Fact) -> Iterator[str]:
    """Yield the sentences for one fact."""
    if fact.kind == "root":
        yield from _tell_root(world, fact)
    elif fact.kind == "none":
        yield from _tell_none(world, fact)
    elif fact.kind == "conflict":
        ranges = _ranges(world, fact, lambda candidate: candidate.conflicts)
        yield f"{_subject(world, fact, 'cannot')} be installed with {fact.other}{ranges}."
    elif fact.other.startswith(INTERFACE_PREFIX):
        ranges = _ranges(world, fact, lambda c: {fact.other: c.interface[1]} if c.interface else {})
        name = fact.other.removeprefix(INTERFACE_PREFIX)
        yield f"{_subject(world, fact, 'plugs', 'plug')} into router interface {name}{ranges}."
    elif fact.other != split_extra(fact.name)[0]:  # that an extra comes with its package is plain
        ranges = _ranges(world, fact, lambda candidate: candidate.requires)
        yield f"{_subject(world, fact, 'needs', 'need')} {fact.other}{ranges}."


def _tell_root(world: World, fact: Fact) -> Iterator[str]:
    if fact.name.startswith(INTERFACE_PREFIX):
        name = fact.name.removeprefix(INTERFACE_PREFIX)
        yield f"Your backbone's router interface is {name} {(world.interface or {})[name]}."
    for requirement in _requirements_behind(world, fact):
        yield f"You ask for {requirement}."


def _requirements_behind(world: World, fact: Fact) -> list[Requirement]:
    """Return the user's requirements that a root fact stands for."""
    shelf = world.shelf(fact.name)
    package, extra = split_extra(fact.name)
    return [
        requirement
        for requirement in world.requires
        if requirement.name == package and (extra is None or extra in requirement.extras)
        if shelf.within(requirement.constraint) == fact.choices
    ]


def _tell_none(world: World, fact: Fact) -> Iterator[str]:
    """Say why nothing can be chosen: nothing is there, or all that is there is barred."""
    if fact.name.startswith(INTERFACE_PREFIX):
        return  # the facts beside it say which range is needed and which version there is
    package, extra = split_extra(fact.name)
    shelf = world.shelf(package)
    if not shelf.candidates:
        hint = did_you_mean(package, world.source.names())
        yield f"There is no expert {package!r}{f' ({hint})' if hint else ''}."
        return
    ranges = [str(r) for r in world.shelf(fact.name).ranges_of(fact.choices) if r != ANY]
    asked = f" in {' or '.join(ranges)}" if ranges else ""
    barred = [index for index in range(len(shelf.candidates)) if index in fact.choices]
    for index in reversed(barred):
        if index not in ChoiceSet(shelf.selectable):
            yield f"{package} {shelf.candidates[index].version} {_bar(shelf.candidates[index])}."
    if extra is not None:
        yield from _tell_no_extra(world, fact, package, extra, asked)
    if not barred:
        there = _list([str(candidate.version) for candidate in shelf.candidates])
        if all(candidate.version.is_prerelease for candidate in shelf.candidates):
            yield f"Of {package} there are only prereleases, {there}, and no range names one."
            return
        yield f"There is no {package}{asked}, only {there}."


def _tell_no_extra(world: World, fact: Fact, package: str, extra: str, asked: str) -> Iterator[str]:
    """Say which releases lack an extra, and which have it."""
    shelf = world.shelf(fact.name)
    open_to_choice = ChoiceSet(world.shelf(package).selectable)
    without: list[str] = []
    for index, candidate in enumerate(shelf.candidates):
        if index in fact.choices & open_to_choice and candidate.refusal is not None:
            if extra in world.shelf(package).candidates[index].extras:
                yield f"{package} {candidate.version} {candidate.refusal}."
            else:
                without.append(str(candidate.version))
    if not without:
        return
    known = {name for candidate in world.shelf(package).candidates for name in candidate.extras}
    if extra not in known:
        hint = did_you_mean(extra, known)
        if hint is None:
            hint = f"it has {_list(sorted(known))}" if known else "it has none at all"
        yield f"No release of {package} has an extra {extra!r} ({hint})."
    elif asked and len(without) > 1:
        yield f"No release of {package}{asked} has an extra {extra!r}."
    else:
        verb = "has" if len(without) == 1 else "have"
        yield f"{package} {_list(without)} {verb} no extra {extra!r}."


def _bar(candidate: Candidate) -> str:
    """Say why a candidate may not be chosen."""
    return candidate.refusal or "was yanked, and is neither locked nor pinned exactly"


def _subject(world: World, fact: Fact, verb: str, plural: str | None = None) -> str:
    """Name the versions that a fact is about and that could be chosen, and join the verb."""
    shelf = world.shelf(fact.name)
    package, extra = split_extra(fact.name)
    suffix = "" if extra is None else f" with extra {extra}"
    open_to_choice = ChoiceSet(shelf.selectable)
    versions = shelf.versions(fact.choices & open_to_choice) or shelf.versions(fact.choices)
    available = shelf.versions(open_to_choice)
    if len(versions) == 1:
        return f"{package} {versions[0]}{suffix} {verb}"
    if versions == available:
        return f"Every version of {package}{suffix} {verb}"
    start = available.index(versions[0]) if versions[0] in available else 0
    if len(versions) > 2 and versions == available[start : start + len(versions)]:
        return f"{package} {versions[0]} to {versions[-1]}{suffix} {plural or verb}"
    return f"{package} {_list([str(version) for version in versions])}{suffix} {plural or verb}"


def _ranges(world: World, fact: Fact, ranges_of: _Ranges) -> str:
    """Return the ranges on the other package as the authors wrote them."""
    shelf, other = world.shelf(fact.name), world.shelf(fact.other)
    written = {
        str(range_): None
        for index, candidate in enumerate(shelf.candidates)
        if index in fact.choices and (range_ := ranges_of(candidate).get(fact.other)) is not None
        if other.within(range_) == fact.allowed
    }
    return f" {' or '.join(written)}" if written and list(written) != [str(ANY)] else ""


def _list(items: Sequence[str]) -> str:
    """Join in words, leaving out the middle of a long list."""
    if len(items) > 6:
        return f"{', '.join(items[:2])}, … and {items[-1]} ({len(items)} in all)"
    return ", ".join(items[:-1]) + (" and " if len(items) > 1 else "") + items[-1]


class _Cures:
    """Changes that would make a problem solvable, each tried before it is offered."""

    def __init__(self, world: World, proof: Proof, solver: Solver) -> None:
        self._world = world
        self._proof = proof
        self._solver = solver
        blamed = [
            r for f in proof.facts if f.kind == "root" for r in _requirements_behind(world, f)
        ]
        self._blamed = list(dict.fromkeys(blamed))[:MAX_SUSPECTS]

    def find(self) -> list[str]:
        """Return the cures that work, the least invasive first."""
        cures = [
            *(cure for r in self._blamed if (cure := self._try_relaxing(r))),
            *(cure for r in self._blamed for cure in self._try_without_extras(r)),
            *self._try_another_interface(),
            *self._try_yanked(),
        ]
        if not cures:
            cures = [*self._try_prereleases(), *self._try_leaving_out()]
        return cures[:MAX_CURES]

    def _solve(
        self,
        requires: Iterable[Requirement],
        *,
        with_yanked: Iterable[str] = (),
        is_interface_checked: bool = True,
    ) -> dict[str, Candidate] | None:
        world = World(
            self._world.source,
            list(requires),
            self._world.interface if is_interface_checked else None,
            self._world.locked,
            with_yanked=with_yanked,
        )
        answer = self._solver.solve(world)
        if isinstance(answer, Proof):
            return None
        return {name: world.shelf(name).candidates[choice] for name, choice in answer.items()}

    def _with(self, old: Requirement, *new: Requirement) -> list[Requirement]:
        return [r for each in self._world.requires for r in (new if each == old else (each,))]

    def _try_relaxing(self, requirement: Requirement) -> str | None:
        if requirement.constraint == ANY:
            return None
        free = dataclasses.replace(requirement, constraint=ANY)
        answer = self._solve(self._with(requirement, free))
        if answer is None:
            return None
        version = answer[requirement.name].version
        if requirement.constraint.contains(version):
            # Only an exact pin does more than hold versions: it lets a yanked one in.
            return None
        return f"ask for {requirement.target} {version} instead of {requirement.constraint}"

    def _try_without_extras(self, requirement: Requirement) -> Iterator[str]:
        blamed = [
            extra
            for fact in self._proof.facts
            for package, extra in [split_extra(fact.name)]
            if package == requirement.name and extra in requirement.extras
        ]
        for extra in dict.fromkeys(blamed):
            fewer = tuple(other for other in requirement.extras if other != extra)
            without = dataclasses.replace(requirement, extras=fewer)
            if self._solve(self._with(requirement, without)) is not None:
                yield f"ask for {without.target} without its extra {extra}"

    def _try_another_interface(self) -> Iterator[str]:
        interface = self._world.interface
        if not interface:
            return
        answer = self._solve(self._world.requires, is_interface_checked=False)
        needs: dict[str, dict[Constraint, str]] = {}
        for name, candidate in sorted((answer or {}).items()):
            if candidate.interface is not None:
                needed, range_ = candidate.interface
                needs.setdefault(needed, {}).setdefault(range_, f"{name} {candidate.version}")
        for needed, whose in sorted(needs.items()):
            if needed in interface and all(r.contains(interface[needed]) for r in whose):
                continue
            if len(needs) == 1 and have_common_version(whose):
                ranges = ", ".join(str(range_) for range_ in whose if range_ != ANY)
                who = _list(list(whose.values()))
                yield f"use a backbone whose router interface is {needed} {ranges}, for {who}"

    def _try_yanked(self) -> Iterator[str]:
        names = [
            split_extra(fact.name)[0]
            for fact in self._proof.facts
            if fact.kind == "none" and any(c.is_yanked for c in self._candidates(fact))
        ]
        answer = self._solve(self._world.requires, with_yanked=names) if names else None
        pins = [
            Requirement(name, Constraint.exactly(answer[name].version))
            for name in dict.fromkeys(names)
            if answer and name in answer and answer[name].is_yanked
        ]
        alone = [pin for pin in pins if self._solve([*self._world.requires, pin]) is not None]
        if alone:
            for pin in alone:
                yield f"ask for {_write_pin(pin)} exactly to accept what was yanked"
        elif pins and self._solve([*self._world.requires, *pins]) is not None:
            yield f"ask for {_list(list(map(_write_pin, pins)))} exactly to accept what was yanked"

    def _candidates(self, fact: Fact) -> list[Candidate]:
        shelf = self._world.shelf(fact.name)
        return [c for i, c in enumerate(shelf.candidates) if i in fact.choices]

    def _try_prereleases(self) -> Iterator[str]:
        for requirement in self._blamed:
            shelf = self._world.shelf(requirement.name)
            early = [c.version for c in shelf.candidates if c.version.is_prerelease]
            for version in reversed(early[-3:]):
                exact = dataclasses.replace(requirement, constraint=Constraint.exactly(version))
                if self._solve(self._with(requirement, exact)) is not None:
                    yield f"ask for the prerelease {requirement.target}=={version}"
                    break

    def _try_leaving_out(self) -> Iterator[str]:
        alone = [r for r in self._blamed if self._solve(self._with(r)) is not None]
        if alone:
            for requirement in alone:
                yield f"leave out {requirement.target}"
            return
        rest, dropped = list(self._world.requires), list[str]()
        for requirement in self._blamed:
            rest = [r for r in rest if r != requirement]
            dropped.append(requirement.target)
            if self._solve(rest) is not None:
                yield f"leave out {_list(list(dict.fromkeys(dropped)))}"
                return


def _write_pin(pin: Requirement) -> str:
    return f"{pin.target}=={pin.constraint.pinned}"
