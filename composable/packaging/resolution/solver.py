"""The port to a version solver, and PubGrub behind it.

A solver knows no packages, ranges or registries. It sees names and, for each name, small integers
to choose from, in sets; the `Problem` says which sets are wanted and which choice is best.

References:
    Weizenbaum, "PubGrub: Next-Generation Version Solving", 2018.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, Protocol

from composable.errors import ResolutionError

if TYPE_CHECKING:
    from nab_resolver.types import Incompatibility

MAX_ROUNDS: Final = 1_000_000_000  # never give up where a solution exists
LOOK_AHEAD_AFTER: Final = 10  # conflicts; problems with fewer are not worth it
MAX_KEPT_SETS: Final = 1 << 16


class ChoiceSet:
    """A set of the choices for one name, as the bits of an integer.

    A Python integer has sign bits without end, so complements are exact: `~0` is every choice
    there is or could be, and set algebra is integer algebra. Equal sets are one object where that
    can be had cheaply, for nab-resolver remembers by identity what it has worked out.

    Args:
        bits: Bit i is set when choice i is in the set.
    """

    __slots__ = ("bits",)
    _kept: ClassVar[dict[int, ChoiceSet]] = {}

    bits: int

    def __new__(cls, bits: int = 0) -> ChoiceSet:
        """Return the set, the same object as before if it is still kept."""
        found = cls._kept.get(bits)
        if found is None:
            if len(cls._kept) >= MAX_KEPT_SETS:
                cls._kept.clear()
            found = cls._kept[bits] = object.__new__(cls)
            found.bits = bits
        return found

    @classmethod
    def empty(cls) -> ChoiceSet:
        """Return the set of no choice."""
        return cls(0)

    @classmethod
    def full(cls) -> ChoiceSet:
        """Return the set of all choices."""
        return cls(-1)

    @classmethod
    def singleton(cls, choice: int) -> ChoiceSet:
        """Return the set of one choice."""
        return cls(1 << choice)

    @property
    def is_empty(self) -> bool:
        """Whether no choice is in the set."""
        return not self.bits

    def is_subset(self, other: ChoiceSet) -> bool:
        """Say whether all choices here are in `other`."""
        return not self.bits & ~other.bits

    def is_superset(self, other: ChoiceSet) -> bool:
        """Say whether all choices in `other` are here."""
        return not other.bits & ~self.bits

    def is_disjoint(self, other: ChoiceSet) -> bool:
        """Say whether no choice is in both."""
        return not self.bits & other.bits

    def relation(self, other: ChoiceSet) -> Relation:
        """Say both of `is_subset` and `is_disjoint`."""
        return _RELATIONS[not self.bits & ~other.bits][not self.bits & other.bits]

    def __iter__(self) -> Iterator[int]:
        """Yield the choices of a finite set, lowest first."""
        bits = self.bits
        while bits > 0:
            lowest = bits & -bits
            yield lowest.bit_length() - 1
            bits ^= lowest

    def __contains__(self, choice: int) -> bool:
        return bool(self.bits >> choice & 1)

    def __and__(self, other: object) -> ChoiceSet:
        return ChoiceSet(self.bits & other.bits) if isinstance(other, ChoiceSet) else NotImplemented

    def __or__(self, other: object) -> ChoiceSet:
        return ChoiceSet(self.bits | other.bits) if isinstance(other, ChoiceSet) else NotImplemented

    def __sub__(self, other: object) -> ChoiceSet:
        if not isinstance(other, ChoiceSet):
            return NotImplemented
        return ChoiceSet(self.bits & ~other.bits)

    def __invert__(self) -> ChoiceSet:
        return ChoiceSet(~self.bits)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ChoiceSet) and self.bits == other.bits)

    def __hash__(self) -> int:
        return hash(self.bits)

    def __repr__(self) -> str:
        return f"ChoiceSet({self.bits:#b})"


class Relation(NamedTuple):
    """How the members of one set sit against another's."""

    is_subset: bool
    is_disjoint: bool


