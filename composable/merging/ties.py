"""TIES: trim small changes, elect a sign for every weight, average the changes that agree.

References:
    Yadav et al. 2023, arXiv:2306.01708, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from composable.merging.updates import Matrices


def merge_ties(updates: Sequence[Mapping[str, np.ndarray]], density: float) -> Matrices:
    """Return the update that TIES makes of those of the sides, before it is scaled.

    Each side keeps the share `density` of its changes that are largest in magnitude, over all its
    matrices. The sign of a weight is that of the sum of the kept changes. The result is the mean of
    the kept changes of that sign.

    Args:
        updates: Updates of the sides.
        density: Share of changes that each side keeps, in (0, 1].

    References:
        Yadav et al. 2023, arXiv:2306.01708, algorithm 1, equation 1.

    Example:
        >>> one, two = {"w": np.array([[4.0, 1.0]])}, {"w": np.array([[-2.0, 3.0]])}
        >>> merge_ties([one, two], density=1.0)["w"].tolist()
        [[4.0, 2.0]]
        >>> merge_ties([one, two], density=0.5)["w"].tolist()
        [[4.0, 3.0]]
    """
    cuts = [_find_cut(update, density) for update in updates]
    merged = {}
    for name in updates[0]:
        kept = [
            np.where(np.abs(update[name]) >= cut, update[name], 0)
            for update, cut in zip(updates, cuts, strict=True)
        ]
        sign_DF = np.sign(np.sum(kept, axis=0))
        agreeing = [np.where(np.sign(kept_DF) == sign_DF, kept_DF, 0) for kept_DF in kept]
        count_DF = np.sum([agreeing_DF != 0 for agreeing_DF in agreeing], axis=0)
        merged[name] = np.sum(agreeing, axis=0) / np.maximum(count_DF, 1).astype(np.float32)
    return merged


def _find_cut(update: Mapping[str, np.ndarray], density: float) -> float:
    """Return the smallest magnitude that a side keeps."""
    size_M = np.concatenate([np.abs(update_DF).ravel() for update_DF in update.values()])
    n_kept = max(1, round(density * len(size_M)))
    return float(np.partition(size_M, len(size_M) - n_kept)[len(size_M) - n_kept])
