"""The order of decisions, and what is asked of a registry on the way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composable.packaging import Universe, resolve
from composable.packaging.resolution import pubgrub
from composable.packaging.resolution.dependency_order import DependencyOrder
from composable.packaging.resolution.resolver import resolve_from
from composable.packaging.resolution.universe import Candidate

N_NODES = 8
nodes = st.integers(0, N_NODES - 1)
graphs = st.lists(st.tuples(nodes, nodes), max_size=20)


def reach(edges: list[tuple[int, int]], start: int) -> set[int]:
    """Return what can be reached in one step or more."""
    found: set[int] = set()
    pending = [start]
    while pending:
        top = pending.pop()
        new = {b for a, b in edges if a == top} - found
        found |= new
        pending += new
    return found


@given(graphs, st.permutations(range(N_NODES)))
def test_chains_grow_except_along_cycles(edges: list[tuple[int, int]], asked: list[int]) -> None:
    order = DependencyOrder(lambda name: [str(b) for a, b in edges if a == int(name)])
    measured = {node: order.longest_chain(str(node)) for node in asked}
    for node in range(N_NODES):
        below = reach(edges, node)
        floor = [measured[b] for b in below if node not in reach(edges, b)]
        assert measured[node] == 1 + max(floor, default=-1)


def make_tangle(n_packages: int, seed: int) -> dict[str, Any]:
    """Return a universe of packages in cycles, with a solution: everything at 1.0.0."""
    rng = random.Random(seed)
    names = [f"p{i}" for i in range(n_packages)]
    packages: dict[str, Any] = {name: {"1.0.0": {}} for name in names}
    for name in names:
        others = rng.sample(names, 3)
        for minor in range(1, 8):
            ranges = [f">=1.{max(0, minor - rng.randint(0, 3))}, <1.{minor + 3}" for _ in others]
            requires = {o: r for o, r in zip(others, ranges, strict=True) if o != name}
            packages[name][f"1.{minor}.0"] = {"requires": requires}
    return {"packages": packages, "requires": {name: "*" for name in names[:4]}}


def test_the_same_answer_whatever_the_hash_seed(tmp_path: Path) -> None:
    path = tmp_path / "tangle.json"
    path.write_text(json.dumps(make_tangle(60, seed=3)))
    code = "from composable.cli.main import run; run()"
    command = [sys.executable, "-c", code, "resolve", "--universe", str(path)]
    answers = {
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            check=True,
            capture_output=True,
        ).stdout
        for seed in range(3)
    }
    assert len(answers) == 1


@pytest.mark.parametrize("look_ahead_after", [0, pubgrub.LOOK_AHEAD_AFTER])
def test_only_what_may_be_chosen_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, look_ahead_after: int
) -> None:
    """What only old releases want is never fetched, also when the solver looks ahead."""
    monkeypatch.setattr(pubgrub, "LOOK_AHEAD_AFTER", look_ahead_after)
    data = {
        "packages": {
            "a": {"1.0.0": {"requires": {"relic": "*"}}, "2.0.0": {"requires": {"b": "*"}}},
            "b": {"1.0.0": {"conflicts": {"fossil": "*"}}, "2.0.0": {}},
            "relic": {"1.0.0": {}},
            "fossil": {"1.0.0": {}},
        },
        "requires": {"a": "*"},
    }
    universe = Universe.from_dict(data)

    class Spy:
        def __init__(self) -> None:
            self.asked: set[str] = set()

        def candidates(self, name: str) -> Sequence[Candidate]:
            self.asked.add(name)
            return universe.candidates(name)

        def names(self) -> Sequence[str]:
            return universe.names()

    spy = Spy()
    assert resolve_from(spy, universe.requires) == resolve(universe)
    assert spy.asked == {"a", "b"}


def test_looking_ahead_changes_the_way_and_not_whether(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        universe = Universe.from_dict(make_tangle(40, seed))
        for look_ahead_after in (0, 10**9):
            monkeypatch.setattr(pubgrub, "LOOK_AHEAD_AFTER", look_ahead_after)
            packages = resolve(universe).packages
            for name, version in packages.items():
                chosen = next(c for c in universe.candidates(name) if c.version == version)
                assert all(r.contains(packages[other]) for other, r in chosen.requires.items())
