"""What must hold of every resolution: checks that know no more than ranges, versions and facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import resolvelib

from composable.errors import ResolutionError
from composable.packaging import Constraint, Universe, Version, resolve
from composable.packaging.resolution.problem import ResolutionProblem
from composable.packaging.resolution.pubgrub import PubGrub
from composable.packaging.resolution.solver import ChoiceSet, Fact, Proof
from composable.packaging.resolution.universe import INTERFACE_PREFIX, Candidate
from composable.packaging.versions.constraint import split_extra
from tests.support.resolution import brute_force, scenarios

MAX_PEER_ROUNDS = 10_000
Chosen = Mapping[str, Candidate]


def check_universe(universe: Universe, count: Callable[[str], None]) -> Iterator[str]:
    """Yield what is wrong with how a universe is resolved; count what was seen."""
    solutions = [c for c in brute_force.all_choices(universe) if brute_force.is_valid(universe, c)]
    count("satisfiable" if solutions else "unsatisfiable")
    yield from check_with_resolvelib(universe, count)
    try:
        packages = resolve(universe).packages
    except ResolutionError as error:
        if solutions:
            yield "has a solution, but none was found"
        else:
            yield from check_story(universe, str(error), count)
            yield from check_proof(universe, count)
        return
    if not solutions:
        yield "has no solution, but one was found"
        return
    chosen = {name: find(universe, name, version) for name, version in packages.items()}
    if chosen not in solutions:
        yield f"the answer breaks a rule: {show(chosen)}"
        return
    if set(chosen) != brute_force.reachable(universe, chosen):
        yield f"the answer holds what nobody wants: {show(chosen)}"
    if resolve(dataclasses.replace(universe, locked=packages)).packages != packages:
        yield f"the answer does not stay when it is locked: {show(chosen)}"
    for name, better in find_improvements(universe, chosen):
        yield f"{name} could be {better.version} in {show(chosen)}"
    count_locks(universe, chosen, solutions, count)


def check_with_resolvelib(universe: Universe, count: Callable[[str], None]) -> Iterator[str]:
    """Ask the second oracle, which knows no conflicts."""
    plain = brute_force.without_conflicts(universe)
    oracle = resolvelib.Resolver(brute_force.Oracle(plain), resolvelib.BaseReporter())
    try:
        oracle.resolve(list(plain.requires), max_rounds=MAX_PEER_ROUNDS)
        exists = True
    except resolvelib.ResolutionImpossible:
        exists = False
    except (RecursionError, resolvelib.ResolutionTooDeep):
        # resolvelib 1.2.1 walks for ever round a cycle that backtracking cut off, or gives up.
        count("without resolvelib's answer")
        return
    count("compared with resolvelib")
    try:
        resolve(plain)
        found = True
    except ResolutionError:
        found = False
    if found != exists:
        yield f"without conflicts, resolvelib {'finds' if exists else 'does not find'} a solution"


def find_improvements(universe: Universe, chosen: Chosen) -> Iterator[tuple[str, Candidate]]:
    """Yield what would be preferred in place of one choice, all else as it is."""

    def rank(name: str, candidate: Candidate) -> tuple[bool, Version]:
        return universe.locked.get(name) == candidate.version, candidate.version

    for name, candidate in chosen.items():
        for other in universe.candidates(name):
            is_better = rank(name, other) > rank(name, candidate)
            if is_better and brute_force.is_valid(universe, {**chosen, name: other}):
                yield name, other


def count_locks(
    universe: Universe, chosen: Chosen, solutions: Sequence[Chosen], count: Callable[[str], None]
) -> None:
    """Count whether every lock was kept where one solution keeps them all."""

    def keeps_all(choice: Chosen) -> bool:
        return all(universe.locked.get(n, c.version) == c.version for n, c in choice.items())

    if any(
        keeps_all(choice)
        for choice in solutions
        if set(choice) == brute_force.reachable(universe, choice)
        and universe.locked.keys() & choice
    ):
        count("could keep every lock")
        if keeps_all(chosen):
            count("kept every lock")


def check_story(universe: Universe, story: str, count: Callable[[str], None]) -> Iterator[str]:
    """Do what the story says would help."""
    cures = scenarios.suggestions_in(story)
    if not cures:
        count("stories without a cure")
    for cure in cures:
        for cured in scenarios.apply_suggestion(universe, cure):
            count("cures tried")
            try:
                resolve(cured)
            except ResolutionError:
                yield f"{cure!r} does not help"


def check_proof(universe: Universe, count: Callable[[str], None]) -> Iterator[str]:
    """Check each fact against the universe, and that together they rule everything out."""
    problem = ResolutionProblem(universe, universe.requires, universe.interface, universe.locked)
    proof = PubGrub().solve(problem)
    assert isinstance(proof, Proof)
    for fact in proof.facts:
        count("facts checked")
        if not is_true(universe, fact):
            yield f"a proof claims {fact}"
    if any_solution(proof.facts):
        yield f"a proof proves nothing: {proof.facts}"


def is_true(universe: Universe, fact: Fact) -> bool:
    """Say whether a fact holds, from ranges and versions alone."""
    package, extra = split_extra(fact.name)
    if fact.kind == "root" and fact.name.startswith(INTERFACE_PREFIX):
        return set_of(universe, fact.name, Constraint("*")) == real(
            universe, fact.name, fact.choices
        )
    if fact.kind == "root":
        return any(
            set_of(universe, package, r.constraint) == real(universe, package, fact.choices)
            for r in universe.requires
            if r.name == package and (extra is None or extra in r.extras)
        )
    subjects = real(universe, fact.name, fact.choices)
    if fact.kind == "none":
        return not any(may_choose(universe, fact.name, index) for index in subjects)
    assert fact.allowed is not None
    allowed = real(universe, fact.other, fact.allowed)
    for index in subjects:
        if extra is not None and fact.other == package:
            if allowed != {index}:
                return False
            continue
        range_ = range_on(universe, fact, index)
        if range_ is None or set_of(universe, fact.other, range_) != allowed:
            return False
    return True


def range_on(universe: Universe, fact: Fact, index: int) -> Constraint | None:
    """Return the range that a candidate puts on the other package of a fact."""
    package, extra = split_extra(fact.name)
    candidate = candidates(universe, package)[index]
    if fact.kind == "conflict":
        return candidate.conflicts.get(fact.other)
    if fact.other.startswith(INTERFACE_PREFIX):
        return candidate.interface[1] if candidate.interface else None
    requires = candidate.requires if extra is None else candidate.extras.get(extra, {})
    return requires.get(fact.other)


def candidates(universe: Universe, name: str) -> list[Candidate]:
    """Return the candidates of a package, oldest first; of an interface its one version."""
    if name.startswith(INTERFACE_PREFIX):
        assert universe.interface is not None
        version = universe.interface.get(name.removeprefix(INTERFACE_PREFIX))
        return [] if version is None else [Candidate(version=version)]
    return sorted(universe.candidates(split_extra(name)[0]), key=lambda c: c.version)


def real(universe: Universe, name: str, choices: ChoiceSet) -> set[int]:
    """Return the members of a set that are candidates."""
    return {index for index in range(len(candidates(universe, name))) if index in choices}


def set_of(universe: Universe, name: str, range_: Constraint) -> set[int]:
    """Return the candidates that a range holds."""
    there = candidates(universe, name)
    return {index for index, c in enumerate(there) if range_.contains(c.version)}


def may_choose(universe: Universe, name: str, index: int) -> bool:
    """Say whether a candidate may be chosen, its interface and its needs aside."""
    if name.startswith(INTERFACE_PREFIX):
        return True
    package, extra = split_extra(name)
    candidate = candidates(universe, package)[index]
    if extra is not None:
        own = candidate.extras.get(extra, {}).get(package)
        if extra not in candidate.extras or (own and not own.contains(candidate.version)):
            return False
    return bool(
        brute_force.may_be_chosen(universe, package, dataclasses.replace(candidate, interface=None))
    )


def any_solution(facts: Sequence[Fact]) -> bool:
    """Say whether some choice of choices breaks no fact; a name may be left out."""
    names = list(dict.fromkeys(n for fact in facts for n in (fact.name, fact.other) if n))
    sets = [(f.name, f.choices) for f in facts] + [(f.other, f.allowed) for f in facts if f.allowed]
    domains = {
        name: [None, *range(1 + max(s.bits.bit_length() for n, s in sets if n == name))]
        for name in names
    }
    about: dict[str, list[Fact]] = {name: [] for name in names}
    for fact in facts:  # a fact is looked at when the last of its names has its choice
        about[max(fact.name, fact.other or fact.name, key=names.index)].append(fact)

    def is_broken(fact: Fact, choice: Mapping[str, int | None]) -> bool:
        at, other = choice[fact.name], choice.get(fact.other)
        is_about = at is not None and at in fact.choices
        if fact.kind == "root":
            return not is_about
        if fact.kind == "none" or not is_about:
            return is_about
        assert fact.allowed is not None
        is_held = other is not None and other in fact.allowed
        return is_held == (fact.kind == "conflict")

    def search(depth: int, choice: dict[str, int | None]) -> bool:
        if depth == len(names):
            return True
        name = names[depth]
        for value in domains[name]:
            choice[name] = value
            if not any(is_broken(f, choice) for f in about[name]) and search(depth + 1, choice):
                return True
        del choice[name]
        return False

    return search(0, {})


def find(universe: Universe, name: str, version: Version) -> Candidate:
    return next(c for c in universe.candidates(name) if c.version == version)


def show(chosen: Chosen) -> str:
    return ", ".join(f"{name} {candidate.version}" for name, candidate in chosen.items())
