"""The explanation of a failed resolution: requirements, what rules them out, and suggestions.

A proof of the solver is a list of facts about sets of choices. Here they become sentences about
versions and ranges as the user and the authors wrote them. Every suggestion has been tried.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

from composable.errors import did_you_mean
from composable.packaging.resolution.long_stories import fold_chains, shorten_list
from composable.packaging.resolution.meetings import explain_meetings
from composable.packaging.resolution.problem import ResolutionProblem
from composable.packaging.resolution.solver import ChoiceSet, Fact, Proof, Solver
from composable.packaging.resolution.universe import INTERFACE_PREFIX, Candidate
from composable.packaging.resolution.wording import (
    list_available,
    list_in_words,
    requirements_behind,
)
from composable.packaging.versions.constraint import ANY, Constraint, split_extra
from composable.printable import printable

MAX_REFUSALS: Final = 3
MAX_SENTENCES: Final = 16
_ORDER: Final = {"root": 0, "need": 1, "conflict": 2, "none": 3}
_AFTER_ALL: Final = sys.maxsize  # the sort key of a name that the user does not require
_Ranges = Callable[[Candidate], Mapping[str, Constraint]]


def explain_failure(problem: ResolutionProblem, proof: Proof, solver: Solver) -> str:
    """Return why a problem has no solution, and which changes would give it one.

    Args:
        problem: The problem.
        proof: Why it has no solution.
        solver: The solver that tries the suggestions.
    """
    from composable.packaging.resolution.suggestions import find_suggestions

    suggestions = find_suggestions(problem, proof, solver)
    facts = _join_facts([*proof.facts, *(fact for s in suggestions for fact in s.facts)])
    changed = {name for suggestion in suggestions for name in suggestion.changed}
    reasons = "".join(
        f"\n  {printable(sentence)}" for sentence in _tell_story(problem, facts, changed)
    )
    explanation = f"your requirements cannot be satisfied together:\n{reasons}"
    if not suggestions:
        return explanation
    intro = "Any one of these changes" if len(suggestions) > 1 else "This change"
    listed = "".join(f"\n  - {printable(suggestion.text)}" for suggestion in suggestions)
    return f"{explanation}\n\n{intro} would solve it:\n{listed}"


def _tell_story(
    problem: ResolutionProblem, facts: Sequence[Fact], changed: Collection[str]
) -> Iterator[str]:
    """Yield the sentences: requirements, what they lead to, and what cannot be had.

    Args:
        problem: The problem.
        facts: What rules it out.
        changed: Packages whose requirements suggestions change; their sentences are kept.
    """
    order = _reading_order(problem, facts)
    explainer = _Explainer(problem, facts)
    links = fold_chains(facts)
    parts: dict[str, dict[str, bool]] = {kind: {} for kind in (*_ORDER, "meeting")}
    for fact in sorted(facts, key=lambda fact: (_ORDER[fact.kind], order[fact.name])):
        link = links.get((fact.name, fact.other)) if fact.kind == "need" else None
        is_kept = fact.kind == "root" and split_extra(fact.name)[0] in changed
        for sentence in explainer.explain_fact(fact) if link is None else (link,):
            parts[fact.kind].setdefault(sentence, is_kept or link is not None)
    parts["meeting"] = dict.fromkeys(explain_meetings(problem, facts, explainer.ranges_of), False)
    is_long = sum(map(len, parts.values())) > MAX_SENTENCES
    for sentences in parts.values():
        yield from shorten_list(sentences) if is_long else sentences


def _join_facts(facts: Iterable[Fact]) -> list[Fact]:
    """Join the facts that differ only in the versions that they are about."""
    joined: dict[object, Fact] = {}
    for fact in facts:
        is_joinable = fact.kind in ("need", "conflict")
        key = (fact.kind, fact.name, fact.other, fact.allowed) if is_joinable else fact
        before = joined.get(key)
        choices = fact.choices | before.choices if before is not None else fact.choices
        joined[key] = dataclasses.replace(fact, choices=choices)
    return sorted(joined.values(), key=lambda fact: fact.choices.bits & -fact.choices.bits)


def _reading_order(problem: ResolutionProblem, facts: Iterable[Fact]) -> dict[str, int]:
    """Number the names in reading order: each requirement, then what it leads to."""
    leads_to: dict[str, list[str]] = {}
    for fact in facts:
        if fact.other:
            leads_to.setdefault(fact.name, []).append(fact.other)
    required = [requirement.name for requirement in problem.requires]

    def position(name: str) -> int:
        package, _ = split_extra(name)
        return required.index(package) if package in required else _AFTER_ALL

    roots = sorted((fact.name for fact in facts if fact.kind == "root"), key=position)
    order: dict[str, int] = {}
    pending = [*reversed(roots)]
    while pending:
        name = pending.pop()
        if name not in order:
            order[name] = len(order)
            pending += reversed(leads_to.get(name, []))
    for fact in facts:
        order.setdefault(fact.name, len(order))
    return order


class _Explainer:
    """Writes facts as sentences."""

    def __init__(self, problem: ResolutionProblem, facts: Sequence[Fact]) -> None:
        self._problem = problem
        self._facts = facts

    def explain_fact(self, fact: Fact) -> Iterator[str]:
        """Yield the sentences for one fact."""
        package, extra = split_extra(fact.name)
        if fact.kind == "root":
            yield from self._explain_root(fact)
        elif fact.kind == "none":
            yield from self._explain_none(fact, package, extra)
        elif fact.kind == "conflict":
            ranges = self._ranges(fact, lambda candidate: candidate.conflicts)
            subject, verb = self._subject(fact, "cannot", "cannot", "can")
            yield f"{subject} {verb} be installed with {fact.other}{ranges}."
        elif fact.other.startswith(INTERFACE_PREFIX):
            ranges = self._ranges(
                fact, lambda c: {fact.other: c.interface[1]} if c.interface else {}
            )
            name = fact.other.removeprefix(INTERFACE_PREFIX)
            subject, verb = self._subject(fact, "needs", "need")
            yield f"{subject} {verb} router interface {name}{ranges}."
        elif fact.other != package or extra is None:  # an extra obviously needs its package
            ranges = self._ranges(fact, lambda candidate: candidate.requires)
            subject, verb = self._subject(fact, "needs", "need")
            itself = ", another version of itself" if fact.other == package else ""
            yield f"{subject} {verb} {fact.other}{ranges}{itself}."

    def _explain_root(self, fact: Fact) -> Iterator[str]:
        if fact.name.startswith(INTERFACE_PREFIX):
            name = fact.name.removeprefix(INTERFACE_PREFIX)
            version = (self._problem.interface or {})[name]
            yield f"Your backbone's router interface is {name} {version}."
        for requirement in requirements_behind(self._problem, fact):
            yield f"You require {requirement}."

    def _explain_none(self, fact: Fact, package: str, extra: str | None) -> Iterator[str]:
        """Yield why nothing can be chosen: no version matches, or none that does is selectable."""
        if fact.name.startswith(INTERFACE_PREFIX):
            return  # other facts name the range that is needed and the available version
        table = self._problem.table(package)
        if not table.candidates:
            hint = did_you_mean(package, self._problem.source.names())
            yield f"There is no expert {package!r}{f' ({hint})' if hint else ''}."
            return
        if not any(index in fact.choices for index in range(len(table.candidates))):
            yield self._explain_no_match(package, table.candidates)
            return
        yield from self._explain_not_selectable(fact, package)
        if extra is not None:
            yield from self._explain_missing_extra(fact, package, extra)

    def _explain_no_match(self, package: str, candidates: Sequence[Candidate]) -> str:
        """Return the sentence for a package with versions, none of them in the ranges required."""
        available = list_in_words([str(candidate.version) for candidate in candidates])
        if all(candidate.version.is_prerelease for candidate in candidates):
            return f"{package} has only prereleases ({available}), and no range names one."
        everything = ChoiceSet((1 << len(candidates)) - 1)
        required = {
            str(range_)
            for fact in self._facts
            if fact.kind == "none" and split_extra(fact.name)[0] == package
            if fact.choices.is_disjoint(everything)
            for range_ in self._problem.table(fact.name).ranges_of(fact.choices)
        }
        matches = f"matches {list_in_words(sorted(required), 'or')}" if required else "matches"
        return f"No version of {package} {matches} ({list_available(candidates)})."

    def _explain_not_selectable(self, fact: Fact, package: str) -> Iterator[str]:
        """Yield why versions cannot be chosen, one sentence for each reason."""
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
        newest_first = list(reversed(reasons.items()))
        for refusal, versions in newest_first[:MAX_REFUSALS]:
            each = " each" if len(versions) > 1 else ""
            yield f"{package} {list_in_words(versions)}{each} {refusal}."
        rest = sum(len(versions) for _, versions in newest_first[MAX_REFUSALS:])
        if rest:
            yield f"{rest} older releases of {package} cannot be chosen for similar reasons."

    def _explain_missing_extra(self, fact: Fact, package: str, extra: str) -> Iterator[str]:
        """Yield which releases lack an extra, or have it and cannot be chosen with it."""
        table, alone = self._problem.table(fact.name), self._problem.table(package)
        selectable = fact.choices & ChoiceSet(alone.selectable)
        without: list[str] = []
        for index, candidate in enumerate(table.candidates):
            if index not in selectable or candidate.refusal is None:
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
                hint = f"it has {list_in_words(sorted(known))}" if known else "it has no extras"
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
        """Return the subject of a sentence, the versions that a fact is about, and its verb.

        Only selectable versions are named, and only those that the user requires, if any.

        Args:
            fact: The fact.
            verb: The verb for one version, or for every version.
            plural: The verb for several versions.
            of_none: The verb after "No version"; None for a sentence with "Every version".
        """
        table = self._problem.table(fact.name)
        package, extra = split_extra(fact.name)
        suffix = "" if extra is None else f" with extra {extra}"
        roots = [f for f in self._facts if f.kind == "root" and f.name == fact.name]
        selectable = ChoiceSet(table.selectable)
        required = functools.reduce(ChoiceSet.__and__, (f.choices for f in roots), selectable)
        if required.is_disjoint(fact.choices):
            required, roots = selectable, []
        versions = table.versions(fact.choices & required) or table.versions(fact.choices)
        available = table.versions(required)
        if len(versions) == 1:
            return f"{package} {versions[0]}{suffix}", verb
        if versions == available:
            ranges = [
                str(r.constraint) for f in roots for r in requirements_behind(self._problem, f)
            ]
            within = f" in {', '.join(ranges)}" if required != selectable else ""
            every = "Every" if of_none is None else "No"
            return f"{every} version of {package}{within}{suffix}", of_none or verb
        start = available.index(versions[0]) if versions[0] in available else 0
        if len(versions) > 2 and versions == available[start : start + len(versions)]:
            return f"{package} {versions[0]} to {versions[-1]}{suffix}", plural
        return f"{package} {list_in_words([str(v) for v in versions])}{suffix}", plural

    def _ranges(self, fact: Fact, ranges_of: _Ranges) -> str:
        """Return the ranges on the other package in words."""
        written = list(dict.fromkeys(map(str, self._written(fact, ranges_of))))
        return "" if not written or str(ANY) in written else f" {' or '.join(written)}"

    def ranges_of(self, fact: Fact) -> list[Constraint]:
        """Return the ranges behind a fact on a package, as the user or the authors wrote them."""
        if fact.kind == "root":
            return [r.constraint for r in requirements_behind(self._problem, fact)]
        if fact.kind == "conflict":
            return self._written(fact, lambda candidate: candidate.conflicts)
        return self._written(fact, lambda candidate: candidate.requires)

    def _written(self, fact: Fact, ranges_of: _Ranges) -> list[Constraint]:
        """Return the ranges on the other package as the authors wrote them."""
        table, other = self._problem.table(fact.name), self._problem.table(fact.other)
        return [
            range_
            for index, candidate in enumerate(table.candidates)
            if index in fact.choices
            if (range_ := ranges_of(candidate).get(fact.other)) is not None
            if other.within(range_) == fact.allowed
        ]
