"""The checks of the resolver can themselves see what is wrong."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from composable.packaging import Universe, Version
from composable.packaging.resolution import resolver, suggestions
from composable.packaging.resolution.pubgrub import PubGrub
from composable.packaging.resolution.solver import ChoiceSet, Fact, Proof
from tests.support.resolution import checks

DATA: dict[str, Any] = {
    "interface": {"tiny": "1.0.0"},
    "packages": {
        "a": {"1.0.0": {}, "2.0.0": {"requires": {"b": "^2"}}},
        "b": {"1.0.0": {"yanked": True}, "2.0.0": {"interface": "^1"}},
    },
}


OLD = {"a": "1.0.0", "b": "2.0.0"}


def mistakes(**more: Any) -> list[str]:
    universe = Universe.from_dict({**DATA, **more})
    return list(checks.check_universe(universe, Counter().update))


def test_nothing_is_wrong() -> None:
    assert mistakes(requires={"a": "*"}, locked={"b": "2.0.0"}) == []
    assert mistakes(requires={"a": "^2", "b": "^1"}) == []


def test_a_choice_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def oldest(self: Any, name: str, allowed: ChoiceSet) -> int | None:
        return next(iter(ChoiceSet(allowed.bits & self.table(name).selectable)), None)

    universe = Universe.from_dict({**DATA, "requires": {"a": "*", "b": "^2"}})
    chosen = {name: checks.find(universe, name, Version(v)) for name, v in OLD.items()}
    assert [name for name, _ in checks.find_improvements(universe, chosen)] == ["a"]
    monkeypatch.setattr(resolver.ResolutionProblem, "best", oldest)
    assert any("could be 2.0.0" in m for m in mistakes(requires={"a": "*", "b": "^2"}))


def test_a_solution_that_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver.ResolutionProblem, "best", lambda *_: None)
    assert "has a solution, but none was found" in mistakes(requires={"a": "*"})


def test_a_suggestion_that_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        suggestions, "find_suggestions", lambda *_: [suggestions.Suggestion("leave out b")]
    )
    found = mistakes(requires={"a": "=3.0.0", "b": "*"})
    assert found == ["'leave out b' does not help"]


@pytest.mark.parametrize(
    "fact",
    [
        Fact(kind="root", name="a", choices=ChoiceSet(0b01)),
        Fact(kind="none", name="a", choices=ChoiceSet(0b01)),
        Fact(kind="none", name="b", choices=ChoiceSet(0b11)),
        Fact(
            kind="need", name="a", choices=ChoiceSet(0b11), other="b", allowed=ChoiceSet(0b10)
        ),
        Fact(
            kind="need", name="a", choices=ChoiceSet(0b10), other="b", allowed=ChoiceSet(0b11)
        ),
        Fact(
            kind="conflict", name="a", choices=ChoiceSet(0b10), other="b", allowed=ChoiceSet(0b10)
        ),
    ],
)  # fmt: skip
def test_a_claim_that_is_false(fact: Fact) -> None:
    assert not checks.is_true(Universe.from_dict({**DATA, "requires": {"a": "*"}}), fact)


def test_a_proof_that_leaves_something_out() -> None:
    universe = Universe.from_dict({**DATA, "requires": {"a": "^2", "b": "^1"}})
    problem = resolver.ResolutionProblem(
        universe, universe.requires, universe.interface, universe.locked
    )
    proof = PubGrub().solve(problem)
    assert isinstance(proof, Proof)
    assert not checks.any_solution(proof.facts)
    for index in range(len(proof.facts)):
        assert checks.any_solution([*proof.facts[:index], *proof.facts[index + 1 :]])
