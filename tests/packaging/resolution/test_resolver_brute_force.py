"""PubGrub against exhaustive search on thousands of small worlds, and against resolvelib."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import resolvelib

from composable.errors import ResolutionError
from composable.packaging import Constraint, Requirement, Universe, Version, resolve
from composable.packaging.resolution import pubgrub
from composable.packaging.resolution.universe import Candidate

N_UNIVERSES = 3000
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


@pytest.mark.parametrize("block", range(10))
def test_agrees_with_exhaustive_search(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    if block % 2:  # small worlds seldom are hard enough for it
        monkeypatch.setattr(pubgrub, "LOOK_AHEAD_AFTER", 0)
    n_satisfiable = n_with_extras = 0
    per_block = N_UNIVERSES // 10
    for seed in range(block * per_block, (block + 1) * per_block):
        universe = make_universe(seed)
        exists = any(is_valid(universe, chosen) for chosen in all_choices(universe))
        n_satisfiable += exists
        try:
            packages = resolve(universe).packages
        except ResolutionError as error:
            assert not exists, f"universe {seed} has a solution, but:\n{error}"
            continue
        assert exists, f"universe {seed} has no solution, but got {packages}"
        chosen = {
            name: next(c for c in universe.packages[name] if c.version == version)
            for name, version in packages.items()
        }
        assert is_valid(universe, chosen), f"universe {seed}: {packages}"
        assert set(packages) == reachable(universe, chosen), f"universe {seed}: {packages}"
        n_with_extras += any(r.extras for r in universe.requires)
    assert per_block / 3 <= n_satisfiable < per_block
    assert n_with_extras > per_block / 20


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


def test_agrees_with_resolvelib() -> None:
    n_satisfiable = n_without_answer = 0
    for seed in range(10_000, 10_500):
        universe = without_conflicts(make_universe(seed))
        try:
            resolvelib.Resolver(Oracle(universe), resolvelib.BaseReporter()).resolve(
                list(universe.requires), max_rounds=10_000
            )
            exists = True
        except resolvelib.ResolutionImpossible:
            exists = False
        except RecursionError:  # resolvelib 1.2.1 walks round a cycle that backtracking cut off
            n_without_answer += 1
            continue
        n_satisfiable += exists
        try:
            resolve(universe)
            assert exists, f"universe {seed}"
        except ResolutionError as error:
            assert not exists, f"universe {seed}: {error}"
    assert n_satisfiable > 150
    assert n_without_answer < 5


def without_conflicts(universe: Universe) -> Universe:
    import dataclasses

    packages = {
        name: [dataclasses.replace(candidate, conflicts={}) for candidate in candidates]
        for name, candidates in universe.packages.items()
    }
    return dataclasses.replace(universe, packages=packages)


def test_a_policy_that_ignored_yanks_would_be_caught() -> None:
    """The checker itself can fail: a yanked candidate is not valid unless pinned or locked."""
    yanked = Candidate(version=Version("1.0.0"), is_yanked=True)
    universe = Universe(packages={"apple": [yanked]}, requires=[Requirement("apple")], interface={})
    assert not is_valid(universe, {"apple": yanked})
    pinned = Universe(
        packages={"apple": [yanked]},
        requires=[Requirement("apple", Constraint("=1.0.0"))],
        interface={},
    )
    assert is_valid(pinned, {"apple": yanked})


def test_an_extra_that_is_ignored_would_be_caught() -> None:
    code = Candidate(version=Version("1.0.0"), extras={"code": {"brick": Constraint("^1")}})
    brick = Candidate(version=Version("1.0.0"))
    wanted = [Requirement("apple", extras=("code",))]
    universe = Universe(packages={"apple": [code], "brick": [brick]}, requires=wanted, interface={})
    assert not is_valid(universe, {"apple": code})
    assert not is_valid(universe, {"apple": brick, "brick": brick})
    assert is_valid(universe, {"apple": code, "brick": brick})
