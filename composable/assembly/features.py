"""Trunk features of a text, computed once and kept on disk: scouts learn from them in minutes.

The trunk is frozen, so its features at every position are facts about the text. They are stored in
float16: they have unit root mean square, and scouts cannot tell the difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import jax
import numpy as np
import optax
from flax import nnx

from composable.errors import TextError
from composable.interface import canonical_json, digest_bytes
from composable.model.backbone import Backbone
from composable.model.scout import Scout
from composable.packaging.atomic import Sink
from composable.training.loop import Progress, TrainConfig, fit, muon
from composable.training.objectives import scout_loss

# How a scout learns alone: rows per step, and the peak rate, by Muon. Half as much left scouts
# worse, twice as much no better (docs/adr/0011-scouts-read-alone.md).
SCOUT_ROWS: Final = 16
SCOUT_RATE: Final = 2e-2
_BITS: Final = 1 / np.log(2)
# Rows of text that go through the trunk at once.
_BATCH: Final = 8


@dataclass(frozen=True)
class Features:
    """Features of rows of text, and what follows each position.

    Args:
        feature_RTD: Features, float16; R rows of T positions.
        classes_RT: Class of the token after each position.
    """

    feature_RTD: np.ndarray
    classes_RT: np.ndarray


def cut_rows(stream_T: np.ndarray, window: int, max_tokens: int) -> np.ndarray:
    """Return rows of `window` + 1 tokens, spread evenly over a stream.

    Args:
        stream_T: Tokens of all documents.
        window: Positions of a row.
        max_tokens: Positions in all rows together, at most.

    Raises:
        TextError: If the stream is shorter than one row.
    """
    n_rows = min((len(stream_T) - 1) // window, max(1, max_tokens // window))
    if n_rows < 1:
        raise TextError(
            f"{len(stream_T)} tokens of text, but one row takes {window + 1}",
            hint="give more text",
        )
    starts = np.linspace(0, len(stream_T) - window - 1, n_rows).astype(int)
    return np.stack([stream_T[start : start + window + 1] for start in starts]).astype(np.int32)


def compute_features(
    backbone: Backbone,
    identity: str,
    tokens_RT: np.ndarray,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Return the trunk's features of rows of text, from the cache if they are there.

    Args:
        backbone: The model.
        identity: Digest of what decides the features, such as that of the trunk.
        tokens_RT: Rows of T + 1 tokens.
        cache: Folder of cached features.
        progress: Called with positions done and in all.
    """
    key = {"trunk": identity, "tap": backbone.cfg.tap, "tokens": digest_bytes(tokens_RT.tobytes())}
    name = digest_bytes(canonical_json(key)).removeprefix("sha256:")[:32]
    path = cache / f"{name}.npy"
    if not path.is_file():
        _write_features(backbone, tokens_RT[:, :-1], path, progress)
    classes_V = np.asarray(backbone.class_map[...])
    return Features(np.load(path, mmap_mode="r"), classes_V[tokens_RT[:, 1:]])


def trunk_features(backbone: Backbone, tokens_RT: np.ndarray) -> Features:
    """Return the trunk's features of rows of text, kept nowhere but in memory.

    Args:
        backbone: The model.
        tokens_RT: Rows of T + 1 tokens.
    """
    parts = list(_feature_batches(backbone, tokens_RT[:, :-1]))
    classes_V = np.asarray(backbone.class_map[...])
    return Features(np.concatenate(parts), classes_V[tokens_RT[:, 1:]])


def _feature_batches(backbone: Backbone, tokens_RT: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the features of some rows after the other, float16."""
    for start in range(0, len(tokens_RT), _BATCH):
        rows_BT = tokens_RT[start : start + _BATCH]
        # Always a full batch, so that one program serves all.
        padded_BT = np.pad(rows_BT, ((0, _BATCH - len(rows_BT)), (0, 0)))
        yield np.asarray(_trunk_features(backbone, padded_BT), np.float16)[: len(rows_BT)]


def _write_features(
    backbone: Backbone,
    tokens_RT: np.ndarray,
    path: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    n_rows, window = tokens_RT.shape
    shape = (n_rows, window, backbone.cfg.d_model)
    with Sink(path) as sink:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(_Writable(sink), header)
        done = 0
        for feature_BTD in _feature_batches(backbone, tokens_RT):
            sink.write(feature_BTD.tobytes())
            done += len(feature_BTD) * window
            if progress:
                progress(done, n_rows * window)


class _Writable:
    """A sink as NumPy's header writer wants a file."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: bytes) -> int:
        self._sink.write(data)
        return len(data)


@jax.jit
def _trunk_features(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
    x_BTD, _ = backbone.trunk(tokens_BT)
    return backbone.features(x_BTD)


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
    progress: Progress | None = None,
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
