"""Training of scouts on the features of a frozen trunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import jax
import numpy as np
import optax
from flax import nnx

from composable.errors import TextError
from composable.model.scout import Scout
from composable.progress import StepProgress
from composable.training.config import TrainConfig
from composable.training.loop import fit
from composable.training.objectives import scout_loss
from composable.training.optimizers import muon

# How a scout learns alone: rows per step, and the peak rate, by Muon. Half as much left scouts
# worse, twice as much no better (docs/adr/0011-scouts-read-alone.md).
SCOUT_ROWS: Final = 16
SCOUT_RATE: Final = 2e-2
_BITS: Final = 1 / np.log(2)


@dataclass(frozen=True)
class Features:
    """Features of rows of text, and what follows each position.

    Args:
        feature_RTD: Features, float16; R rows of T positions.
        classes_RT: Class of the token after each position.
    """

    feature_RTD: np.ndarray
    classes_RT: np.ndarray


class RowOrder:
    """Batches of row numbers, in a new order each epoch; a position is a number of batches."""

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
    """A trained scout and how well it predicts classes of text that it did not see, in bits.

    Args:
        scout: The scout.
        heldout_bits: Bits per class on rows that were held out; None where it was not trained.
        steps: Optimiser steps that made it.
        seconds: How long everything took that was tried.
    """

    scout: Scout
    heldout_bits: float | None
    steps: int
    seconds: float

    @classmethod
    def untrained(cls, scout: Scout) -> Self:
        """Return a scout as it is."""
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
    """Train a scout on cached features, much and little, and return the better one.

    Every tenth row is held out, and decides: where there are many classes and little text, all of
    the steps learn the text by heart, and a quarter or a sixteenth of them teaches more.

    Args:
        scout: Where to start, left untouched.
        features: What it reads and what it is to predict.
        steps: Optimiser steps at most; none at all leaves it untrained.
        batch_size: Rows per step.
        learning_rate: Peak.
        optimizer: Makes the optimiser.
        seed: Seed of the rows' order.
        progress: Called at every step, of `count_scout_steps`.

    Raises:
        TextError: If there are fewer than two rows.
    """
    if steps == 0:
        return ScoutFit.untrained(scout)
    n_rows, window, _ = features.feature_RTD.shape
    if n_rows < 2:
        raise TextError("one row of text cannot be split into training and held-out text")
    is_heldout_R = np.arange(n_rows) % 10 == 1
    train_R, heldout_R = np.flatnonzero(~is_heldout_R), np.flatnonzero(is_heldout_R)
    graph, params = nnx.split(scout)

    def objective(params: nnx.State, frozen: Any, rows_B: jax.Array) -> tuple[jax.Array, Any]:
        feature_RTD, classes_RT = frozen
        loss = scout_loss(nnx.merge(graph, params), feature_RTD[rows_B], classes_RT[rows_B])
        return loss, {"scout_bits": loss * _BITS}

    learnt = features.feature_RTD[train_R], features.classes_RT[train_R]
    kept = features.feature_RTD[heldout_R], features.classes_RT[heldout_R]
    fits: list[ScoutFit] = []
    total = count_scout_steps(steps)
    for n_steps in _readings(steps):
        cfg = TrainConfig(
            steps=n_steps,
            batch_size=min(batch_size, len(train_R)),
            window=window,
            learning_rate=learning_rate,
            weight_decay=0.01,
            seed=seed,
            log_every=50,
        )
        before = sum(tried.steps for tried in fits)

        def show(step: int, _: int, row: Mapping[str, float], before: int = before) -> None:
            if progress:
                progress(before + step, total, row)

        order = RowOrder(len(train_R), cfg.batch_size, seed)
        fitted = fit(objective, params, learnt, order, cfg, optimizer=optimizer(cfg), progress=show)
        trained: Scout = nnx.merge(graph, fitted.trained)
        bits = float(_scout_nats(trained, *kept)) * float(_BITS)
        fits.append(
            ScoutFit(scout=trained, heldout_bits=bits, steps=n_steps, seconds=fitted.seconds)
        )
    bits_F = np.array([tried.heldout_bits for tried in fits])
    best = fits[int(np.nan_to_num(bits_F, nan=np.inf).argmin())]
    return dataclasses.replace(best, seconds=sum(tried.seconds for tried in fits))


def count_scout_steps(steps: int) -> int:
    """Return how many steps `train_scout` takes when it may take so many for one scout."""
    return sum(_readings(steps)) if steps else 0


def _readings(steps: int) -> list[int]:
    """Return how long each of the scouts reads that are compared."""
    return sorted({max(1, steps // part) for part in (16, 4, 1)})


@jax.jit
def _scout_nats(scout: Scout, feature_RTD: jax.Array, classes_RT: jax.Array) -> jax.Array:
    def row(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        feature_TD, classes_T = args
        return scout_loss(scout, feature_TD[None], classes_T[None])

    return jax.lax.map(row, (feature_RTD, classes_RT)).mean()