_RELATIONS: Final = (
    (Relation(False, False), Relation(False, True)),
    (Relation(True, False), Relation(True, True)),
)


class Problem(Protocol):
    """What a solver is asked to solve. Every answer must stay the same throughout."""

    def roots(self) -> Sequence[tuple[str, ChoiceSet]]:
        """Return what is wanted; a name may be there more than once."""

    def best(self, name: str, allowed: ChoiceSet) -> int | None:
        """Return the best choice that is allowed, or None when none is."""

    def needs(self, name: str, choice: int) -> Mapping[str, ChoiceSet]:
        """Return what a choice needs; a set without a real choice is not empty, but unchoosable."""

    def conflicts(self, name: str, choice: int) -> Mapping[str, ChoiceSet]:
        """Return what a choice cannot stand beside, if it is there at all."""

    def alike(self, name: str, choice: int) -> ChoiceSet:
        """Return the choices with the same needs and conflicts as this one, itself included."""

    def foresee(self, name: str, allowed: ChoiceSet) -> Iterable[int]:
        """Return the allowed choices whose needs are on names that were met before."""

    def urgency(self, name: str, allowed: ChoiceSet) -> tuple[int, ...]:
        """Return a sort key of which name to decide next, lowest first."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact that a proof of unsolvability rests on.

    Args:
        kind: `root`, something wanted; `need`, what choices need; `conflict`, what they cannot
            stand beside; `none`, that nothing can be chosen from a set.
        name: The name it is about.
        choices: The choices of that name it is about; those wanted for `root`.
        other: The name needed or in conflict.
        allowed: The choices of `other` that are needed or in conflict.
    """

    kind: Literal["root", "need", "conflict", "none"]
    name: str
    choices: ChoiceSet
    other: str = ""
    allowed: ChoiceSet | None = None


@dataclass(frozen=True)
class Proof:
    """Why a problem has no solution.

    Args:
        facts: What it rests on, each once, in the order of the derivation.
    """

    facts: tuple[Fact, ...]


class Solver(Protocol):
    """The port: anything that can solve a problem."""

    def solve(self, problem: Problem) -> dict[str, int] | Proof:
        """Return a choice for every name that is wanted or needed, or why there is none."""


class PubGrub:
    """The PubGrub algorithm of nab-resolver."""

    def solve(self, problem: Problem) -> dict[str, int] | Proof:
        """Return a choice for every name that is wanted or needed, or why there is none.

        Raises:
            ResolutionError: When the solver itself fails, which no problem should make it do.
        """
        from nab_resolver import errors
        from nab_resolver.resolver import Resolver
        from nab_resolver.types import RootRequirement

        provider = _make_provider(problem)
        resolver: Resolver[str, int] = Resolver(
            provider, provider.observer, max_iterations=MAX_ROUNDS, range_type=ChoiceSet
        )
        try:
            roots = [RootRequirement(name, wanted) for name, wanted in problem.roots()]
            return dict(resolver.solve(roots).pins)
        except errors.ResolutionTerminatedError as error:
            raise ResolutionError(
                f"the solver failed: {error}",
                hint="this is a fault of composable; please report it",
            ) from error
        except errors.ResolutionError as error:
            assert error.incompatibility is not None  # only a terminated one has no proof
            return Proof(_collect_facts(error.incompatibility))


