"""Fisher-weighted averaging: every side's weights count where its loss is sensitive to them.

References:
    Matena and Raffel 2022, arXiv:2111.09832.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from composable.merging.statistics import MatrixStatistics
from composable.merging.updates import Matrices

# Share of the mean that is added to a Fisher information: none is exactly zero.
_FLOOR = 1e-6


def merge_fisher(
    updates: Sequence[Mapping[str, np.ndarray]],
    statistics: Sequence[Mapping[str, MatrixStatistics]],
) -> Matrices:
    """Return the mean of updates, weighted by the diagonal Fisher information of each side.

    The mean of weights minus the base is the mean of updates, since the weights sum to one. Each
    side's information is divided by its mean over all its matrices, so that no side counts more
    because its loss is larger (section 3.4 normalises likewise). The diagonal is the product of its
    means over rows and columns; see `MatrixStatistics.fisher`.

    Args:
        updates: Updates of the sides.
        statistics: Of each side, by matrix.

    References:
        Matena and Raffel 2022, arXiv:2111.09832, equation 3 with equal weights of the sides.

    Example:
        >>> def side(rows):
        ...     return {"w": MatrixStatistics.of(np.diag(rows), np.ones((2, 1)), rows, np.ones(1))}
        >>> one, two = {"w": np.array([[1.0], [1.0]])}, {"w": np.array([[0.0], [0.0]])}
        >>> sides = [side(np.array([3.0, 1.0])), side(np.array([1.0, 3.0]))]
        >>> merge_fisher([one, two], sides)["w"].round(3).tolist()
        [[0.75], [0.25]]
    """
    means = [_mean_fisher(side) for side in statistics]
    merged = {}
    for name in updates[0]:
        weights = [
            side[name].fisher() / mean + _FLOOR
            for side, mean in zip(statistics, means, strict=True)
        ]
        weighted = [w * update[name] for w, update in zip(weights, updates, strict=True)]
        merged[name] = (np.sum(weighted, axis=0) / np.sum(weights, axis=0)).astype(np.float32)
    return merged


def _mean_fisher(side: Mapping[str, MatrixStatistics]) -> float:
    """Return the mean of a side's Fisher information over all its weights; 1 if it is all zero."""
    total = sum(float(s.row_D.sum()) for s in side.values())
    return total / sum(s.row_D.size * s.column_F.size for s in side.values()) or 1.0
