"""Which path writes in safe mode: the chain over paths, drawn instead of averaged.

Safe mode predicts given text by a mixture of paths. A text that is drawn from such a mixture, token
by token, soon is text of none of them, since every path has to continue what the others wrote. So
a path is drawn and writes. By the chain of `occupancy.py` the weight of path i moves, while t
tokens are written, from w[i], its posterior at the end of the given text, to theta[i], where
switches lead:

    P(path i writes after t tokens) = (1 - rate)^t w[i] + (1 - (1 - rate)^t) theta[i]

Among the processes with these probabilities this is one that switches least: a first path is drawn
by w and a second by theta, as often as possible the same one; with probability rate per token the
second takes over, once. A text therefore changes its path with probability TV(w, theta), and one
path runs for each token.

References:
    Ortega et al. 2021, arXiv:2110.10819 (acts); Lindvall 1992, "Lectures on the coupling method",
    section I.5 (the maximal coupling).
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
        >>> writer = Writer([0.2, 0.8], [0.9, 0.1], seed=None, position=7)
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
        weight_E, target_E = np.asarray(weight_E, float), np.asarray(target_E, float)
        target_E = target_E * (weight_E > 0)
        self._weight_E, self._target_E = weight_E / weight_E.sum(), target_E / target_E.sum()
        self._seed, self._next = seed, None
        if seed is None:
            self.path = int(self._weight_E.argmax())
            return
        first, is_kept, other = _draw(seed, position)
        self.path = _pick(self._weight_E, first)
        if is_kept * self._weight_E[self.path] >= self._target_E[self.path]:
            more_E = np.maximum(self._target_E - self._weight_E, 0)
            self._next = _pick(more_E, other)

    def move(self, position: int) -> None:
        """Let the second path take over, or not yet.

        Args:
            position: Position of the next token that is written.
        """
        if self._seed is None:
            self._weight_E = (1 - WRITING_RATE) * self._weight_E + WRITING_RATE * self._target_E
            self.path = int(self._weight_E.argmax())
        elif self._next is not None and _draw(self._seed, position)[0] < WRITING_RATE:
            self.path, self._next = self._next, None


def _draw(seed: int, position: int) -> np.ndarray:
    """Return three numbers in [0, 1) that depend on the seed and the position alone."""
    return np.random.default_rng((seed % (1 << 64), position)).random(3)


def _pick(weight_E: np.ndarray, u: float) -> int:
    """Return the path at a fraction of the total weight."""
    up_to_E = np.cumsum(weight_E)
    return int(np.searchsorted(up_to_E, u * up_to_E[-1], side="right"))