def _make_provider(problem: Problem) -> Any:
    """Return the problem in the words of nab-resolver."""
    from nab_resolver.resolver import BaseProvider, ResolverObserver
    from nab_resolver.types import Incompatibility, IncompatibilityCause, Term

    class Observer(ResolverObserver[str, int]):
        def __init__(self) -> None:
            self.n_conflicts = 0

        def on_conflict(self, incompatibility: Incompatibility[str, int]) -> None:
            self.n_conflicts += 1

    class Provider(BaseProvider[str, int]):
        def __init__(self) -> None:
            self.observer = Observer()
            self.pending: list[Incompatibility[str, int]] = []
            self.told: set[tuple[str, int]] = set()
            self.foreseen: dict[str, int] = {}
            self.untold: dict[str, list[Incompatibility[str, int]]] = {}

        def choose_version(self, package: str, version_range: Any) -> int | None:
            # Tell what the choice needs before it is made. Propagation then drops it at once if
            # that cannot be had; made first, it would have to be unmade by a long jump back.
            self.pending = self.untold.pop(package, [])
            best = problem.best(package, version_range)
            if best is not None:
                self.pending += self.facts_about(package, best)
            return None if self.pending else best

        def look_ahead(self, package: str, allowed: ChoiceSet) -> bool:
            """Say whether there is more to tell than what the best choice needs.

            Once told, propagation sees a dead end when it arises, not hundreds of decisions later.
            That is worth its time only on problems that have shown to be hard.
            """
            unforeseen = allowed.bits & ~self.foreseen.get(package, 0)
            if unforeseen and self.observer.n_conflicts >= LOOK_AHEAD_AFTER:
                self.foreseen[package] = self.foreseen.get(package, 0) | unforeseen
                for choice in problem.foresee(package, ChoiceSet(unforeseen)):
                    facts = self.facts_about(package, choice)
                    if facts:
                        self.untold.setdefault(package, []).extend(facts)
            return package in self.untold

        def facts_about(self, package: str, choice: int) -> list[Incompatibility[str, int]]:
            """Return what a choice and those like it need and cannot stand beside, once."""
            if (package, choice) in self.told:
                return []
            alike = problem.alike(package, choice)
            self.told.update((package, other) for other in alike)
            facts = [
                (name, wanted, False) for name, wanted in problem.needs(package, choice).items()
            ]
            facts += [(name, bad, True) for name, bad in problem.conflicts(package, choice).items()]
            return [
                Incompatibility(
                    [Term(package, alike), Term(name, choices, positive=is_positive)],
                    IncompatibilityCause.DEPENDENCY,
                )
                for name, choices, is_positive in facts
                if name != package
            ]

        def consume_pending_clauses(self) -> list[Incompatibility[str, int]]:
            pending, self.pending = self.pending, []
            return pending

        def has_satisfying_version(self, package: str, version_range: Any) -> bool:
            return problem.best(package, version_range) is not None

        def get_dependencies(self, package: str, version: int) -> Mapping[str, Any]:
            return problem.needs(package, version)

        def widen_decision(self, package: str, version: int) -> Any:
            return problem.alike(package, version)

        def prioritize(
            self,
            package: str,
            version_range: Any,
            conflict_counts: Mapping[str, int],
            culprit_counts: Mapping[str, int] | None = None,
        ) -> Any:
            if self.look_ahead(package, version_range):
                return ()  # before all others: telling decides nothing
            return problem.urgency(package, version_range)

    return Provider()


def _collect_facts(root: Incompatibility[Any, Any]) -> tuple[Fact, ...]:
    """Return the leaves of a derivation, each once, left causes first."""
    from nab_resolver.types import IncompatibilityCause

    facts: dict[Fact, None] = {}
    for node in root.walk():
        if node.cause is IncompatibilityCause.DERIVED:
            continue
        first, last = node.terms[0], node.terms[-1]
        choices, last_choices = _as_set(first.constraint), _as_set(last.constraint)
        if node.cause is IncompatibilityCause.ROOT:
            fact = Fact(kind="root", name=last.package, choices=last_choices)
        elif node.cause is not IncompatibilityCause.DEPENDENCY:
            fact = Fact(kind="none", name=first.package, choices=choices)
        elif len(node.terms) == 1:  # a package that needs another version of itself
            itself, allowed = first.package, _as_set(node.dependency_range)
            fact = Fact(kind="need", name=itself, choices=choices, other=itself, allowed=allowed)
        else:
            fact = Fact(
                kind="conflict" if last.is_positive() else "need",
                name=first.package,
                choices=choices,
                other=last.package,
                allowed=last_choices,
            )
        facts[fact] = None
    return tuple(facts)


def _as_set(range_: object) -> ChoiceSet:
    assert isinstance(range_, ChoiceSet)  # no other kind was given to the resolver
    return range_
