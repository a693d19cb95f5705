"""The trunk's activations for rows of text, computed once and cached on disk.

The trunk is frozen, so the residual stream at the tap and the features depend on the text alone.
The residual stream is stored in the dtype that the trunk computes in: training on it is the same
computation, without rounding in between. Features are stored in float16. A file appears whole or
not at all, and is named by the digest of everything that decides its content.

Deliberately not here: training, and the removal of old files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from composable.assembly.backbones import LoadedBackbone
from composable.errors import TextError
from composable.files import atomic
from composable.files.atomic import Sink
from composable.interface import canonical_json, digest_bytes
from composable.model.backbone import Backbone
from composable.model.config import DTYPE_NAMES
from composable.progress import CountProgress
from composable.training.config import TrainConfig
from composable.training.data import TappedRows
from composable.training.scouts import Features
from composable.vetting.trunk import Output, Trunk

# Rows of text that go through the trunk at once, for the residual stream and for features. Batches
# of another size may round differently, and cached files are compared by their bytes.
_TAP_ROWS: Final = 4
_FEATURE_ROWS: Final = 8
# The trunk's activations are cached where a run needs this much work of it, in weights times
# tokens: minutes on two cores ...
_WORTH_CACHING: Final = 8e11
# ... and the trunk is run again where it is this much, a few seconds.
_CHEAP: Final = 4e11
# While the trunk is cheap, a scout is trained on this many times as many tokens as the body.
_SCOUT_SHARE: Final = 8
# Positions that a scout is trained on, over all passes: as many as this, but ...
_SCOUT_POSITIONS: Final = 2_000_000
# ... too few passes leave it undertrained, and after many it no longer improves.
_SCOUT_PASSES: Final = (4, 20)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How much text the scout-only steps of a run use, and whether the trunk is cached.

    Args:
        scout_tokens: Tokens of text for the scout-only steps, after body and scout were trained
            together.
        scout_steps: Optimiser steps on those tokens, in several passes; 0 if there is too little
            text.
        caches_trunk: Whether the trunk's activations are kept on disk and read from there.
    """

    scout_tokens: int
    scout_steps: int
    caches_trunk: bool


