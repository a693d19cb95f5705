"""What was merged, what was tried, and what the evidence says of it. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from composable.merging.methods import Candidate
from composable.vetting.noninferiority import Outcome

Part = Literal["body", "scout"]
PARTS: Final[tuple[Part, ...]] = ("body", "scout")
# Keeps every side as it is: the merged release requires them all.
GROUP: Final = "group"


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What the evidence says of one candidate for one part.

    Args:
        method: Its method.
        scale: Factor of the mean of the sides' updates.
        setting: What else the method has.
        changes: By text, the loss as a share of that of the best side there, minus one: measured,
            or predicted from the statistics of the side whose text it is.
    """

    method: str
    scale: float
    setting: float | None
    changes: dict[str, float]

    @property
    def worst(self) -> float:
        """The change on the text where it is largest."""
        return max(self.changes.values())

    @property
    def mean(self) -> float:
        """The mean change over texts."""
        return float(np.mean(list(self.changes.values())))

    @property
    def candidate(self) -> Candidate:
        """The method with its settings."""
        return Candidate(method=self.method, scale=self.scale, setting=self.setting)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the evidence shows of the merged expert, compared with a side on a text.

    Args:
        text: The text.
        side: The side that it is compared with.
        before: Loss of the side: bits per byte in mix mode, or from its statistics nats per token
            of its body.
        after: The same of the merged expert.
        outcome: Whether it is shown to be not worse, or worse, or neither.
        low: Lower 95 % confidence bound of the change, as a share; None from statistics, and where
            there is too little text for one.
        high: The upper one.
        documents: Documents that it was measured on; 0 from statistics.
        needed: Documents that would decide, if changes of further ones are like those of these; 0
            if it is decided.
    """

    text: str
    side: str
    before: float
    after: float
    outcome: Outcome
    low: float | None = None
    high: float | None = None
    documents: int = 0
    needed: int = 0

    @property
    def change(self) -> float:
        """The change as a share of the side's loss."""
        return self.after / self.before - 1


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """How much the sides' updates of one matrix disagree.

    Args:
        name: `body.slots.LAYER.MATRIX` or `scout.MATRIX`.
        cosine: Least cosine of two sides' updates.
        opposed: Largest share of a pair's weights whose changes have opposite signs, by magnitude.
        losses: With statistics, by side: predicted growth of its loss in nats per token.
    """

    name: str
    cosine: float
    opposed: float
    losses: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged, what was tried, and what the evidence says.

    Args:
        base: The release that all sides derive from.
        sides: The sides.
        evidence: `statistics` or `text`.
        tried: By part, every candidate, best first.
        chosen: By part, the best candidate in words, or `group` for both.
        judgements: Of the chosen one, by text and side.
        conflicts: Of every matrix.
        release: The proposed release.
        declined: Judgements on the best merged expert, if a group was judged in its place.
    """

    base: str
    sides: tuple[str, ...]
    evidence: Literal["statistics", "text"]
    tried: dict[str, tuple[Tried, ...]]
    chosen: dict[str, str]
    judgements: tuple[Judgement, ...]
    conflicts: tuple[Conflict, ...]
    release: str
    declined: tuple[Judgement, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether the chosen one is shown to be not worse than any side on any text."""
        return all(judgement.outcome == "not worse" for judgement in self.judgements)


def describe_judgement(row: Judgement) -> str:
    """Return what was found in words.

    Args:
        row: The judgement.

    Example:
        >>> describe_judgement(
        ...     Judgement(
        ...         text="proofs",
        ...         side="ours@1.0",
        ...         before=2.0,
        ...         after=2.01,
        ...         outcome="undecided",
        ...         low=-0.02,
        ...         high=0.03,
        ...         documents=15,
        ...         needed=80,
        ...     )
        ... )
        '2.000 to 2.010 on proofs against ours@1.0 (-2.0% to +3.0%, 15 documents, about 80 needed)'
    """
    notes = []
    if row.low is not None and row.high is not None:
        notes.append(f"{row.low:+.1%} to {row.high:+.1%}")
    if row.documents:
        notes.append(f"{row.documents} document{'s' * (row.documents > 1)}")
    if row.needed:
        notes.append(f"about {row.needed} needed")
    found = f"{row.before:.3f} to {row.after:.3f} on {row.text} against {row.side}"
    return f"{found} ({', '.join(notes)})" if notes else found
