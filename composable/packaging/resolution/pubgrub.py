"""The PubGrub algorithm of nab-resolver, behind the `Solver` port.

The provider here answers nab-resolver's questions from a `Problem`. What a choice needs and
conflicts with is sent as incompatibilities, each once. Policy, such as which choice is best, is the
problem's.

References:
    Weizenbaum, "PubGrub: Next-Generation Version Solving", 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from nab_resolver import errors
from nab_resolver.resolver import BaseProvider, Resolver, ResolverObserver
from nab_resolver.types import Incompatibility, IncompatibilityCause, RootRequirement, Term

from composable.errors import ResolutionError
from composable.packaging.resolution.solver import ChoiceSet, Fact, Problem, Proof

MAX_ROUNDS: Final = 1_000_000_000  # never give up where a solution exists
LOOK_AHEAD_AFTER: Final = 10  # conflicts; looking ahead does not pay off on easier problems

_Incompatibility: TypeAlias = Incompatibility[str, int]


class PubGrub:
    """The PubGrub algorithm of nab-resolver."""

    def solve(self, problem: Problem) -> dict[str, int] | Proof:
        """Return a choice for every name that is wanted or needed, or a proof that none exists.

        Raises:
            ResolutionError: When the solver itself fails, which is a bug.
        """
        conflicts = _ConflictCounter()
        resolver: Resolver[str, int] = Resolver(
            _Provider(problem, conflicts),
            conflicts,
            max_iterations=MAX_ROUNDS,
            range_type=ChoiceSet,
        )
        try:
            roots = [RootRequirement(name, wanted) for name, wanted in problem.roots()]
            return dict(resolver.solve(roots).pins)
        except errors.ResolutionTerminatedError as error:
            raise ResolutionError(
                f"the solver failed: {error}",
                hint="this is a bug in composable; please report it",
            ) from error
        except errors.ResolutionError as error:
            assert error.incompatibility is not None  # only a terminated search has no proof
            return Proof(_collect_facts(error.incompatibility))


class _ConflictCounter(ResolverObserver[str, int]):
    """Counts the conflicts of a search, as a measure of how hard the problem is."""

    def __init__(self) -> None:
        self.n_conflicts = 0

    def on_conflict(self, incompatibility: _Incompatibility) -> None:
        self.n_conflicts += 1


class _Provider(BaseProvider[str, int]):
    """A problem, as nab-resolver asks for it.

    Args:
        problem: The problem.
        conflicts: The observer that counts the conflicts of the same search.
    """

    def __init__(self, problem: Problem, conflicts: _ConflictCounter) -> None:
        self._problem = problem
        self._conflicts = conflicts
        self._pending: list[_Incompatibility] = []  # the resolver collects these next
        self._queued: dict[str, list[_Incompatibility]] = {}  # found by looking ahead, by package
        self._described: set[tuple[str, int]] = set()
        self._looked_ahead: dict[str, int] = {}  # bits of the choices examined, by package

    def choose_version(self, package: str, version_range: Any) -> int | None:
        """Return the best choice, or None while clauses about it are pending."""
        # Send what the choice needs before it is made. Propagation then rules it out at once if
        # that is impossible; made first, the choice would have to be undone by a long backjump.
        self._pending = self._queued.pop(package, [])
        best = self._problem.best(package, version_range)
        if best is not None:
            self._pending += self._describe_choice(package, best)
        return None if self._pending else best

    def consume_pending_clauses(self) -> list[_Incompatibility]:
        """Return the clauses that `choose_version` left pending, once."""
        pending, self._pending = self._pending, []
        return pending

    def has_satisfying_version(self, package: str, version_range: Any) -> bool:
        """Return whether any choice is allowed."""
        return self._problem.best(package, version_range) is not None

    def get_dependencies(self, package: str, version: int) -> Mapping[str, Any]:
        """Return what a choice needs."""
        return self._problem.needs(package, version)

    def widen_decision(self, package: str, version: int) -> Any:
        """Return the choices that what is learned about this one holds for too."""
        return self._problem.alike(package, version)

    def prioritize(
        self,
        package: str,
        version_range: Any,
        conflict_counts: Mapping[str, int],
        culprit_counts: Mapping[str, int] | None = None,
    ) -> Any:
        """Return the sort key of which package to decide next, lowest first."""
        self._look_ahead(package, version_range)
        if package in self._queued:
            return ()  # before all others: sending clauses decides nothing
        return self._problem.decision_key(package, version_range)

    def _look_ahead(self, package: str, allowed: ChoiceSet) -> None:
        """Queue the needs and conflicts of all allowed choices, not only of the best one.

        With them propagation sees a dead end when it arises, not hundreds of decisions later. The
        extra time pays off only on problems that have proved to be hard.
        """
        unexamined = allowed.bits & ~self._looked_ahead.get(package, 0)
        if not unexamined or self._conflicts.n_conflicts < LOOK_AHEAD_AFTER:
            return
        self._looked_ahead[package] = self._looked_ahead.get(package, 0) | unexamined
        for choice in self._problem.choices_among_known(package, ChoiceSet(unexamined)):
            clauses = self._describe_choice(package, choice)
            if clauses:
                self._queued.setdefault(package, []).extend(clauses)

    def _describe_choice(self, package: str, choice: int) -> list[_Incompatibility]:
        """Return what a choice, and those like it, needs and conflicts with; empty if repeated."""
        if (package, choice) in self._described:
            return []
        alike = self._problem.alike(package, choice)
        self._described.update((package, other) for other in alike)
        needs = self._problem.needs(package, choice)
        conflicts = self._problem.conflicts(package, choice)
        return [
            Incompatibility(
                [Term(package, alike), Term(name, choices, positive=is_conflict)],
                IncompatibilityCause.DEPENDENCY,
            )
            for others, is_conflict in ((needs, False), (conflicts, True))
            for name, choices in others.items()
            if name != package
        ]


def _collect_facts(root: Incompatibility[Any, Any]) -> tuple[Fact, ...]:
    """Return the leaves of a derivation, each once, left causes first."""
    leaves = (node for node in root.walk() if node.cause is not IncompatibilityCause.DERIVED)
    return tuple(dict.fromkeys(map(_read_fact, leaves)))


def _read_fact(leaf: Incompatibility[Any, Any]) -> Fact:
    """Return an incompatibility that is not derived from others as a fact."""
    first, last = leaf.terms[0], leaf.terms[-1]
    choices, last_choices = _as_set(first.constraint), _as_set(last.constraint)
    if leaf.cause is IncompatibilityCause.ROOT:
        return Fact(kind="root", name=last.package, choices=last_choices)
    if leaf.cause is not IncompatibilityCause.DEPENDENCY:
        return Fact(kind="none", name=first.package, choices=choices)
    if len(leaf.terms) == 1:  # a package that needs another version of itself
        itself, allowed = first.package, _as_set(leaf.dependency_range)
        return Fact(kind="need", name=itself, choices=choices, other=itself, allowed=allowed)
    return Fact(
        kind="conflict" if last.is_positive() else "need",
        name=first.package,
        choices=choices,
        other=last.package,
        allowed=last_choices,
    )


def _as_set(range_: object) -> ChoiceSet:
    assert isinstance(range_, ChoiceSet)  # the resolver is given no other kind
    return range_
