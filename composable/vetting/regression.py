"""Whether an expert is worse than a previous release of it, on the same text.

The figures of a card are means over few documents, so they change whenever an expert is trained
again. Documents are therefore compared one by one, and only a change beyond that noise is reported.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from composable.vetting.evaluation import Score
from composable.vetting.evidence import Evidence
from composable.vetting.statistics import CONFIDENCE, is_above

# An increase below this share of the previous release's bits per byte does not matter ...
MAX_REGRESSION: Final = 0.005
# ... and neither does an increase below this share of the anchor's tokens.
MAX_MORE_ROUTED: Final = 0.01
_RUNS: Final = {
    "own_expert": "its own text, always on",
    "own_mix": "its own text, in mix mode",
    "anchor_mix": "public text, in mix mode",
}


def compare_evidence(previous: Evidence, new: Evidence) -> list[str]:
    """Return how a new release is worse than a previous one, beyond noise, in words.

    A figure is worse if the mean over documents of its paired differences is above zero by a
    one-sided t test (`statistics.is_above`) and above what matters at all.

    Args:
        previous: Evidence of the previous release.
        new: Evidence of the new one, on the same documents.

    Returns:
        One phrase for each figure that is worse, in the order own text, public text, share.

    Example:
        >>> runs = ("own_expert", "own_mix", "anchor_mix")
        >>> n_bytes_B = np.array([100, 100, 100])
        >>> def evidence(share):
        ...     score = Score(np.array([140.0, 150.0, 160.0]), n_bytes_B)
        ...     return Evidence({run: score for run in runs}, share + np.array([0.01, 0.02, 0.03]))
        >>> compare_evidence(evidence(0.1), evidence(0.1))
        []
        >>> compare_evidence(evidence(0.1), evidence(0.3))
        ['12.0% to 32.0% of public text routed to it (3 documents, more at 95% confidence)']
    """
    found = []
    for run, what in _RUNS.items():
        before, after = previous.scores[run], new.scores[run]
        limit = MAX_REGRESSION * before.bits_per_byte
        if is_above(_document_bits(after) - _document_bits(before), limit):
            found.append(
                f"{before.bits_per_byte:.3f} to {after.bits_per_byte:.3f} bits per byte on {what} "
                f"({len(after.nats_B)} documents, more at {CONFIDENCE:.0%} confidence)"
            )
    before_B, after_B = previous.routed_share_B, new.routed_share_B
    if is_above(after_B - before_B, MAX_MORE_ROUTED):
        found.append(
            f"{before_B.mean():.1%} to {after_B.mean():.1%} of public text routed to it "
            f"({len(after_B)} documents, more at {CONFIDENCE:.0%} confidence)"
        )
    return found


def _document_bits(score: Score) -> np.ndarray:
    """Return the bits per byte of every document, shape B."""
    bits_B: np.ndarray = score.nats_B / score.n_bytes_B / np.log(2)
    return bits_B
