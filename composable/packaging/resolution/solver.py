"""The port to a version solver: the problem that it reads and the proof that it may return.

A solver knows no packages, ranges or registries. It sees names and, for each name, small integers
to choose from, in sets; the `Problem` defines which sets are wanted and which choice is best. The
search itself is in `pubgrub`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, NamedTuple, Protocol

MAX_KEPT_SETS: Final = 1 << 16


class ChoiceSet:
    """A set of the choices for one name, as the bits of an integer.

    A Python integer has infinitely many sign bits, so complements are exact: `~0` contains every
    possible choice, and set algebra is integer algebra. Equal sets are the same object where that
    is cheap, because nab-resolver caches its results by identity.

    Args:
        bits: Bit i is set when choice i is in the set.
    """

    __slots__ = ("bits",)
    _kept: ClassVar[dict[int, ChoiceSet]] = {}

    bits: int

    def __new__(cls, bits: int = 0) -> ChoiceSet:
        """Return the set, as the same object if it is still cached."""
        found = cls._kept.get(bits)
        if found is None:
            if len(cls._kept) >= MAX_KEPT_SETS:
                cls._kept.clear()
            found = cls._kept[bits] = object.__new__(cls)
            found.bits = bits
        return found

    @classmethod
    def empty(cls) -> ChoiceSet:
        """Return the empty set."""
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
        """Return whether all choices in this set are in `other`."""
        return not self.bits & ~other.bits

    def is_superset(self, other: ChoiceSet) -> bool:
        """Return whether all choices in `other` are in this set."""
        return not other.bits & ~self.bits

    def is_disjoint(self, other: ChoiceSet) -> bool:
        """Return whether no choice is in both sets."""
        return not self.bits & other.bits

    def relation(self, other: ChoiceSet) -> Relation:
        """Return `is_subset` and `is_disjoint` together."""
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
    """How one set relates to another."""

    is_subset: bool
    is_disjoint: bool


_RELATIONS: Final = (
    (Relation(False, False), Relation(False, True)),
    (Relation(True, False), Relation(True, True)),
)


class Problem(Protocol):
    """What a solver is asked to solve. Each method must always return the same answer."""

    def roots(self) -> Sequence[tuple[str, ChoiceSet]]:
        """Return what is wanted; a name may appear more than once."""

    def best(self, name: str, allowed: ChoiceSet) -> int | None:
        """Return the best choice that is allowed, or None when none is."""

    def needs(self, name: str, choice: int) -> Mapping[str, ChoiceSet]:
        """Return what a choice needs, by name; no set may be empty, even if it is unsatisfiable."""

    def conflicts(self, name: str, choice: int) -> Mapping[str, ChoiceSet]:
        """Return what a choice conflicts with, should it be chosen too."""

    def alike(self, name: str, choice: int) -> ChoiceSet:
        """Return the choices with the same needs and conflicts as this one, itself included."""

    def choices_among_known(self, name: str, allowed: ChoiceSet) -> Iterable[int]:
        """Return the allowed choices that need and conflict with only names already seen."""

    def decision_key(self, name: str, allowed: ChoiceSet) -> tuple[int, ...]:
        """Return the sort key of which name to decide next, lowest first."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact that a proof of unsolvability rests on.

    Args:
        kind: `root`, something wanted; `need`, what choices need; `conflict`, what they conflict
            with; `none`, that nothing can be chosen from a set.
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
        facts: The facts that the proof rests on, each once, in the order of the derivation.
    """

    facts: tuple[Fact, ...]


class Solver(Protocol):
    """The port: any algorithm that can solve a problem."""

    def solve(self, problem: Problem) -> dict[str, int] | Proof:
        """Return a choice for every name that is wanted or needed, or a proof that none exists."""
