"""Inference from few documents: bounds on a mean and a ratio, and whether paired figures differ.

One document is one observation, however long it is: the tokens of a document are not independent.
"""

from __future__ import annotations

from typing import Final

import numpy as np

# Not scipy.stats, whose import takes a second of every command that checks.
from scipy.special import stdtr, stdtrit

CONFIDENCE: Final = 0.95
# Largest share of its capital that a bet may lose.
_MAX_STAKE: Final = 0.98
_BISECTIONS: Final = 40


def upper_mean(value_B: np.ndarray, confidence: float = CONFIDENCE) -> float:
    """Return an upper confidence bound on the mean of values in [0, 1].

    Each candidate m for the mean is tested by betting against it, value by value, at odds that are
    fair if the mean is m. It is rejected once the bets have multiplied their capital by
    1 / (1 - confidence). The bound holds for any distribution and any number of independent
    documents: n values that are all zero give about 3 / n.

    Args:
        value_B: One value per document, each in [0, 1], in an order that is independent of them.
        confidence: Probability with which the mean is at most the bound, in (0, 1).

    Returns:
        The bound, between the mean of the values and 1.

    References:
        Waudby-Smith and Ramdas 2024, arXiv:2010.09686, section 4, equations 26 and 27 (bets from
        the mean and variance so far), one-sided.

    Example:
        >>> round(upper_mean(np.zeros(8)), 2)
        0.32
        >>> round(upper_mean(np.zeros(100)), 2)
        0.03
    """
    n = len(value_B)
    goal = np.log(1 / (1 - confidence))
    count_B = np.arange(1, n + 1)
    # Mean and variance of the values before each, starting with half a value at 1/2.
    mean_B = (0.5 + np.concatenate([[0], np.cumsum(value_B)[:-1]])) / count_B
    deviation_B = np.concatenate([[0], np.cumsum((value_B - mean_B) ** 2)[:-1]])
    bet_B = np.sqrt(2 * goal / (n * (0.25 + deviation_B) / count_B))

    def is_rejected(m: float) -> bool:
        stake_B = np.minimum(bet_B, _MAX_STAKE / (1 - m))
        return bool(np.log1p(-stake_B * (value_B - m)).sum() >= goal)

    # The capital grows with m, so every mean above some point is rejected.
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_rejected(middle) else (middle, high)
    return max(high, float(value_B.mean()))


def ratio_interval(
    numerator_B: np.ndarray, denominator_B: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return a confidence interval of the ratio of two sums over the same documents.

    The jackknife: the ratio without each document in turn gives its standard error, and Student's t
    the width. It presumes that the documents are independent and none outweighs all others; with
    fewer than about ten of very different lengths it is slightly narrow.

    Args:
        numerator_B: One value per document.
        denominator_B: One value per document; their sum, without any one of them, is not 0.
        confidence: Probability with which the interval covers the ratio, in (0, 1).

    Returns:
        The lower and the upper end; minus infinity and infinity for a single document.

    References:
        Miller 1974, "The jackknife - a review", equations 1.1 to 1.4.

    Example:
        >>> low, high = ratio_interval(np.array([1.0, 2.1, 2.9]), np.array([2.0, 4.0, 6.0]))
        >>> round(low, 2), round(high, 2)
        (0.42, 0.57)
    """
    n = len(numerator_B)
    if n < 2:
        return -np.inf, np.inf
    numerator, denominator = numerator_B.sum(), denominator_B.sum()
    ratio = numerator / denominator
    left_out_B = (numerator - numerator_B) / (denominator - denominator_B)
    pseudo_B = n * ratio - (n - 1) * left_out_B
    return mean_interval(pseudo_B, confidence)


def mean_interval(value_B: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return a confidence interval of a mean, by Student's t.

    Args:
        value_B: One value per document, of at least two.
        confidence: Probability with which the interval covers the mean, in (0, 1).

    Returns:
        The lower and the upper end.

    References:
        Student 1908, "The probable error of a mean".

    Example:
        >>> low, high = mean_interval(np.array([0.9, 1.0, 1.1]))
        >>> round(low, 2), round(high, 2)
        (0.75, 1.25)
    """
    half = float(stdtrit(len(value_B) - 1, (1 + confidence) / 2)) * _standard_error(value_B)
    middle = float(value_B.mean())
    return middle - half, middle + half


def _standard_error(value_B: np.ndarray) -> float:
    """Return the standard error of the mean of at least two values."""
    return float(value_B.std(ddof=1) / np.sqrt(len(value_B)))


def is_above(difference_B: np.ndarray, limit: float, confidence: float = CONFIDENCE) -> bool:
    """Return whether the mean of paired differences is above zero beyond noise, and above a limit.

    A one-sided t test on the documents' differences. A single document gives no estimate of the
    noise, so its difference is compared with the limit only.

    Args:
        difference_B: One difference per document.
        limit: What the mean must exceed as well; a smaller difference does not matter.
        confidence: One minus the probability of reporting a difference whose true mean is zero.

    Returns:
        Whether both hold. A mean that is NaN or infinite counts as above, minus infinity does not.

    References:
        Student 1908, "The probable error of a mean".

    Example:
        >>> is_above(np.array([0.11, 0.09, 0.10, 0.12]), limit=0.01)
        True
        >>> is_above(np.array([0.9, -0.7, 0.8, -0.6]), limit=0.01)
        False
    """
    n, mean = len(difference_B), float(difference_B.mean())
    if not np.isfinite(mean):
        return mean != -np.inf
    if mean <= limit:
        return False
    error = _standard_error(difference_B) if n > 1 else 0.0
    if error == 0:
        return True
    return bool(stdtr(n - 1, -mean / error) < 1 - confidence)
