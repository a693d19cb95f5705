"""RegMean: the matrices whose outputs are closest to each side's own, on that side's inputs.

References:
    Jin et al. 2023, arXiv:2212.09849.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from composable.merging.statistics import MatrixStatistics
from composable.merging.updates import Matrices

# Factor of what is off the diagonal of a Gram matrix, against degenerate solutions (section 3.2).
SHRINK = 0.9


def merge_regmean(
    updates: Sequence[Mapping[str, np.ndarray]],
    statistics: Sequence[Mapping[str, MatrixStatistics]],
    shrink: float = SHRINK,
) -> Matrices:
    """Return the update that minimises the sum over sides of `|X_i (U - U_i)|^2`.

    Args:
        updates: Updates of the sides. For updates the solution is that for weights minus the base.
        statistics: Of each side, by matrix; the Gram matrices of inputs.
        shrink: Factor of what is off the diagonals, in [0, 1].

    References:
        Jin et al. 2023, arXiv:2212.09849, equation 2: `(sum_i G_i)^-1 sum_i G_i W_i`.

    Example:
        >>> def side(rows):
        ...     return {"w": MatrixStatistics.of(np.diag(rows), np.ones((2, 1)), rows, np.ones(1))}
        >>> one, two = {"w": np.array([[1.0], [1.0]])}, {"w": np.array([[0.0], [0.0]])}
        >>> sides = [side(np.array([3.0, 1.0])), side(np.array([1.0, 3.0]))]
        >>> merge_regmean([one, two], sides)["w"].round(3).tolist()
        [[0.75], [0.25]]
    """
    merged = {}
    for name in updates[0]:
        grams = [_shrink(side[name].gram(), shrink) for side in statistics]
        total_DD = np.sum(grams, axis=0)
        # An input that is always zero has no preference.
        total_DD += np.eye(len(total_DD)) * (1e-6 * np.trace(total_DD) / len(total_DD) or 1.0)
        wanted_DF = np.sum(
            [gram_DD @ update[name] for gram_DD, update in zip(grams, updates, strict=True)], axis=0
        )
        merged[name] = np.linalg.solve(total_DD, wanted_DF).astype(np.float32)
    return merged


def _shrink(gram_DD: np.ndarray, factor: float) -> np.ndarray:
    diagonal_D = np.diagonal(gram_DD)
    shrunk_DD: np.ndarray = factor * gram_DD + (1 - factor) * np.diag(diagonal_D)
    return shrunk_DD
