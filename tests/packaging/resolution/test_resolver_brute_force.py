"""PubGrub against exhaustive search on thousands of small worlds, and against resolvelib."""

from __future__ import annotations

import pytest
import resolvelib

from composable.errors import ResolutionError
from composable.packaging import Constraint, Requirement, Universe, Version, resolve
from composable.packaging.resolution import pubgrub
from composable.packaging.resolution.universe import Candidate
from tests.support.resolution.brute_force import (
    Oracle,
    all_choices,
    is_valid,
    make_universe,
    reachable,
    without_conflicts,
)

pytestmark = pytest.mark.slow

N_UNIVERSES = 3000


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
