"""Ranges that overlap where no release lies: what a reader of the ranges alone cannot see."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from composable.packaging.resolution.problem import ResolutionProblem
from composable.packaging.resolution.solver import ChoiceSet, Fact
from composable.packaging.resolution.universe import INTERFACE_PREFIX, Candidate
from composable.packaging.resolution.wording import list_available, list_in_words
from composable.packaging.versions.constraint import (
    Constraint,
    have_common_version,
    is_within,
    split_extra,
)


class _Claim(NamedTuple):
    """A range on a package, the releases in it, and the package that states it ("": the user)."""

    range_: Constraint
    choices: ChoiceSet
    source: str


def explain_meetings(
    problem: ResolutionProblem, facts: Sequence[Fact], ranges_of: Callable[[Fact], list[Constraint]]
) -> Iterator[str]:
    """Yield a sentence for ranges that have versions in common, but no release.

    Args:
        problem: The problem.
        facts: What rules it out.
        ranges_of: Returns the ranges that a fact stands for, as they were written.
    """
    wanted: dict[str, list[_Claim]] = {}
    refused: dict[str, list[_Claim]] = {}
    for fact in facts:
        if fact.kind == "none":
            continue
        # An extra needs the same version of its package; nobody wrote that as a range.
        name, choices = (
            (fact.name, fact.choices)
            if fact.kind == "root"
            else (fact.other, fact.allowed or ChoiceSet.empty())
        )
        package = split_extra(name)[0]
        source = "" if fact.kind == "root" else split_extra(fact.name)[0]
        claims = (refused if fact.kind == "conflict" else wanted).setdefault(package, [])
        claims += [_Claim(range_, choices, source) for range_ in ranges_of(fact)]
    explained = {fact.name for fact in facts if fact.kind == "none"}
    for package, claims in wanted.items():
        if not package.startswith(INTERFACE_PREFIX):
            candidates = problem.table(package).candidates
            if not candidates:
                continue  # the story has it that there is no release at all
            if package in explained:  # that nothing is in a range alone is said already
                claims = [claim for claim in claims if any(claim.choices & _known(candidates))]
            yield from _explain_common(package, candidates, claims)
            yield from _explain_refused(package, candidates, claims, refused.get(package, ()))


def _known(candidates: Sequence[Candidate]) -> ChoiceSet:
    return ChoiceSet((1 << len(candidates)) - 1)


def _explain_common(
    package: str, candidates: Sequence[Candidate], claims: Sequence[_Claim]
) -> Iterator[str]:
    """Yield the ranges that nothing is in together: pairs, or else all."""
    pairs = [
        (one, other)
        for one, other in itertools.combinations(claims, 2)
        if one.source != other.source or not one.source
        if one.choices.is_disjoint(other.choices)
    ]
    for pair in pairs:
        yield from _tell_common(package, candidates, pair)
    if not pairs and claims:
        common = _known(candidates)
        for claim in claims:
            common &= claim.choices
        if common.is_empty:
            yield from _tell_common(package, candidates, claims)


def _tell_common(
    package: str, candidates: Sequence[Candidate], claims: Iterable[_Claim]
) -> Iterator[str]:
    ranges = list(dict.fromkeys(claim.range_ for claim in claims))
    if have_common_version(ranges):
        quantity = "both" if len(ranges) == 2 else "all of"
        within = list_in_words([str(range_) for range_ in ranges])
        available = list_available(candidates)
        yield f"No release of {package} lies in {quantity} {within} ({available})."


def _explain_refused(
    package: str,
    candidates: Sequence[Candidate],
    wanted: Sequence[_Claim],
    refused: Sequence[_Claim],
) -> Iterator[str]:
    """Yield the ranges of which a conflict leaves versions, but no release."""
    for want, conflict in itertools.product(wanted, refused):
        found = want.choices & _known(candidates)
        if found.is_empty or not found.is_subset(conflict.choices):
            continue
        if not is_within(want.range_, conflict.range_):
            yield (
                f"No release of {package} lies in {want.range_} but not in {conflict.range_} "
                f"({list_available(candidates)})."
            )
