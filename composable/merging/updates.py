"""Updates: what each side's training added to the matrices of the release that all derive from.

Methods take and return matrices by name. D and F stand for the rows and the columns of any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# Name -> matrix of shape DF, float32.
Matrices = dict[str, np.ndarray]


def find_updates(base: Mapping[str, np.ndarray], side: Mapping[str, np.ndarray]) -> Matrices:
    """Return what training added: side minus base, by name.

    Args:
        base: Matrices of the release that the side derives from.
        side: Matrices of the side.

    References:
        Ilharco et al. 2023, arXiv:2212.04089, section 2 (task vectors).

    Example:
        >>> find_updates({"w": np.ones((1, 2))}, {"w": np.full((1, 2), 3.0)})["w"].tolist()
        [[2.0, 2.0]]
    """
    return {name: side[name] - base_DF for name, base_DF in base.items()}


def add_update(
    base: Mapping[str, np.ndarray], update: Mapping[str, np.ndarray], scale: float = 1.0
) -> Matrices:
    """Return base plus an update times a scale, by name.

    Args:
        base: Matrices.
        update: What to add to each.
        scale: Factor of the update.

    Example:
        >>> add_update({"w": np.ones((1, 2))}, {"w": np.ones((1, 2))}, 0.5)["w"].tolist()
        [[1.5, 1.5]]
    """
    return {name: base_DF + scale * update[name] for name, base_DF in base.items()}


def sum_updates(updates: Sequence[Mapping[str, np.ndarray]]) -> Matrices:
    """Return the sum of updates, by name.

    Args:
        updates: Updates of the sides, of the same names and shapes.

    References:
        Ilharco et al. 2023, arXiv:2212.04089, section 2: the merged model is the base plus
        `scale * sum_i update_i`. A scale of one over the number of sides averages them.

    Example:
        >>> sum_updates([{"w": np.ones((1, 2))}, {"w": np.ones((1, 2))}])["w"].tolist()
        [[2.0, 2.0]]
    """
    return {name: np.sum([update[name] for update in updates], axis=0) for name in updates[0]}
