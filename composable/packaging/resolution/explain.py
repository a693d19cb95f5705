"""The story of a failed resolution: what was asked, what stands in the way, what would help.

A proof of the solver is a list of facts about sets of choices. Here they become sentences about
versions and ranges as the user and the authors wrote them. Every cure that is offered was tried.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from composable.errors import did_you_mean
from composable.packaging.resolution.problem import ResolutionProblem
from composable.packaging.resolution.solver import ChoiceSet, Fact, Proof, Solver
from composable.packaging.resolution.universe import INTERFACE_PREFIX, Candidate
from composable.packaging.resolution.wording import list_in_words, requirements_behind
from composable.packaging.versions.constraint import (
    ANY,
    Constraint,
    split_extra,
)

MAX_REFUSALS: Final = 3
_ORDER: Final = {"root": 0, "need": 1, "conflict": 2, "none": 3}
_Ranges = Callable[[Candidate], Mapping[str, Constraint]]


def explain_failure(problem: ResolutionProblem, proof: Proof, solver: Solver) -> str:
    """Return why a problem has no solution and what would make it solvable.

    Args:
        problem: The problem.
        proof: What the solver found.
        solver: Tries out the cures.
    """
    facts = _join(proof.facts)
    order = _reading_order(problem, facts)
    sentences: dict[str, None] = {}
    for fact in sorted(facts, key=lambda fact: (_ORDER[fact.kind], order[fact.name])):
        sentences |= dict.fromkeys(_Teller(problem, facts).tell(fact))
    from composable.packaging.resolution.suggestions import find_suggestions

    cures = find_suggestions(problem, proof, solver)
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
    return sorted(joined.values(), key=lambda fact: fact.choices.bits & -fact.choices.bits)


def _reading_order(problem: ResolutionProblem, facts: Iterable[Fact]) -> dict[str, int]:
    """Number the names as a reader meets them, going from each wish down to what it leads to."""
    leads_to: dict[str, list[str]] = {}
    for fact in facts:
        if fact.other:
            leads_to.setdefault(fact.name, []).append(fact.other)
    wishes = [fact.name for fact in facts if fact.kind == "root"]
    asked = [requirement.name for requirement in problem.requires]
    wishes.sort(key=lambda name: asked.index(p) if (p := split_extra(name)[0]) in asked else 9**9)
    order: dict[str, int] = {}
    pending = [*reversed(wishes)]
    while pending:
        name = pending.pop()
        if name not in order:
            order[name] = len(order)
            pending += reversed(leads_to.get(name, []))
    for fact in facts:
        order.setdefault(fact.name, len(order))
    return order


class _Teller:
    """Makes sentences of facts."""

    def __init__(self, problem: ResolutionProblem, facts: Sequence[Fact]) -> None:
        self._problem = problem
        self._facts = facts

    def tell(self, fact: Fact) -> Iterator[str]:
        """Yield the sentences for one fact."""
        package, extra = split_extra(fact.name)
        if fact.kind == "root":
            yield from self._tell_root(fact)
        elif fact.kind == "none":
            yield from self._tell_none(fact, package, extra)
        elif fact.kind == "conflict":
            ranges = self._ranges(fact, lambda candidate: candidate.conflicts)
            subject, verb = self._subject(fact, "cannot", "cannot", "can")
            yield f"{subject} {verb} be installed with {fact.other}{ranges}."
        elif fact.other.startswith(INTERFACE_PREFIX):
            ranges = self._ranges(
                fact, lambda c: {fact.other: c.interface[1]} if c.interface else {}
            )
            name = fact.other.removeprefix(INTERFACE_PREFIX)
            subject, verb = self._subject(fact, "plugs", "plug")
            yield f"{subject} {verb} into router interface {name}{ranges}."
        elif (
            fact.other != package or extra is None
        ):  # that an extra comes with its package is plain
            ranges = self._ranges(fact, lambda candidate: candidate.requires)
            subject, verb = self._subject(fact, "needs", "need")
            itself = ", another version of itself" if fact.other == package else ""
            yield f"{subject} {verb} {fact.other}{ranges}{itself}."

    def _tell_root(self, fact: Fact) -> Iterator[str]:
        if fact.name.startswith(INTERFACE_PREFIX):
            name = fact.name.removeprefix(INTERFACE_PREFIX)
            version = (self._problem.interface or {})[name]
            yield f"Your backbone's router interface is {name} {version}."
        for requirement in requirements_behind(self._problem, fact):
            yield f"You ask for {requirement}."

    def _tell_none(self, fact: Fact, package: str, extra: str | None) -> Iterator[str]:
        """Say why nothing can be chosen: nothing is there, or all that is there is barred."""
        if fact.name.startswith(INTERFACE_PREFIX):
            return  # the facts beside it say which range is needed and which version there is
        table = self._problem.table(package)
        if not table.candidates:
            hint = did_you_mean(package, self._problem.source.names())
            yield f"There is no expert {package!r}{f' ({hint})' if hint else ''}."
            return
        if not any(index in fact.choices for index in range(len(table.candidates))):
            yield self._tell_empty(package, table.candidates)
            return
        yield from self._tell_barred(fact, package)
        if extra is not None:
            yield from self._tell_no_extra(fact, package, extra)

    def _tell_empty(self, package: str, candidates: Sequence[Candidate]) -> str:
        """Say what there is instead of all that was asked for in vain."""
        there = list_in_words([str(candidate.version) for candidate in candidates])
        if all(candidate.version.is_prerelease for candidate in candidates):
            return f"Of {package} there are only prereleases, {there}, and no range names one."
        everything = ChoiceSet((1 << len(candidates)) - 1)
        asked = {
            str(range_)
            for fact in self._facts
            if fact.kind == "none" and split_extra(fact.name)[0] == package
            if fact.choices.is_disjoint(everything)
            for range_ in self._problem.table(fact.name).ranges_of(fact.choices)
        }
        within = f" in {list_in_words(sorted(asked), 'or')}" if asked else ""
        rule = ""
        if any(candidate.version.is_prerelease for candidate in candidates):
            rule = "; a prerelease counts only where a range names one"
        return f"There is no {package}{within}, only {there}{rule}."

    def _tell_barred(self, fact: Fact, package: str) -> Iterator[str]:
        """Say of the versions that may not be chosen why not, those with one reason together."""
        table = self._problem.table(package)
        reasons: dict[str | None, list[str]] = {}
        for index, candidate in enumerate(table.candidates):
            if index in fact.choices and index not in ChoiceSet(table.selectable):
                reasons.setdefault(candidate.refusal, []).append(str(candidate.version))
        yanked = reasons.pop(None, [])
        if len(yanked) == 1:
            yield f"{package} {yanked[0]} was yanked, and is neither locked nor pinned exactly."
        elif yanked:
            yield (
                f"{package} {list_in_words(yanked)} were yanked, and none is locked or "
                "pinned exactly."
            )
        told = list(reversed(reasons.items()))
        for refusal, versions in told[:MAX_REFUSALS]:
            each = " each" if len(versions) > 1 else ""
            yield f"{package} {list_in_words(versions)}{each} {refusal}."
        rest = sum(len(versions) for _, versions in told[MAX_REFUSALS:])
        if rest:
            yield f"{rest} older releases of {package} may not be chosen for like reasons."

    def _tell_no_extra(self, fact: Fact, package: str, extra: str) -> Iterator[str]:
        """Say which releases lack an extra, and which have it."""
        table, alone = self._problem.table(fact.name), self._problem.table(package)
        open_to_choice = fact.choices & ChoiceSet(alone.selectable)
        without: list[str] = []
        for index, candidate in enumerate(table.candidates):
            if index not in open_to_choice or candidate.refusal is None:
                continue
            if extra in alone.candidates[index].extras:
                yield f"{package} {candidate.version} {candidate.refusal}."
            else:
                without.append(str(candidate.version))
        known = {name for candidate in alone.candidates for name in candidate.extras}
        ranges = [str(range_) for range_ in table.ranges_of(fact.choices) if range_ != ANY]
        if not without:
            return
        if extra not in known:
            hint = did_you_mean(extra, known)
            if hint is None:
                hint = f"it has {list_in_words(sorted(known))}" if known else "it has none at all"
            yield f"No release of {package} has an extra {extra!r} ({hint})."
        elif ranges and len(without) > 1:
            within = list_in_words(ranges, "or")
            yield f"No release of {package} in {within} has an extra {extra!r}."
        else:
            verb = "has" if len(without) == 1 else "have"
            yield f"{package} {list_in_words(without)} {verb} no extra {extra!r}."

    def _subject(
        self, fact: Fact, verb: str, plural: str, of_none: str | None = None
    ) -> tuple[str, str]:
        """Name the versions that a fact is about and that could be chosen, and choose the verb.

        Where the user asks for some versions only, no others are spoken of.
        """
        table = self._problem.table(fact.name)
        package, extra = split_extra(fact.name)
        suffix = "" if extra is None else f" with extra {extra}"
        wishes = [f for f in self._facts if f.kind == "root" and f.name == fact.name]
        open_to_choice = ChoiceSet(table.selectable)
        asked = functools.reduce(ChoiceSet.__and__, (f.choices for f in wishes), open_to_choice)
        if asked.is_disjoint(fact.choices):
            asked, wishes = open_to_choice, []
        versions = table.versions(fact.choices & asked) or table.versions(fact.choices)
        available = table.versions(asked)
        if len(versions) == 1:
            return f"{package} {versions[0]}{suffix}", verb
        if versions == available:
            ranges = [
                str(r.constraint) for f in wishes for r in requirements_behind(self._problem, f)
            ]
            within = f" in {', '.join(ranges)}" if asked != open_to_choice else ""
            every = "Every" if of_none is None else "No"
            return f"{every} version of {package}{within}{suffix}", of_none or verb
        start = available.index(versions[0]) if versions[0] in available else 0
        if len(versions) > 2 and versions == available[start : start + len(versions)]:
            return f"{package} {versions[0]} to {versions[-1]}{suffix}", plural
        return f"{package} {list_in_words([str(v) for v in versions])}{suffix}", plural

    def _ranges(self, fact: Fact, ranges_of: _Ranges) -> str:
        """Return the ranges on the other package as the authors wrote them."""
        table, other = self._problem.table(fact.name), self._problem.table(fact.other)
        written = {
            str(range_): None
            for index, candidate in enumerate(table.candidates)
            if index in fact.choices
            if (range_ := ranges_of(candidate).get(fact.other)) is not None
            if other.within(range_) == fact.allowed
        }
        return "" if not written or str(ANY) in written else f" {' or '.join(written)}"
