"""What a few documents can say of all: an upper bound on a mean, and whether two means differ.

The unit is always the document. Tokens of one document hang together, so a thousand of them are not
a thousand observations.
"""

from __future__ import annotations

from typing import Final

import jax
import numpy as np

CONFIDENCE: Final = 0.95
# Share of all that a bet may lose: never everything.
_MAX_STAKE: Final = 0.98
_BISECTIONS: Final = 40


def upper_mean(share_N: np.ndarray, confidence: float = CONFIDENCE) -> float:
    """Return an upper confidence bound on the mean of values in [0, 1].

    Whoever claims that the mean is at least m is bet against, value by value, at odds that are
    fair if it is m; m is refused once the bets would have won 1 / (1 - confidence) times the
    stake. That holds for any distribution and any number of documents, if they are drawn
    independently: n values that are all zero give about 3 / n.

    Args:
        share_N: One value per document, each in [0, 1], in an order that does not depend on them.
        confidence: Probability with which the mean is at most the bound.

    References:
        Waudby-Smith and Ramdas 2024, arXiv:2010.09686, section 4, equations 26 and 27 (bets from
        the mean and variance so far), one-sided.
    """
    n = len(share_N)
    goal = np.log(1 / (1 - confidence))
    before_N = np.arange(1, n + 1)
    # Mean and variance of the values before each, begun with half a value at 1/2.
    mean_N = (0.5 + np.concatenate([[0], np.cumsum(share_N)[:-1]])) / before_N
    deviation_N = np.concatenate([[0], np.cumsum((share_N - mean_N) ** 2)[:-1]])
    bet_N = np.sqrt(2 * goal / (n * (0.25 + deviation_N) / before_N))

    def is_refused(m: float) -> bool:
        stake_N = np.minimum(bet_N, _MAX_STAKE / (1 - m))
        return bool(np.log1p(-stake_N * (share_N - m)).sum() >= goal)

    # What the bets win grows with m, so the refused means are those above a point.
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_refused(middle) else (middle, high)
    return max(high, float(share_N.mean()))


def is_above(difference_N: np.ndarray, limit: float, confidence: float = CONFIDENCE) -> bool:
    """Return whether the mean of paired differences is above zero beyond noise, and above a limit.

    A one-sided t test on the documents' differences. It asks for the mean of many documents, so
    the differences need not be normal; of a single document there is no noise to be known, and
    its difference is taken as it is.

    Args:
        difference_N: One difference per document.
        limit: What the mean must exceed as well: less than that does not matter.
        confidence: Probability with which a mean of zero is not taken for more.

    References:
        Student 1908, "The probable error of a mean".
    """
    n, mean = len(difference_N), float(difference_N.mean())
    if not np.isfinite(mean):
        return mean != -np.inf  # what has no figure any more got worse
    if mean <= limit:
        return False
    error = float(difference_N.std(ddof=1)) / np.sqrt(n) if n > 1 else 0.0
    if error == 0:
        return True
    # P(T > t) = I(v / (v + t^2); v / 2, 1 / 2) / 2, with I the regularised incomplete beta.
    free, square = n - 1, (mean / error) ** 2
    tail = jax.scipy.special.betainc(free / 2, 0.5, free / (free + square)) / 2
    return bool(tail < 1 - confidence)
