"""From requirements and what there is to one version for every package, or the story why not.

The policy is here: the router interface is a package of its own; candidates that fit it come first,
then the newest; a locked version is kept while it is allowed; yanked versions are taken only when
locked or pinned exactly by the user; a refused candidate never. How to search is the solver's.

A package with an extra, `german[code]`, is a name of its own to the solver. Its choices are those
of `german` that have the extra, and each needs the same choice of `german` and what the extra adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from composable.errors import ResolutionError
from composable.packaging.resolution.problem import ResolutionProblem
from composable.packaging.resolution.solver import Proof, PubGrub, Solver
from composable.packaging.resolution.universe import INTERFACE_PREFIX, CandidateSource, Universe
from composable.packaging.versions.constraint import (
    Constraint,
    Requirement,
    split_extra,
)
from composable.packaging.versions.version import Version


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """One version for every package that is wanted or needed.

    Args:
        packages: The version by name, sorted by name; interfaces are not among them.
        wanted_by: For each name who asked for it, with the range: the user, as `""`, packages, or
            packages with an extra, as `german[code]`.
        extras: The extras that are asked for, sorted, by package; packages without any are left
            out.
    """

    packages: Mapping[str, Version]
    wanted_by: Mapping[str, Sequence[tuple[str, Constraint]]]
    extras: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def resolve(universe: Universe, *, solver: Solver | None = None) -> Resolution:
    """Choose one version for every package of a universe that is wanted or needed.

    Args:
        universe: What there is, what is wanted and what is locked.
        solver: The search; PubGrub by default.

    Raises:
        ResolutionError: When no choice will do; the message tells why and what would.
    """
    return resolve_from(
        universe,
        universe.requires,
        interface=universe.interface,
        locked=universe.locked,
        solver=solver,
    )


def resolve_from(
    source: CandidateSource,
    requires: Sequence[Requirement],
    *,
    interface: Mapping[str, Version] | None = None,
    locked: Mapping[str, Version] | None = None,
    solver: Solver | None = None,
) -> Resolution:
    """Choose one version for every package that is wanted or needed.

    Args:
        source: Where candidates are found.
        requires: What the user wants.
        interface: Version of each router interface; None when interfaces are not checked.
        locked: Versions to keep where they are allowed.
        solver: The search; PubGrub by default.

    Raises:
        ResolutionError: When no choice will do; the message tells why and what would.
    """
    solver = solver or PubGrub()
    problem = ResolutionProblem(source, requires, interface, locked or {})
    answer = solver.solve(problem)
    if isinstance(answer, Proof):
        from composable.packaging.resolution.explain import explain_failure

        raise ResolutionError(explain_failure(problem, answer, solver))
    chosen = {
        name: problem.table(name).candidates[choice]
        for name, choice in sorted(answer.items())
        if not name.startswith(INTERFACE_PREFIX)
    }
    packages = {name: c.version for name, c in chosen.items() if split_extra(name)[1] is None}
    wanted_by: dict[str, list[tuple[str, Constraint]]] = {name: [] for name in packages}
    extras: dict[str, set[str]] = {}
    for requirement in requires:
        wanted_by[requirement.name].append(("", requirement.constraint))
        if requirement.extras:
            extras.setdefault(requirement.name, set()).update(requirement.extras)
    for name, candidate in chosen.items():
        for other, range_ in sorted(candidate.requires.items()):
            wanted_by[other].append((name, range_))
    return Resolution(
        packages=packages,
        wanted_by=wanted_by,
        extras={name: tuple(sorted(wanted)) for name, wanted in sorted(extras.items())},
    )