def plan_training(
    backbone: Backbone, cfg: TrainConfig, n_tokens: int, scout_rows: int, n_sharing: int = 1
) -> TrainingPlan:
    """Return how much text the scout-only steps use, and whether the trunk is cached.

    A scout improves most with more text (ADR 11), so it gets what more the trunk can process
    cheaply: more for runs that share its outputs. Where the trunk takes minutes, a run of its own
    trains body and scout on the same tokens from disk; an
    accelerator recomputes activations faster than a disk delivers them.

    Args:
        backbone: The model.
        cfg: How the expert is trained.
        n_tokens: Tokens of the text.
        scout_rows: Rows of each scout-only step.
        n_sharing: Runs on the same text that read the same outputs of the trunk.
    """
    trunk, own = count_trunk_parameters(backbone), min(cfg.tokens, n_tokens)
    cheap = min(_SCOUT_SHARE * cfg.tokens, int(n_sharing * _CHEAP / trunk))
    tokens = min(n_tokens, max(own, cheap))
    n_rows = min(n_tokens - 1, tokens) // cfg.window
    passes = int(np.clip(round(_SCOUT_POSITIONS / tokens), *_SCOUT_PASSES))
    return TrainingPlan(
        scout_tokens=tokens,
        # One row cannot be split into training and held-out text.
        scout_steps=max(1, passes * n_rows // scout_rows) if n_rows > 1 else 0,
        caches_trunk=is_worth_caching(backbone, cfg),
    )


def is_worth_caching(backbone: Backbone, cfg: TrainConfig) -> bool:
    """Return whether a run keeps the trunk's activations on disk and reads them from there.

    Args:
        backbone: The model.
        cfg: How the expert is trained.
    """
    work = count_trunk_parameters(backbone) * cfg.tokens
    return jax.default_backend() == "cpu" and work > _WORTH_CACHING


def count_trunk_parameters(backbone: Backbone) -> int:
    """Return how many weights multiply every token below the tap."""
    return _count_layer_parameters(backbone) * backbone.cfg.tap


def count_upper_parameters(backbone: Backbone) -> int:
    """Return how many weights multiply every token above the tap, logits included."""
    unembed = backbone.cfg.vocab_size * backbone.cfg.d_model
    return _count_layer_parameters(backbone) * len(backbone.cfg.slots) + unembed


def cut_rows(stream_M: np.ndarray, window: int, max_tokens: int) -> np.ndarray:
    """Return rows of `window` + 1 tokens, spread evenly over a stream.

    Args:
        stream_M: Tokens of all documents.
        window: Positions to predict per row.
        max_tokens: Positions to predict in all rows together, at most; one row is always cut.

    Returns:
        Tokens, int32, shape BU with U = `window` + 1.

    Raises:
        TextError: If the stream is shorter than one row.

    Example:
        >>> cut_rows(np.arange(9), window=3, max_tokens=6)
        array([[0, 1, 2, 3],
               [5, 6, 7, 8]], dtype=int32)
    """
    n_rows = min((len(stream_M) - 1) // window, max(1, max_tokens // window))
    if n_rows < 1:
        raise TextError(
            f"{len(stream_M)} tokens of text, but one row takes {window + 1}",
            hint="give more text",
        )
    starts_B = np.linspace(0, len(stream_M) - window - 1, n_rows).astype(int)
    return np.stack([stream_M[start : start + window + 1] for start in starts_B]).astype(np.int32)


def run_trunk(
    loaded: LoadedBackbone,
    tokens_BU: np.ndarray,
    cache: Path,
    progress: CountProgress | None = None,
) -> TappedRows:
    """Return rows of text with the residual stream at the tap, from the cache if it is there.

    Args:
        loaded: The backbone.
        tokens_BU: Rows of `window` + 1 tokens.
        cache: Folder of cached files. Activations reveal much of the text: keep them as private.
        progress: Called with positions done and in all.
    """
    cfg = loaded.backbone.cfg
    dtype = np.dtype(DTYPE_NAMES[cfg.dtype])
    tokens_BU = np.ascontiguousarray(tokens_BU, np.int32)
    shape = (len(tokens_BU), tokens_BU.shape[1] - 1, cfg.d_model)
    key = {
        "config": cfg.to_dict(),
        "trunk": loaded.interface.trunk,
        "tokens": digest_bytes(tokens_BU.tobytes()),
        "shape": list(shape),
    }
    path = cache / f"{_cache_name(key)}.tap"
    if not path.is_file() or path.stat().st_size != math.prod(shape) * dtype.itemsize:
        batches = _run_batches(_tap, loaded.backbone, tokens_BU[:, :-1], _TAP_ROWS)
        with Sink(path) as sink:
            _write_batches(sink, batches, shape, progress)
    return TappedRows(tokens_BU, np.memmap(path, dtype, "r", shape=shape))


class StoredTrunk(Trunk):
    """A trunk whose outputs for public text are kept on disk, for other processes.

    Args:
        loaded: The backbone.
        folder: Folder of the outputs.
    """

    def __init__(self, loaded: LoadedBackbone, folder: Path) -> None:
        super().__init__(loaded.backbone)
        self._folder = folder
        self._identity = {"config": loaded.backbone.cfg.to_dict(), "trunk": loaded.interface.trunk}

    def compute(self, output: Output, tokens_BT: np.ndarray) -> jax.Array:
        """Run the trunk, or read what another process computed."""
        key = {
            **self._identity,
            "output": output,
            "tokens": digest_bytes(tokens_BT.tobytes()),
            "shape": list(tokens_BT.shape),
            "jax": jax.__version__,
            "platform": jax.default_backend(),
        }
        cfg = self.backbone.cfg
        path = self._folder / f"{_cache_name(key)}.{output}"
        dtype = np.dtype(DTYPE_NAMES[cfg.dtype] if output == "tap" else np.float32)
        shape = (*tokens_BT.shape, cfg.d_model)
        # Without the lock, processes that start together would all run the trunk.
        with atomic.advisory_lock(path.with_suffix(".lock")):
            if not path.is_file() or path.stat().st_size != math.prod(shape) * dtype.itemsize:
                atomic.write_bytes(path, np.asarray(super().compute(output, tokens_BT)).tobytes())
        return jnp.asarray(np.memmap(path, dtype, "r", shape=shape))


def compute_features(
    backbone: Backbone,
    identity: str,
    tokens_BU: np.ndarray,
    cache: Path,
    progress: CountProgress | None = None,
) -> Features:
    """Return the trunk's features of rows of text, from the cache if they are there.

    Args:
        backbone: The model.
        identity: Digest of what decides the features, such as that of the trunk.
        tokens_BU: Rows of `window` + 1 tokens.
        cache: Folder of cached features.
        progress: Called with positions done and in all.
    """
    key = {"trunk": identity, "tap": backbone.cfg.tap, "tokens": digest_bytes(tokens_BU.tobytes())}
    path = cache / f"{_cache_name(key)}.npy"
    if not path.is_file():
        shape = (len(tokens_BU), tokens_BU.shape[1] - 1, backbone.cfg.d_model)
        with Sink(path) as sink:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(_Writable(sink), header)
            _write_batches(sink, _feature_batches(backbone, tokens_BU), shape, progress)
    return _label_features(backbone, np.load(path, mmap_mode="r"), tokens_BU)


def trunk_features(
    backbone: Backbone, tokens_BU: np.ndarray, progress: CountProgress | None = None
) -> Features:
    """Return the trunk's features of rows of text, without a cache.

    Args:
        backbone: The model.
        tokens_BU: Rows of `window` + 1 tokens.
        progress: Called with rows done and in all.
    """
    batches: list[np.ndarray] = []
    for batch_BTD in _feature_batches(backbone, tokens_BU):
        batches.append(batch_BTD)
        if progress:
            progress(min(len(batches) * _FEATURE_ROWS, len(tokens_BU)), len(tokens_BU))
    feature_BTD = np.concatenate(batches)
    return _label_features(backbone, feature_BTD, tokens_BU)


def scout_features(backbone: Backbone, rows: TappedRows) -> Features:
    """Return the features of rows whose trunk was run before.

    Args:
        backbone: The model.
        rows: What `run_trunk` returned.
    """
    feature_BTD = np.concatenate(
        [np.asarray(_features(backbone, np.array(x_TD)[None])) for x_TD in rows.x_BTD]
    )
    return _label_features(backbone, feature_BTD, rows.tokens_BU)


def _label_features(backbone: Backbone, feature_BTD: np.ndarray, tokens_BU: np.ndarray) -> Features:
    """Return features with the class of the token after each position."""
    classes_V = np.asarray(backbone.class_map[...])
    return Features(feature_BTD, classes_V[tokens_BU[:, 1:]])


def _cache_name(key: Mapping[str, Any]) -> str:
    return digest_bytes(canonical_json(key)).removeprefix("sha256:")[:32]


def _feature_batches(backbone: Backbone, tokens_BU: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the features of batches of rows, float16, from rows of `window` + 1 tokens."""
    batches = _run_batches(_trunk_features, backbone, tokens_BU[:, :-1], _FEATURE_ROWS)
    return (feature_BTD.astype(np.float16, copy=False) for feature_BTD in batches)


def _run_batches(
    program: Callable[[Backbone, np.ndarray], jax.Array],
    backbone: Backbone,
    inputs_BT: np.ndarray,
    n_rows: int,
) -> Iterator[np.ndarray]:
    """Yield what a program of the trunk gives for `n_rows` rows at a time."""
    for start in range(0, len(inputs_BT), n_rows):
        batch_BT = inputs_BT[start : start + n_rows]
        # Always a full batch, so that one compiled program serves all.
        padded_BT = np.pad(batch_BT, ((0, n_rows - len(batch_BT)), (0, 0)))
        yield np.asarray(program(backbone, padded_BT))[: len(batch_BT)]


def _write_batches(
    sink: Sink,
    batches: Iterator[np.ndarray],
    shape: tuple[int, int, int],
    progress: CountProgress | None,
) -> None:
    """Write batches of rows one after the other; `shape` is that of all rows together."""
    n_rows, window, _ = shape
    done = 0
    for batch_BTD in batches:
        sink.write(batch_BTD.tobytes())
        done += len(batch_BTD) * window
        if progress:
            progress(done, n_rows * window)


class _Writable:
    """A sink with the `write` method that NumPy's header writer expects."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: bytes) -> int:
        self._sink.write(data)
        return len(data)


@jax.jit
def _tap(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
    x_BTD, _ = backbone.trunk(tokens_BT)
    return x_BTD


@jax.jit
def _features(backbone: Backbone, x_BTD: jax.Array) -> jax.Array:
    return backbone.features(x_BTD)


@jax.jit
def _trunk_features(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
    x_BTD, _ = backbone.trunk(tokens_BT)
    return backbone.features(x_BTD)


def _count_layer_parameters(backbone: Backbone) -> int:
    cfg = backbone.cfg
    attention = 2 * cfg.d_model * cfg.d_head * (cfg.n_heads + cfg.n_kv_heads)
    return attention + 3 * cfg.d_model * cfg.d_ff
