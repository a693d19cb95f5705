"""From requirements and candidates to one version of every package, or an explanation why not.

The policy (in `problem`): the router interface is a package of its own; candidates that fit it are
preferred, then the newest; a locked version is kept while it is allowed; yanked versions are chosen
only when locked or pinned exactly by the user; a candidate with a refusal never is. The search is
the solver's.

A package with an extra, `german[code]`, is a separate name to the solver. Its choices are those
of `german` that have the extra; each needs the same choice of `german` and what the extra adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from composable.errors import ResolutionError
from composable.packaging.resolution.problem import ResolutionProblem
from composable.packaging.resolution.solver import Proof, Solver
from composable.packaging.resolution.universe import (
    INTERFACE_PREFIX,
    Candidate,
    CandidateSource,
    Universe,
)
from composable.packaging.versions.constraint import Constraint, Requirement, split_extra
from composable.packaging.versions.version import Version


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """One version for every package that is wanted or needed.

    Args:
        packages: The version by name, sorted by name, without interfaces.
        wanted_by: For each name, what requires it and with which range: the user, as `""`,
            packages, or packages with an extra, as `german[code]`.
        extras: The extras that are required, sorted, by package; only packages with extras.

    Example:
        >>> universe = Universe.from_dict(
        ...     {"packages": {"german": {"1.0.0": {}}}, "requires": {"german": "^1"}}
        ... )
        >>> resolve(universe).wanted_by["german"]
        [('', Constraint('^1'))]
    """

    packages: Mapping[str, Version]
    wanted_by: Mapping[str, Sequence[tuple[str, Constraint]]]
    extras: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def resolve(universe: Universe, *, solver: Solver | None = None) -> Resolution:
    """Choose one version for every package of a universe that is wanted or needed.

    Args:
        universe: Candidates, requirements and locked versions.
        solver: The search; PubGrub by default.

    Raises:
        ResolutionError: When there is no solution; the message explains why and suggests changes.

    Example:
        >>> universe = Universe.from_dict(
        ...     {
        ...         "packages": {
        ...             "german": {"1.0.0": {"requires": {"european": "^1"}}},
        ...             "european": {"1.1.0": {}, "2.0.0": {}},
        ...         },
        ...         "requires": {"german": "*"},
        ...     }
        ... )
        >>> {name: str(version) for name, version in resolve(universe).packages.items()}
        {'european': '1.1.0', 'german': '1.0.0'}
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
        source: Where candidates come from.
        requires: What the user requires.
        interface: Version of each router interface; None when interfaces are not checked.
        locked: Versions to keep where they are allowed.
        solver: The search; PubGrub by default.

    Raises:
        ResolutionError: When there is no solution; the message explains why and suggests changes.
    """
    if solver is None:
        from composable.packaging.resolution.pubgrub import PubGrub

        solver = PubGrub()
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
    return _read_resolution(requires, chosen)


def _read_resolution(
    requires: Sequence[Requirement], chosen: Mapping[str, Candidate]
) -> Resolution:
    """Return the resolution that chosen candidates stand for, packages with extras included."""
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
