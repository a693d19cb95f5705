"""Changes to the user's requirements that would make an unsolvable problem solvable, each tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from composable.packaging.resolution.problem import ResolutionProblem
from composable.packaging.resolution.solver import Fact, Proof, Solver
from composable.packaging.resolution.universe import Candidate
from composable.packaging.resolution.wording import list_in_words, requirements_behind
from composable.packaging.versions.constraint import (
    ANY,
    Constraint,
    Requirement,
    have_common_version,
    split_extra,
)
from composable.packaging.versions.version import Version

MAX_SUGGESTIONS: Final = 4
MAX_SUSPECTS: Final = 8
MAX_LEFT_OUT: Final = 6


@dataclass(frozen=True)
class Suggestion:
    """A change that would make a problem solvable.

    Args:
        text: The change, as told to the user.
        changed: Names of the packages whose requirements it changes.
        facts: What else rules the requirements out, beyond the proof of the problem itself.
    """

    text: str
    changed: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()


def find_suggestions(problem: ResolutionProblem, proof: Proof, solver: Solver) -> list[Suggestion]:
    """Return changes that work, the least invasive first; empty if none that is tried works.

    Args:
        problem: The problem.
        proof: Why it has no solution.
        solver: The solver that tries the changes.
    """
    return _Suggestions(problem, proof, solver).find()


class _Suggestions:
    """Changes that would make a problem solvable, each tried before it is suggested."""

    def __init__(self, problem: ResolutionProblem, proof: Proof, solver: Solver) -> None:
        self._problem = problem
        self._proof = proof
        self._solver = solver
        blamed = [
            r for f in proof.facts if f.kind == "root" for r in requirements_behind(problem, f)
        ]
        self._blamed = list(dict.fromkeys(blamed))[:MAX_SUSPECTS]

    def find(self) -> list[Suggestion]:
        """Return the suggestions that work, the least invasive first."""
        suggestions = [
            *self._try_prereleases(in_range=True),
            *(found for r in self._blamed if (found := self._try_relaxing(r))),
            *(found for r in self._blamed for found in self._try_without_extras(r)),
            *self._try_another_interface(),
            *self._try_yanked(),
            *self._try_remedies(),
            *self._try_alternatives(),
        ]
        if not suggestions:
            suggestions = [*self._try_prereleases(in_range=False), *self._try_leaving_out()]
        return suggestions[:MAX_SUGGESTIONS]

    def _solve(
        self,
        requires: Iterable[Requirement],
        *,
        with_yanked: Iterable[str] = (),
        with_remedies: Iterable[str] = (),
        is_interface_checked: bool = True,
    ) -> dict[str, Candidate] | None:
        problem = ResolutionProblem(
            self._problem.source,
            list(requires),
            self._problem.interface if is_interface_checked else None,
            self._problem.locked,
            with_yanked=with_yanked,
            with_remedies=with_remedies,
        )
        answer = self._solver.solve(problem)
        if isinstance(answer, Proof):
            return None
        return {name: problem.table(name).candidates[choice] for name, choice in answer.items()}

    def _replace(self, old: Requirement, *new: Requirement) -> list[Requirement]:
        return [r for each in self._problem.requires for r in (new if each == old else (each,))]

    def _try_relaxing(self, requirement: Requirement) -> Suggestion | None:
        if requirement.constraint == ANY:
            return None
        relaxed = dataclasses.replace(requirement, constraint=ANY)
        answer = self._solve(self._replace(requirement, relaxed))
        if answer is None:
            return None
        version = answer[requirement.name].version
        if requirement.constraint.contains(version):
            # Only an exact pin does more than restrict versions: it allows a yanked one.
            return None
        return Suggestion(
            f"require {requirement.target} {version} instead of {requirement.constraint}",
            (requirement.name,),
        )

    def _try_without_extras(self, requirement: Requirement) -> Iterator[Suggestion]:
        blamed = [
            extra
            for fact in self._proof.facts
            for package, extra in [split_extra(fact.name)]
            if package == requirement.name and extra in requirement.extras
        ]
        for extra in dict.fromkeys(blamed):
            fewer = tuple(other for other in requirement.extras if other != extra)
            without = dataclasses.replace(requirement, extras=fewer)
            if self._solve(self._replace(requirement, without)) is not None:
                yield Suggestion(
                    f"require {without.target} without its extra {extra}", (without.name,)
                )

    def _try_another_interface(self) -> Iterator[Suggestion]:
        interface = self._problem.interface
        if not interface:
            return
        answer = self._solve(self._problem.requires, is_interface_checked=False)
        needs: dict[str, dict[Constraint, str]] = {}
        for name, candidate in sorted((answer or {}).items()):
            if candidate.interface is not None:
                needed, range_ = candidate.interface
                needs.setdefault(needed, {}).setdefault(range_, f"{name} {candidate.version}")
        for needed, releases in sorted(needs.items()):
            if needed in interface and all(r.contains(interface[needed]) for r in releases):
                continue
            if len(needs) == 1 and have_common_version(releases):
                ranges = ", ".join(str(range_) for range_ in releases if range_ != ANY)
                named = list_in_words(list(releases.values()))
                yield Suggestion(
                    f"use a backbone whose router interface is {needed} {ranges}, for {named}"
                )

    def _try_yanked(self) -> Iterator[Suggestion]:
        names = [
            split_extra(fact.name)[0]
            for fact in self._proof.facts
            if fact.kind == "none" and any(c.is_yanked for c in self._candidates(fact))
        ]
        answer = self._solve(self._problem.requires, with_yanked=names) if names else None
        pins = [
            Requirement(name, Constraint.exactly(answer[name].version))
            for name in dict.fromkeys(names)
            if answer and name in answer and answer[name].is_yanked
        ]
        alone = [pin for pin in pins if self._solve([*self._problem.requires, pin]) is not None]
        if alone:
            for pin in alone:
                yield Suggestion(
                    f"require {_write_pin(pin)} exactly to accept the yanked version", (pin.name,)
                )
        elif pins and self._solve([*self._problem.requires, *pins]) is not None:
            all_pins = list_in_words([_write_pin(pin) for pin in pins])
            yield Suggestion(
                f"require {all_pins} exactly to accept the yanked versions",
                tuple(pin.name for pin in pins),
            )

    def _try_remedies(self) -> Iterator[Suggestion]:
        """Try what lifts the refusals: each remedy alone, or else together those that it takes.

        Lifting one may lead to a package that is refused as well, which only the next proof names.
        """
        remedies = self._remedies_in(self._problem, self._proof)
        alone = [
            remedy
            for remedy in remedies[:MAX_SUSPECTS]
            if self._solve(self._problem.requires, with_remedies=[remedy]) is not None
        ]
        yield from map(Suggestion, alone)
        if alone or not remedies:
            return
        for _ in range(MAX_SUSPECTS):
            problem = ResolutionProblem(
                self._problem.source,
                self._problem.requires,
                self._problem.interface,
                self._problem.locked,
                with_remedies=remedies,
            )
            answer = self._solver.solve(problem)
            if not isinstance(answer, Proof):
                chosen = [problem.table(name).candidates[choice] for name, choice in answer.items()]
                needed = dict.fromkeys(c.remedy for c in chosen if c.refusal and c.remedy)
                yield Suggestion(list_in_words([remedy for remedy in needed if remedy]))
                return
            found = self._remedies_in(problem, answer)
            if remedies == (remedies := list(dict.fromkeys([*remedies, *found]))):
                return

    def _try_alternatives(self) -> Iterator[Suggestion]:
        """Try other packages instead of a required one that is refused."""
        required = {requirement.name for requirement in self._problem.requires}
        refused = {
            split_extra(fact.name)[0]
            for fact in self._proof.facts
            if fact.kind == "none" and any(c.remedy for c in self._candidates(fact))
        }
        for requirement in self._blamed:
            if requirement.name not in refused:
                continue
            for name, shared in self._problem.source.alternatives(requirement.name).items():
                if name in required:
                    continue
                answer = self._solve(self._replace(requirement, Requirement(name, ANY)))
                if answer is not None:
                    version = answer[name].version
                    yield Suggestion(
                        f"require {name} {version} instead of {requirement.name}: {shared}",
                        (requirement.name,),
                    )
                    break

    def _remedies_in(self, problem: ResolutionProblem, proof: Proof) -> list[str]:
        """Return the remedies of the refused candidates in a proof, of the newest first."""
        found: dict[str, None] = {}
        for fact in proof.facts:
            table = problem.table(split_extra(fact.name)[0])
            if fact.kind == "none":
                for index, candidate in reversed([*enumerate(table.candidates)]):
                    if index in fact.choices and candidate.remedy is not None:
                        found[candidate.remedy] = None
        return list(found)

    def _candidates(self, fact: Fact) -> list[Candidate]:
        table = self._problem.table(fact.name)
        return [c for i, c in enumerate(table.candidates) if i in fact.choices]

    def _try_prereleases(self, *, in_range: bool) -> Iterator[Suggestion]:
        """Try the newest prereleases, either those whose release is in the range or the others."""
        for requirement in self._blamed:
            table = self._problem.table(requirement.name)
            early = [
                c.version
                for c in table.candidates
                if c.version.is_prerelease and not requirement.constraint.contains(c.version)
                if in_range == requirement.constraint.contains(_release_of(c.version))
            ]
            for version in reversed(early[-3:]):
                exact = dataclasses.replace(requirement, constraint=Constraint.exactly(version))
                if self._solve(self._replace(requirement, exact)) is not None:
                    yield Suggestion(
                        f"require the prerelease {requirement.target}=={version}",
                        (requirement.name,),
                    )
                    break

    def _try_leaving_out(self) -> Iterator[Suggestion]:
        alone = [r for r in self._blamed if self._solve(self._replace(r)) is not None]
        if alone:
            for requirement in alone:
                yield Suggestion(f"leave out {requirement.target}", (requirement.name,))
            return
        yield from self._try_leaving_out_several()

    def _try_leaving_out_several(self) -> Iterator[Suggestion]:
        """Leave out the last requirement of each proof in turn, until there is a solution.

        Each proof rules out other requirements, so the suggestion brings the facts of all.
        """
        problem, proof, dropped = self._problem, self._proof, list[Requirement]()
        facts: list[Fact] = []
        while True:
            roots = [fact for fact in proof.facts if fact.kind == "root"]
            blamed = [r for fact in roots for r in requirements_behind(problem, fact)]
            if not blamed or len(dropped) == MAX_LEFT_OUT:
                return
            latest = max(blamed, key=problem.requires.index)
            dropped.append(latest)
            rest = [requirement for requirement in problem.requires if requirement != latest]
            problem = ResolutionProblem(problem.source, rest, problem.interface, problem.locked)
            answer = self._solver.solve(problem)
            if not isinstance(answer, Proof):
                break
            proof = answer
            facts += proof.facts
        targets = [requirement.target for requirement in reversed(dropped)]
        yield Suggestion(
            f"leave out {list_in_words(list(dict.fromkeys(targets)))}",
            tuple(requirement.name for requirement in dropped),
            tuple(facts),
        )


def _release_of(version: Version) -> Version:
    return Version(".".join(map(str, version.release)))


def _write_pin(pin: Requirement) -> str:
    return f"{pin.target}=={pin.constraint.pinned}"
