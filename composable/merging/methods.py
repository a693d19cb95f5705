"""The table of methods: which settings of each are tried, and the matrices that each gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from composable.merging.dare import merge_dare
from composable.merging.fisher import merge_fisher
from composable.merging.low_rank import truncate
from composable.merging.regmean import merge_regmean
from composable.merging.statistics import MatrixStatistics
from composable.merging.ties import merge_ties
from composable.merging.updates import Matrices, add_update, find_updates, sum_updates

# Methods that weight by statistics; the others need none.
WEIGHTED: Final = ("fisher", "regmean")
METHODS: Final = ("linear", "ties", "dare", "low-rank", *WEIGHTED)
# Scales of an update that is a mean. A sum of the updates of n sides gets these over n.
SCALES: Final = (0.7, 1.0, 1.4, 2.0)
# Shares that are kept of what TIES trims, DARE drops and an SVD cuts.
DENSITIES: Final = (0.2, 0.5)
DROPS: Final = (0.5, 0.9)
SHARES: Final = (0.1, 0.3)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with its settings.

    Args:
        method: Its name.
        scale: Factor of the mean of the sides' updates: 1 averages, their number adds them.
        setting: What else the method has: the density of TIES, the probability of DARE, the share
            of singular values; None where there is none.
    """

    method: str
    scale: float = 1.0
    setting: float | None = None

    def __str__(self) -> str:
        setting = "" if self.setting is None else f" {self.setting:g}"
        return f"{self.method}{setting}, scale {self.scale:g}"


def list_candidates(
    methods: Sequence[str] = METHODS, *, has_statistics: bool = True
) -> list[Candidate]:
    """Return the candidates of some methods.

    Args:
        methods: Their names.
        has_statistics: Whether every side has statistics; without, no method that needs them.

    Example:
        >>> [str(candidate) for candidate in list_candidates(["linear"])][:2]
        ['linear, scale 0.7', 'linear, scale 1']
    """
    settings: dict[str, Sequence[float | None]] = {
        "ties": DENSITIES,
        "dare": DROPS,
        "low-rank": SHARES,
    }
    return [
        Candidate(method=method, scale=scale, setting=setting)
        for method in methods
        if has_statistics or method not in WEIGHTED
        for setting in settings.get(method, (None,))
        for scale in SCALES
    ]


def merge_candidates(
    base: Mapping[str, np.ndarray],
    sides: Sequence[Mapping[str, np.ndarray]],
    candidates: Sequence[Candidate],
    statistics: Sequence[Mapping[str, MatrixStatistics]] = (),
) -> Iterator[tuple[Candidate, Matrices]]:
    """Yield candidates with the matrices that they give, one at a time.

    Args:
        base: Matrices of the release that all sides derive from.
        sides: Matrices of each side.
        candidates: The candidates; those that differ in scale alone are best next to each other.
        statistics: Of each side, for methods that need them.

    Example:
        >>> base, side = {"w": np.zeros((1, 1))}, {"w": np.ones((1, 1))}
        >>> linear = Candidate(method="linear")
        >>> [(_, merged)] = merge_candidates(base, [side, side], [linear])
        >>> merged["w"].tolist()
        [[1.0]]
    """
    updates = [find_updates(base, side) for side in sides]
    made: tuple[str, float | None] | None = None
    update: Matrices = {}
    for candidate in candidates:
        key = candidate.method, candidate.setting
        if key != made:
            update, made = _merge_updates(updates, candidate, statistics), key
        yield candidate, add_update(base, update, candidate.scale)


def _merge_updates(
    updates: Sequence[Matrices],
    candidate: Candidate,
    statistics: Sequence[Mapping[str, MatrixStatistics]],
) -> Matrices:
    """Return the update of a method at scale 1, on the scale of a mean of the sides' updates."""
    setting = candidate.setting or 0.0
    if candidate.method == "ties":
        return merge_ties(updates, setting)
    if candidate.method == "fisher":
        return merge_fisher(updates, statistics)
    if candidate.method == "regmean":
        return merge_regmean(updates, statistics)
    if candidate.method == "dare":
        total = merge_dare(updates, setting)
    elif candidate.method == "low-rank":
        total = truncate(sum_updates(updates), setting)
    else:
        total = sum_updates(updates)
    return {name: total_DF / np.float32(len(updates)) for name, total_DF in total.items()}
