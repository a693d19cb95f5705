"""Whether an expert that replaces another is shown to be no worse than it: the rule of merges.

The burden of proof is on the replacement. A test that looks for harm passes whatever is compared on
too little text; here, too little text shows nothing. How a release compares with the previous one,
where the burden is the other way round, is in `regression.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from scipy.special import stdtrit

from composable.vetting.statistics import CONFIDENCE, ratio_interval

# A loss that grows by less than this share counts as no worse.
MARGIN: Final = 0.01
# Where a fifth of all documents are much worse, this many include none of those with a probability
# of 0.8^15 = 3.5 %. Fewer can be alike by chance, and Student's t takes that for certainty.
MIN_DOCUMENTS: Final = 15
# Documents that are reported as needed, at most.
_MAX_NEEDED: Final = 1 << 20

Outcome = Literal["not worse", "worse", "undecided"]


@dataclass(frozen=True, kw_only=True)
class LossChange:
    """How the loss on a text changes if one expert replaces another.

    Args:
        change: The change as a share of the loss that is replaced.
        low: Lower one-sided 95 % confidence bound of it.
        high: Upper one-sided 95 % confidence bound.
        documents: Documents that it was measured on.
    """

    change: float
    low: float
    high: float
    documents: int

    @property
    def outcome(self) -> Outcome:
        """What is shown: not worse if the upper bound is below the margin.

        Otherwise it is worse if the lower bound is above zero. With fewer than `MIN_DOCUMENTS`
        nothing is shown.
        """
        if not np.isfinite(self.change):
            return "worse"
        if self.documents < MIN_DOCUMENTS:
            return "undecided"
        if self.high < MARGIN:
            return "not worse"
        return "worse" if self.low > 0 else "undecided"

    @property
    def needed(self) -> int:
        """Documents that decide, if change and spread over documents stay as they are.

        Example:
            >>> LossChange(change=0.0, low=-0.02, high=0.02, documents=20).needed
            75
            >>> LossChange(change=0.03, low=-0.01, high=0.07, documents=20).needed
            35
        """
        if not np.isfinite(self.high):
            return MIN_DOCUMENTS
        spread = (self.high - self.low) / 2 / _half_width(self.documents)
        # Bounds so near to the change exclude either the margin or no change at all.
        wanted = max(MARGIN - self.change, self.change)
        low, high = MIN_DOCUMENTS - 1, _MAX_NEEDED
        while high - low > 1:
            middle = (low + high) // 2
            enough = spread * _half_width(middle) < wanted
            low, high = (low, middle) if enough else (middle, high)
        return high


def compare_losses(before_B: np.ndarray, after_B: np.ndarray) -> LossChange:
    """Compare the losses of two experts on the same documents.

    One document is one observation, however long it is: what is written in one document is alike,
    and blocks of it would count the same twice.

    Args:
        before_B: Loss of the expert that is replaced on each document, in nats.
        after_B: Loss of the one that replaces it.

    References:
        Blackwelder 1982, "Proving the null hypothesis" in clinical trials.

    Example:
        >>> before_B = np.linspace(90, 110, 20)
        >>> compare_losses(before_B, 1.001 * before_B).outcome
        'not worse'
        >>> compare_losses(before_B, 1.05 * before_B).outcome
        'worse'
        >>> compare_losses(before_B[:5], 1.001 * before_B[:5]).outcome
        'undecided'
    """
    # The ends of a two-sided interval of 90 % are one-sided bounds of 95 %.
    low, high = ratio_interval(after_B, before_B, 2 * CONFIDENCE - 1)
    return LossChange(
        change=float(after_B.sum() / before_B.sum()) - 1,
        low=low - 1,
        high=high - 1,
        documents=len(before_B),
    )


def _half_width(n: int) -> float:
    """Return the half width of the interval of a mean of n values with standard deviation 1."""
    return float(stdtrit(n - 1, CONFIDENCE) / np.sqrt(n))
