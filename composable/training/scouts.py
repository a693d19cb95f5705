"""Training of scouts on the cached features of a frozen trunk.

Where the features come from is in `composable.workflows.trunk_cache`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple, Self

import jax
import numpy as np
import optax
from flax import nnx

from composable.errors import TextError
from composable.model.scout import Scout
from composable.progress import StepProgress
from composable.training.config import TrainConfig
from composable.training.loop import Fitted, Objective, fit
from composable.training.objectives import scout_loss
from composable.training.optimizers import muon

# Scout-only steps: rows per step, and the peak rate with Muon. Half the rate left scouts worse,
# twice the rate no better (docs/adr/0011-scouts-read-alone.md).
SCOUT_ROWS: Final = 16
SCOUT_RATE: Final = 2e-2
_BITS: Final = 1 / math.log(2)


class Features(NamedTuple):
    """Features of rows of text, and the class of the token after each position.

    Args:
        feature_BTD: Features, float16, or the dtype of the trunk where nothing is cached.
        classes_BT: Class of the token after each position.
    """

    feature_BTD: Any
    classes_BT: Any

    def take(self, rows_B: np.ndarray) -> Features:
        """Return some of the rows.

        Args:
            rows_B: Their numbers.
        """
        return Features(self.feature_BTD[rows_B], self.classes_BT[rows_B])


class FeatureBatches:
    """Batches of rows, in a new order each epoch; a position is a number of batches.

    Args:
        features: Rows; they may be memory-mapped, since only those of a batch are read.
        rows_B: Numbers of the rows to draw from.
        batch_size: Rows per batch, at most all.
        seed: Seed of the order.

    Example:
        >>> features = Features(np.zeros((4, 1, 1)), np.arange(4)[:, None])
        >>> data = FeatureBatches(features, np.arange(4), batch_size=2, seed=0)
        >>> sorted(row for _ in range(2) for row in next(data).classes_BT[:, 0].tolist())
        [0, 1, 2, 3]
    """

    def __init__(self, features: Features, rows_B: np.ndarray, batch_size: int, seed: int) -> None:
        self._features, self._rows_B, self._seed = features, rows_B, seed
        self._size = min(batch_size, len(rows_B))
        self._done = 0

    def __iter__(self) -> Iterator[Features]:
        return self

    def __next__(self) -> Features:
        per_epoch = len(self._rows_B) // self._size
        epoch, at = divmod(self._done, per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._rows_B))
        self._done += 1
        return self._features.take(self._rows_B[order[at * self._size : (at + 1) * self._size]])

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
    training_B, heldout_B = _split_rows(features)
    total = count_scout_steps(steps)
    fits: list[ScoutFit] = []
    for n_steps in _step_counts(steps):
        cfg = TrainConfig(
            steps=n_steps,
            batch_size=min(batch_size, len(training_B)),
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

        data = FeatureBatches(features, training_B, cfg.batch_size, cfg.seed)
        fitted = _fit_scout(scout, data, cfg, optimizer(cfg), show)
        bits = _measure_nats(fitted.trained, features, heldout_B) * _BITS
        fits.append(
            ScoutFit(scout=fitted.trained, heldout_bits=bits, steps=n_steps, seconds=fitted.seconds)
        )
    best = min(fits, key=_rank_fit)
    return dataclasses.replace(best, seconds=sum(tried.seconds for tried in fits))


def _split_rows(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the rows to train on, and every tenth, which is held out.

    Raises:
        TextError: If there are fewer than two rows.
    """
    n_rows = len(features.classes_BT)
    if n_rows < 2:
        raise TextError("one row of text cannot be split into training and held-out text")
    is_heldout_B = np.arange(n_rows) % 10 == 1
    return np.flatnonzero(~is_heldout_B), np.flatnonzero(is_heldout_B)


def _fit_scout(
    scout: Scout,
    data: FeatureBatches,
    cfg: TrainConfig,
    optimizer: optax.GradientTransformation,
    progress: StepProgress,
) -> Fitted:
    """Train a copy of a scout."""
    graph, params = nnx.split(scout)
    objective = _scout_objective(graph)
    fitted = fit(objective, params, (), data, cfg, optimizer=optimizer, progress=progress)
    return dataclasses.replace(fitted, trained=nnx.merge(graph, fitted.trained))


@lru_cache(maxsize=8)
def _scout_objective(graph: nnx.GraphDef[Any]) -> Objective:
    """Return the objective of a scout on rows of features, one for scouts of one structure."""

    def objective(params: Any, frozen: Any, rows: Features) -> tuple[jax.Array, Any]:
        loss = scout_loss(nnx.merge(graph, params), rows.feature_BTD, rows.classes_BT)
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


def _measure_nats(scout: Scout, features: Features, rows_B: np.ndarray) -> float:
    """Return the mean loss over rows, one at a time: one program serves any number of them."""
    return float(
        np.mean([_row_nats(scout, *features.take(rows_B[i : i + 1])) for i in range(len(rows_B))])
    )


_row_nats = jax.jit(scout_loss)
