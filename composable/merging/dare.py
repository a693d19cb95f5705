"""DARE: drop changes at random, rescale the rest, and add the updates of all sides.

References:
    Yu et al. 2024, arXiv:2311.03099, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from composable.merging.updates import Matrices, sum_updates


def drop_and_rescale(update: Mapping[str, np.ndarray], drop: float, seed: int) -> Matrices:
    """Return an update of which a random share is zero, and the rest is larger to make up for it.

    Args:
        update: A side's update.
        drop: Probability that a change is dropped, in [0, 1).
        seed: Seed of the choice. Every matrix draws its own numbers, from the seed and its place
            among the names in order, so all machines drop the same changes.

    References:
        Yu et al. 2024, arXiv:2311.03099, equation 1: `(1 - m) * update / (1 - p)`, where
        m is 1 with probability p.

    Example:
        >>> dropped = drop_and_rescale({"w": np.ones((100, 100))}, drop=0.5, seed=0)["w"]
        >>> sorted(set(dropped.ravel().tolist())), round(float(dropped.mean()), 1)
        ([0.0, 2.0], 1.0)
    """
    return {
        name: np.where(
            np.random.default_rng((seed, i)).random(update[name].shape, np.float32) < drop,
            np.float32(0),
            update[name] / np.float32(1 - drop),
        )
        for i, name in enumerate(sorted(update))
    }


def merge_dare(updates: Sequence[Mapping[str, np.ndarray]], drop: float) -> Matrices:
    """Return the sum of the updates of all sides after `drop_and_rescale`, before it is scaled.

    Args:
        updates: Updates of the sides; each drops other changes.
        drop: Probability that a change is dropped, in [0, 1).

    Example:
        >>> merge_dare([{"w": np.ones((1, 2))}] * 2, drop=0.0)["w"].tolist()
        [[2.0, 2.0]]
    """
    return sum_updates([drop_and_rescale(update, drop, i) for i, update in enumerate(updates)])
