"""Training of scouts on the cached features of a frozen trunk.

Where the features come from is in `composable.workflows.trunk_cache`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Self

import jax
import numpy as np
import optax
from flax import nnx

from composable.errors import TextError
from composable.model.scout import Scout
from composable.progress import StepProgress
from composable.training.config import TrainConfig
from composable.training.loop import Objective, fit
from composable.training.objectives import scout_loss
from composable.training.optimizers import muon

# Scout-only steps: rows per step, and the peak rate with Muon. Half the rate left scouts worse,
# twice the rate no better (docs/adr/0011-scouts-read-alone.md).
SCOUT_ROWS: Final = 16
SCOUT_RATE: Final = 2e-2
_BITS: Final = 1 / np.log(2)


@dataclass(frozen=True)
class Features:
    """Features of rows of text, and the class of the token after each position.

    Args:
        feature_BTD: Features, float16, or the dtype of the trunk where nothing is cached.
        classes_BT: Class of the token after each position.
    """

    feature_BTD: np.ndarray
    classes_BT: np.ndarray


class RowOrder:
    """Batches of row numbers, in a new order each epoch; a position is a number of batches.

    Args:
        n_rows: Rows to draw from.
        batch_size: Row numbers per batch, at most `n_rows`.
        seed: Seed of the order.

    Example:
        >>> order = RowOrder(n_rows=4, batch_size=2, seed=0)
        >>> sorted([*next(order).tolist(), *next(order).tolist()])
        [0, 1, 2, 3]
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int) -> None:
        self._n_rows, self._size, self._seed = n_rows, min(batch_size, n_rows), seed
        self._done = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        per_epoch = self._n_rows // self._size
        epoch, at = divmod(self._done, per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(self._n_rows)
        self._done += 1
        return order[at * self._size : (at + 1) * self._size].astype(np.int32)

    def get_state(self) -> dict[str, Any]:
        """Return the position."""
        return {"done": self._done}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that `get_state` returned."""
        self._done = int(state["done"])


@dataclass(frozen=True, kw_only=True)
class ScoutFit:
    """A trained scout and its loss on held-out text.

    Args:
        scout: The scout.
        heldout_bits: Bits per class on held-out rows; None where it was not trained.
        steps: Optimiser steps that it was trained for.
        seconds: Wall time of all fits that were compared.
    """

    scout: Scout
    heldout_bits: float | None
    steps: int
    seconds: float

    @classmethod
    def untrained(cls, scout: Scout) -> Self:
        """Return the result for a scout that is used without training."""
        return cls(scout=scout, heldout_bits=None, steps=0, seconds=0.0)


def train_scout(
    scout: Scout,
    features: Features,
    *,
    steps: int,
    batch_size: int = SCOUT_ROWS,
    learning_rate: float = SCOUT_RATE,
    optimizer: Callable[[TrainConfig], optax.GradientTransformation] = muon,
    seed: int = 0,
    progress: StepProgress | None = None,
) -> ScoutFit:
    """Train a scout for a sixteenth, a quarter and all of the steps, and return the best one.

    The loss on every tenth row, which is held out, decides: with many classes and little text, the
    full number of steps overfits.

    Args:
        scout: The scout to start from; left unchanged.
        features: Its inputs and targets.
        steps: Optimiser steps at most; 0 leaves it untrained.
        batch_size: Rows per step.
        learning_rate: Peak.
        optimizer: Returns the optimiser for the settings of a fit.
        seed: Seed of the rows' order.
        progress: Called at every step, of `count_scout_steps(steps)`.

    Raises:
        TextError: If there are fewer than two rows.
    """
    if steps == 0:
        return ScoutFit.untrained(scout)
    training, heldout = _split_rows(features)
    total = count_scout_steps(steps)
    fits: list[ScoutFit] = []
    for n_steps in _step_counts(steps):
        cfg = TrainConfig(
            steps=n_steps,
            batch_size=min(batch_size, len(training.classes_BT)),
            window=features.classes_BT.shape[1],
            learning_rate=learning_rate,
            weight_decay=0.01,
            seed=seed,
            log_every=50,
        )
        before = sum(tried.steps for tried in fits)

        def show(step: int, _: int, row: Mapping[str, float], before: int = before) -> None:
            if progress:
                progress(before + step, total, row)

        fits.append(_fit_scout(scout, training, heldout, cfg, optimizer(cfg), show))
    best = min(fits, key=_rank_fit)
    return dataclasses.replace(best, seconds=sum(tried.seconds for tried in fits))


def _split_rows(features: Features) -> tuple[Features, Features]:
    """Return the rows to train on and every tenth row, which is held out.

    Raises:
        TextError: If there are fewer than two rows.
    """
    n_rows = len(features.classes_BT)
    if n_rows < 2:
        raise TextError("one row of text cannot be split into training and held-out text")
    is_heldout_B = np.arange(n_rows) % 10 == 1
    training_B, heldout_B = np.flatnonzero(~is_heldout_B), np.flatnonzero(is_heldout_B)
    return (
        Features(features.feature_BTD[training_B], features.classes_BT[training_B]),
        Features(features.feature_BTD[heldout_B], features.classes_BT[heldout_B]),
    )


def _fit_scout(
    scout: Scout,
    training: Features,
    heldout: Features,
    cfg: TrainConfig,
    optimizer: optax.GradientTransformation,
    progress: StepProgress,
) -> ScoutFit:
    """Train a copy of a scout and measure it on the held-out rows."""
    graph, params = nnx.split(scout)
    frozen = training.feature_BTD, training.classes_BT
    order = RowOrder(len(training.classes_BT), cfg.batch_size, cfg.seed)
    objective = _scout_objective(graph)
    fitted = fit(objective, params, frozen, order, cfg, optimizer=optimizer, progress=progress)
    trained: Scout = nnx.merge(graph, fitted.trained)
    nats = float(_scout_nats(trained, heldout.feature_BTD, heldout.classes_BT))
    return ScoutFit(
        scout=trained,
        heldout_bits=nats * float(_BITS),
        steps=cfg.steps,
        seconds=fitted.seconds,
    )


@lru_cache(maxsize=8)
def _scout_objective(graph: nnx.GraphDef[Any]) -> Objective:
    """Return the objective of a scout on rows of features, one for scouts of one structure."""

    def objective(params: Any, frozen: Any, rows_B: jax.Array) -> tuple[jax.Array, Any]:
        feature_BTD, classes_BT = frozen
        loss = scout_loss(nnx.merge(graph, params), feature_BTD[rows_B], classes_BT[rows_B])
        return loss, {"scout_bits": loss * _BITS}

    return objective


def _rank_fit(tried: ScoutFit) -> tuple[bool, float]:
    """Return a sort key: lower held-out bits first, undefined ones last."""
    bits = math.nan if tried.heldout_bits is None else tried.heldout_bits
    return math.isnan(bits), bits


def count_scout_steps(steps: int) -> int:
    """Return how many steps `train_scout` takes over all fits that it compares.

    Args:
        steps: Steps of the longest fit.

    Example:
        >>> count_scout_steps(160)  # 10 + 40 + 160
        210
    """
    return sum(_step_counts(steps)) if steps else 0


def _step_counts(steps: int) -> list[int]:
    """Return the steps of each of the fits that are compared."""
    return sorted({max(1, steps // part) for part in (16, 4, 1)})


@jax.jit
def _scout_nats(scout: Scout, feature_BTD: jax.Array, classes_BT: jax.Array) -> jax.Array:
    """Return the mean loss over rows, computed one row at a time to save memory."""

    def row(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        feature_TD, classes_T = args
        return scout_loss(scout, feature_TD[None], classes_T[None])

    nats_B: jax.Array = jax.lax.map(row, (feature_BTD, classes_BT))
    return nats_B.mean()
