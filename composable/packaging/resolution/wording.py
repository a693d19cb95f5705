"""Wording that explanations and suggestions share."""

from __future__ import annotations

from collections.abc import Sequence

from composable.packaging.resolution.problem import ResolutionProblem
from composable.packaging.resolution.solver import Fact
from composable.packaging.resolution.universe import Candidate
from composable.packaging.versions.constraint import Requirement, split_extra


def requirements_behind(problem: ResolutionProblem, fact: Fact) -> list[Requirement]:
    """Return the user's requirements that a root fact represents."""
    table = problem.table(fact.name)
    package, extra = split_extra(fact.name)
    return [
        requirement
        for requirement in problem.requires
        if requirement.name == package and (extra is None or extra in requirement.extras)
        if table.within(requirement.constraint) == fact.choices
    ]


def list_available(candidates: Sequence[Candidate]) -> str:
    """Return which versions there are, and the rule of prereleases if it applies."""
    versions = list_in_words([str(candidate.version) for candidate in candidates])
    rule = ""
    if any(candidate.version.is_prerelease for candidate in candidates):
        rule = "; a prerelease matches only a range that names one"
    return f"available: {versions}{rule}"


def list_in_words(items: Sequence[str], conjunction: str = "and") -> str:
    """Join items in words; the middle of a long list is omitted.

    Example:
        >>> list_in_words(["1.0.0", "1.1.0", "2.0.0"], "or")
        '1.0.0, 1.1.0 or 2.0.0'
    """
    if len(items) > 6:
        return f"{', '.join(items[:2])}, … {conjunction} {items[-1]} ({len(items)} in all)"
    return ", ".join(items[:-1]) + (f" {conjunction} " if len(items) > 1 else "") + items[-1]
