"""Whether an expert does its work worse than an older release of it, on the same text.

Figures of a card are means over few documents, so they move whenever an expert is trained again.
What counts as worse is what is worse beyond that noise: documents are compared one by one.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from composable.vetting.checks import Evidence
from composable.vetting.evaluation import Score
from composable.vetting.statistics import CONFIDENCE, is_above

# Less than this share of an older release's bits per byte does not matter to anyone ...
MAX_REGRESSION: Final = 0.005
# ... and neither does less than this share of the anchor's tokens.
MAX_MORE_TAKEN: Final = 0.01
_RUNS: Final = {
    "own_expert": "its own text, always on",
    "own_mix": "its own text, in mix mode",
    "anchor_mix": "public text, in mix mode",
}


def compare_evidence(old: Evidence, new: Evidence) -> list[str]:
    """Return what a new release does worse than an older one, beyond noise, in words.

    Worse is a mean over documents whose paired difference is above zero by a one-sided t test
    (`statistics.is_above`) and above what matters at all.

    Args:
        old: Evidence of the older release.
        new: Evidence of the new one, on the same documents.
    """
    found = []
    for run, what in _RUNS.items():
        before, after = old.scores[run], new.scores[run]
        limit = MAX_REGRESSION * before.bits_per_byte
        if is_above(_bits(after) - _bits(before), limit):
            found.append(
                f"{before.bits_per_byte:.3f} to {after.bits_per_byte:.3f} bits per byte on {what} "
                f"({len(after.nats)} documents, more at {CONFIDENCE:.0%} confidence)"
            )
    if is_above(new.taken_N - old.taken_N, MAX_MORE_TAKEN):
        found.append(
            f"{old.taken_N.mean():.1%} to {new.taken_N.mean():.1%} of public text taken "
            f"({len(new.taken_N)} documents, more at {CONFIDENCE:.0%} confidence)"
        )
    return found


def _bits(score: Score) -> np.ndarray:
    """Return the bits per byte of every document."""
    return score.nats / score.n_bytes / np.log(2)
