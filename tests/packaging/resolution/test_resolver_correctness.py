"""The command that checks the resolver can itself see what is wrong."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from composable.packaging import Universe, Version
from composable.packaging.resolution import resolver, suggestions
from composable.packaging.resolution.pubgrub import PubGrub
from composable.packaging.resolution.solver import ChoiceSet, Fact, Proof

PATH = Path(__file__).parents[3] / "benchmarks" / "resolver_correctness.py"
DATA: dict[str, Any] = {
    "interface": {"tiny": "1.0.0"},
    "packages": {
        "a": {"1.0.0": {}, "2.0.0": {"requires": {"b": "^2"}}},
        "b": {"1.0.0": {"yanked": True}, "2.0.0": {"interface": "^1"}},
    },
}


OLD = {"a": "1.0.0", "b": "2.0.0"}


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resolver_correctness", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def mistakes(command: ModuleType, **more: Any) -> list[str]:
    universe = Universe.from_dict({**DATA, **more})
    return list(command.check_universe(universe, Counter().update))


def test_nothing_is_wrong(command: ModuleType) -> None:
    assert mistakes(command, requires={"a": "*"}, locked={"b": "2.0.0"}) == []
    assert mistakes(command, requires={"a": "^2", "b": "^1"}) == []


def test_a_choice_that_is_too_old(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def oldest(self: Any, name: str, allowed: ChoiceSet) -> int | None:
        return next(iter(ChoiceSet(allowed.bits & self.table(name).selectable)), None)

    universe = Universe.from_dict({**DATA, "requires": {"a": "*", "b": "^2"}})
    chosen = {name: command.find(universe, name, Version(v)) for name, v in OLD.items()}
    assert [name for name, _ in command.find_improvements(universe, chosen)] == ["a"]
    monkeypatch.setattr(resolver.ResolutionProblem, "best", oldest)
    assert any("could be 2.0.0" in m for m in mistakes(command, requires={"a": "*", "b": "^2"}))


def test_a_solution_that_is_not_found(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver.ResolutionProblem, "best", lambda *_: None)
    assert "has a solution, but none was found" in mistakes(command, requires={"a": "*"})


def test_a_suggestion_that_does_not_help(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suggestions, "find_suggestions", lambda *_: ["leave out b"])
    found = mistakes(command, requires={"a": "=3.0.0", "b": "*"})
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
def test_a_claim_that_is_false(command: ModuleType, fact: Fact) -> None:
    assert not command.is_true(Universe.from_dict({**DATA, "requires": {"a": "*"}}), fact)


def test_a_proof_that_leaves_something_out(command: ModuleType) -> None:
    universe = Universe.from_dict({**DATA, "requires": {"a": "^2", "b": "^1"}})
    problem = resolver.ResolutionProblem(
        universe, universe.requires, universe.interface, universe.locked
    )
    proof = PubGrub().solve(problem)
    assert isinstance(proof, Proof)
    assert not command.any_solution(proof.facts)
    for index in range(len(proof.facts)):
        assert command.any_solution([*proof.facts[:index], *proof.facts[index + 1 :]])
