"""Worlds with a known answer: our own in `tests/scenarios`, and packse's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from composable.errors import ManifestError, ResolutionError
from composable.packaging import Constraint, Universe, Version, resolve
from composable.packaging.resolution import pubgrub
from tests.support.resolution.scenarios import PACKSE, apply_suggestion, read_packse, suggestions_in

SCENARIOS = Path(__file__).parents[2] / "scenarios"


def answer(universe: Universe) -> str:
    """Return what a command would print: the packages as JSON, or the explanation."""
    try:
        packages = resolve(universe).packages
    except ResolutionError as error:
        return f"{error}\n"
    return json.dumps({"packages": {name: str(v) for name, v in packages.items()}}, indent=2) + "\n"


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.json")), ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    universe = Universe.from_dict(json.loads(path.read_text()), path.name)
    expected = (SCENARIOS / "expected" / f"{path.stem}.txt").read_text()
    assert answer(universe) == expected


def test_every_expectation_has_a_scenario() -> None:
    names = {path.stem for path in SCENARIOS.glob("*.json")}
    assert {path.stem for path in (SCENARIOS / "expected").iterdir()} == names
    assert len(names) >= 15


@pytest.mark.parametrize("look_ahead_after", [0, pubgrub.LOOK_AHEAD_AFTER])
@pytest.mark.parametrize("path", sorted(PACKSE.rglob("*.toml")), ids=lambda path: path.stem)
def test_packse(monkeypatch: pytest.MonkeyPatch, path: Path, look_ahead_after: int) -> None:
    monkeypatch.setattr(pubgrub, "LOOK_AHEAD_AFTER", look_ahead_after)
    expected, universe = read_packse(path)
    if not expected["satisfiable"]:
        with pytest.raises(ResolutionError):
            resolve(universe)
        return
    packages = {name: str(version) for name, version in resolve(universe).packages.items()}
    if "packages" in expected:
        assert packages == expected["packages"]


def test_packse_is_complete() -> None:
    assert len(list(PACKSE.rglob("*.toml"))) == 26


@pytest.mark.parametrize("look_ahead_after", [0, pubgrub.LOOK_AHEAD_AFTER])
def test_wrong_backtracking_indirect_is_right(
    monkeypatch: pytest.MonkeyPatch, look_ahead_after: int
) -> None:
    """What packse hopes for, but has commented out for the resolver it tests."""
    monkeypatch.setattr(pubgrub, "LOOK_AHEAD_AFTER", look_ahead_after)
    _, universe = read_packse(PACKSE / "backtracking" / "wrong-backtracking-indirect.toml")
    packages = {name: str(version) for name, version in resolve(universe).packages.items()}
    assert packages == {"a": "1.0.0", "b": "1.0.0", "b-inner": "2.0.9"}


@pytest.mark.parametrize("path", sorted(PACKSE.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_suggestion_works(path: Path) -> None:
    """Apply each suggestion in turn, and resolve."""
    expected, universe = read_packse(path)
    if expected["satisfiable"]:
        return
    with pytest.raises(ResolutionError) as caught:
        resolve(universe)
    suggestions = suggestions_in(str(caught.value))
    assert suggestions, caught.value
    for suggestion in suggestions:
        for changed in apply_suggestion(universe, suggestion):
            resolve(changed)


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.json")), ids=lambda path: path.stem)
def test_every_suggestion_of_our_own_scenarios_works(path: Path) -> None:
    universe = Universe.from_dict(json.loads(path.read_text()), path.name)
    for suggestion in suggestions_in(answer(universe)):
        for changed in apply_suggestion(universe, suggestion):
            resolve(changed)


A = "u: packages.a.1.0.0"


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ([], "u"),
        ({"packges": {}}, "u: packges"),
        ({"packages": {"a": {"1": {}}}}, "u: packages.a"),
        ({"packages": {"a": {"1.0.0": {"requires": {"b": "?"}}}}}, f"{A}.requires.b"),
        ({"packages": {"a": {"1.0.0": {"yanked": 1}}}}, f"{A}.yanked"),
        ({"packages": {"a": {"1.0.0": {"require": {}}}}}, f"{A}.require"),
        ({"packages": {"a": {"1.0.0": {"extras": {"x": {"b": "?"}}}}}}, f"{A}.extras.x.b"),
        ({"packages": {"a": {"1.0.0": {"extras": {"X": {}}}}}}, f'{A}.extras."X"'),
        ({"packages": {"a": {"1.0.0": {"extras": {"x": ["b"]}}}}}, f"{A}.extras.x"),
        ({"requires": {"a": 1}}, "u: requires.a"),
        ({"requires": {"a[x": "*"}}, 'u: requires."a[x"'),
        ({"requires": {"a[x]>1": "*"}}, 'u: requires."a[x]>1"'),
        ({"locked": {"a": "1"}}, "u: locked.a"),
        ({"interface": "1.0.0"}, "u: interface"),
    ],
)  # fmt: skip
def test_bad_universes_say_where(data: Any, where: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Universe.from_dict(data, "u")
    assert caught.value.where == where


def test_a_universe_without_an_interface_does_not_check_it() -> None:
    candidate = {"1.0.0": {"interface": "^9"}}
    data = {"packages": {"a": candidate}, "requires": {"a": "*"}}
    assert list(resolve(Universe.from_dict(data)).packages) == ["a"]
    with pytest.raises(ResolutionError, match="needs router interface"):
        resolve(Universe.from_dict({**data, "interface": {"tiny": "1.0.0"}}))


def test_who_wanted_what() -> None:
    data = {
        "packages": {"a": {"1.0.0": {"requires": {"b": "^1"}}}, "b": {"1.0.0": {}, "1.1.0": {}}},
        "requires": {"a": "*", "b": "<1.1"},
    }
    resolution = resolve(Universe.from_dict(data))
    assert resolution.wanted_by["b"] == [("", Constraint("<1.1")), ("a", Constraint("^1"))]


def test_who_wanted_what_with_extras() -> None:
    extras = {"x": {"c": "^1"}, "y": {}}
    data = {
        "packages": {"a": {"1.0.0": {"extras": extras}}, "b": {"1.0.0": {}}, "c": {"1.0.0": {}}},
        "requires": {"a[y,x]": "^1", "b": "*", "a": ">=1"},
    }
    resolution = resolve(Universe.from_dict(data))
    assert list(resolution.packages) == ["a", "b", "c"]
    assert resolution.wanted_by["a"] == [("", Constraint("^1")), ("", Constraint(">=1"))]
    assert resolution.wanted_by["c"] == [("a[x]", Constraint("^1"))]
    assert resolution.extras == {"a": ("x", "y")}


def test_an_extra_may_need_its_own_package() -> None:
    """In another version never, in this one always."""
    versions = {
        "1.0.0": {"extras": {"x": {"a": "^1"}}},
        "2.0.0": {"extras": {"x": {"a": "^1"}}},
    }
    data = {"packages": {"a": versions}, "requires": {"a[x]": "*"}}
    assert resolve(Universe.from_dict(data)).packages == {"a": Version("1.0.0")}
    with pytest.raises(ResolutionError, match=r"a 2\.0\.0 has an extra 'x' that needs a \^1\."):
        resolve(Universe.from_dict({**data, "requires": {"a[x]": "^2"}}))


def test_another_solver_can_stand_behind_the_port() -> None:
    """A solver is anything that answers a problem; here one that always takes the best."""

    class Greedy:
        def solve(self, problem: Any) -> dict[str, int]:
            chosen: dict[str, int] = {}
            wanted = list(problem.roots())
            while wanted:
                name, allowed = wanted.pop()
                if name not in chosen:
                    chosen[name] = problem.best(name, allowed)
                    wanted += problem.needs(name, chosen[name]).items()
            return chosen

    data = {"packages": {"a": {"1.0.0": {"requires": {"b": "*"}}}, "b": {"2.0.0": {}}}}
    universe = Universe.from_dict({**data, "requires": {"a": "^1"}})
    assert resolve(universe, solver=Greedy()) == resolve(universe)
