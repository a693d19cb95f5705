"""What was merged, what was tried, and what the evidence says of it. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from composable.merging.methods import Candidate

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
    """Whether the merged expert is worse than a side on a text.

    Args:
        text: The text.
        side: The side that it is compared with.
        before: Loss of the side: bits per byte in mix mode, or from its statistics nats per token
            of its body.
        after: The same of the merged expert.
        is_worse: Whether it is worse beyond noise and beyond what matters.
    """

    text: str
    side: str
    before: float
    after: float
    is_worse: bool


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
    """

    base: str
    sides: tuple[str, ...]
    evidence: Literal["statistics", "text"]
    tried: dict[str, tuple[Tried, ...]]
    chosen: dict[str, str]
    judgements: tuple[Judgement, ...]
    conflicts: tuple[Conflict, ...]
    release: str

    @property
    def is_good(self) -> bool:
        """Whether the chosen one is worse than no side on any text."""
        return not any(judgement.is_worse for judgement in self.judgements)
