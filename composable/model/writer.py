"""Which path writes in safe mode: the chain over paths, drawn instead of averaged.

Safe mode predicts given text by a mixture of paths. A text that is drawn token by token from such a
mixture soon is text of none of them, since every path has to continue what the others wrote. So a
path is drawn and writes, until the chain of `occupancy.py` switches:

    z[1] is i with probability w[i];   z[t] = z[t-1], or with probability rate it is drawn by theta

At every token z is i with the probability that the chain gives path i there, so each token is by
another path than the backbone's at most as often as the mixture would count others. One path runs
for each token.

References:
    Ortega et al. 2021, arXiv:2110.10819 (acts); Thompson 1933 (one draw from the posterior, kept).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from composable.model.occupancy import WRITING_RATE


class Writer:
    """The path that writes the next token.

    Args:
        weight_E: Weight of each path at the end of the given text; zero for one that sleeps.
        target_E: Weights that a switch leads to.
        seed: Seed of the draws, or None for the likeliest path at every token.
        position: Position of the first token that is written.

    Example:
        >>> writer = Writer(np.array([0.2, 0.8]), np.array([0.9, 0.1]), seed=None, position=7)
        >>> writer.path
        1
        >>> for position in range(8, 48):
        ...     writer.move(position)
        >>> writer.path
        0
    """

    def __init__(
        self,
        weight_E: Sequence[float] | np.ndarray,
        target_E: Sequence[float] | np.ndarray,
        *,
        seed: int | None,
        position: int,
    ) -> None:
        weights = (np.asarray(weight_E, float), np.asarray(target_E, float))
        self._weight_E, target = weights[0] / weights[0].sum(), weights[1] * (weights[0] > 0)
        self._target_E = target / target.sum()
        self._seed = seed
        self.path = self._pick(self._weight_E, position)

    def move(self, position: int) -> None:
        """Switch to another path, or not.

        Args:
            position: Position of the next token that is written.
        """
        self._weight_E = (1 - WRITING_RATE) * self._weight_E + WRITING_RATE * self._target_E
        if self._seed is None:
            self.path = self._pick(self._weight_E, position)
        elif self._uniform(position, 0) < WRITING_RATE:
            self.path = self._pick(self._target_E, position)

    def _pick(self, weight_E: np.ndarray, position: int) -> int:
        if self._seed is None:
            return int(weight_E.argmax())
        up_to_E = np.cumsum(weight_E)
        return int(np.searchsorted(up_to_E, self._uniform(position, 1) * up_to_E[-1], "right"))

    def _uniform(self, position: int, n: int) -> float:
        """Return a number in [0, 1) that depends on the seed and the position alone."""
        assert self._seed is not None
        return float(np.random.default_rng((self._seed % (1 << 64), position, n)).random())
