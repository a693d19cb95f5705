"""Random small universes, and what is right for them: by exhaustive search, and by resolvelib."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import resolvelib

from composable.packaging import Constraint, Requirement, Universe
from composable.packaging.resolution.universe import Candidate

RANGES = ["*", "*", ">=1", "<3", "^1", "^2", "<2", ">=2", "=1.0.0", "!=1.0.0", ">=1.1.0-rc.1"]
VERSIONS = ["0.9.0", "1.0.0", "1.1.0-rc.1", "1.1.0", "2.0.0", "3.0.0"]
NAMES = ["apple", "brick", "cloud", "dune", "ember"]
EXTRAS = ["code", "news"]


def make_universe(seed: int) -> Universe:
    """Return a random small problem with yanks, conflicts, extras, a lock and more."""
    rng = random.Random(seed)
    names = NAMES[: rng.randint(2, 5)]
    density = rng.choice([0.1, 0.25, 0.4])

    def some_ranges(among: Sequence[str], odds: float) -> dict[str, str]:
        return {name: rng.choice(RANGES) for name in among if rng.random() < odds}

    packages: dict[str, Any] = {}
    for name in names:
        others = [other for other in names if other != name] + ["ghost"] * (rng.random() < 0.05)
        packages[name] = {
            version: {
                "requires": some_ranges(others, density),
                "conflicts": some_ranges(others, 0.05),
                "extras": {
                    extra: some_ranges([*others, name], density / 2)
                    for extra in EXTRAS
                    if rng.random() < 0.75
                },
                "yanked": rng.random() < 0.1,
                **(
                    {"interface": rng.choice(["^1", "^1", "*", ">=1.5"])}
                    if rng.random() < 0.4
                    else {}
                ),
            }
            for version in rng.sample(VERSIONS, rng.randint(2, 4))
        }
    wanted = {
        f"{name}{rng.choice(['', '', '', '', '[code]', '[code,news]'])}": rng.choice(RANGES)
        for name in rng.sample(names, rng.randint(1, min(3, len(names))))
    }
    locked = {name: rng.choice(list(packages[name])) for name in names if rng.random() < 0.3}
    return Universe.from_dict(
        {
            "interface": {"tiny-bytes": rng.choice(["1.0.0", "1.6.0", "1.6.0", "2.0.0"])},
            "packages": packages,
            "requires": wanted,
            "locked": locked,
        }
    )


def may_be_chosen(universe: Universe, name: str, candidate: Candidate) -> bool:
    """State the policy on one candidate, independently of the resolver."""
    assert universe.interface is not None
    if candidate.interface is not None:
        interface, range_ = candidate.interface
        if not range_.contains(universe.interface[interface]):
            return False
    pins = [r.constraint.pinned for r in universe.requires if r.name == name]
    is_locked = universe.locked.get(name) == candidate.version
    return not candidate.is_yanked or is_locked or candidate.version in pins


def requirements_of(
    universe: Universe, name: str, candidate: Candidate
) -> list[tuple[str, Constraint]]:
    """Return what a candidate needs, and what the extras that the user wants of it need."""
    extras = {extra for r in universe.requires if r.name == name for extra in r.extras}
    added = [item for extra in extras for item in candidate.extras.get(extra, {}).items()]
    return [*candidate.requires.items(), *added]


def is_valid(universe: Universe, chosen: Mapping[str, Candidate]) -> bool:
    """Say whether a choice meets every rule."""
    wanted = [(r.name, r.constraint) for r in universe.requires]
    for name, candidate in chosen.items():
        wanted += requirements_of(universe, name, candidate)
    if any(n not in chosen or not range_.contains(chosen[n].version) for n, range_ in wanted):
        return False
    if any(not chosen[r.name].extras.keys() >= set(r.extras) for r in universe.requires):
        return False
    if not all(may_be_chosen(universe, name, candidate) for name, candidate in chosen.items()):
        return False
    return not any(
        other in chosen and range_.contains(chosen[other].version)
        for candidate in chosen.values()
        for other, range_ in candidate.conflicts.items()
    )


def all_choices(universe: Universe) -> Iterator[dict[str, Candidate]]:
    """Yield every way to choose at most one version of every package."""
    names = list(universe.packages)
    for versions in itertools.product(*([None, *universe.packages[name]] for name in names)):
        yield {name: c for name, c in zip(names, versions, strict=True) if c is not None}


def reachable(universe: Universe, chosen: Mapping[str, Candidate]) -> set[str]:
    """Return the packages that the requirements lead to."""
    found, open_names = set[str](), [r.name for r in universe.requires]
    while open_names:
        name = open_names.pop()
        if name not in found:
            found.add(name)
            open_names += [n for n, _ in requirements_of(universe, name, chosen[name])]
    return found


class Oracle(resolvelib.AbstractProvider[Requirement, tuple[str, Candidate], str]):
    """The same policy in the words of resolvelib; conflicts are out of its reach.

    A requirement with extras is a name of its own, as pip has it, and needs the package alone too.
    """

    def __init__(self, universe: Universe) -> None:
        self.universe = universe

    def identify(self, requirement_or_candidate: Any) -> str:
        if isinstance(requirement_or_candidate, Requirement):
            return requirement_or_candidate.target
        return str(requirement_or_candidate[0])

    def get_preference(self, identifier: str, *_: Any, **__: Any) -> str:
        return identifier

    def find_matches(self, identifier: str, requirements: Any, incompatibilities: Any) -> Any:
        wanted = Requirement.parse(identifier)
        ranges = [r.constraint for r in requirements[identifier]]
        refused = [candidate.version for _, candidate in incompatibilities[identifier]]
        return [
            (identifier, candidate)
            for candidate in sorted(
                self.universe.candidates(wanted.name), key=lambda c: c.version, reverse=True
            )
            if all(range_.contains(candidate.version) for range_ in ranges)
            and candidate.version not in refused
            and candidate.extras.keys() >= set(wanted.extras)
            and may_be_chosen(self.universe, wanted.name, candidate)
        ]

    def is_satisfied_by(self, requirement: Requirement, candidate: tuple[str, Candidate]) -> bool:
        return requirement.constraint.contains(candidate[1].version)

    def get_dependencies(self, candidate: tuple[str, Candidate]) -> list[Requirement]:
        wanted, needs = Requirement.parse(candidate[0]), candidate[1].requires.items()
        if wanted.extras:
            alone = Requirement(wanted.name, Constraint.exactly(candidate[1].version))
            added = [n for extra in wanted.extras for n in candidate[1].extras[extra].items()]
            return [alone, *(Requirement(name, range_) for name, range_ in added)]
        return [Requirement(name, range_) for name, range_ in needs]


def without_conflicts(universe: Universe) -> Universe:
    packages = {
        name: [dataclasses.replace(candidate, conflicts={}) for candidate in candidates]
        for name, candidates in universe.packages.items()
    }
    return dataclasses.replace(universe, packages=packages)
