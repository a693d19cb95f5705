"""What the trunk gives for rows of text, computed once and kept on disk, so that training an expert
runs nothing below the tap.

The trunk is frozen, so the residual stream at the tap is a fact about the text. It is stored in the
dtype that the trunk computes in, so training on it is the same computation: no rounding comes in
between. A file appears whole or not at all, named by the digest of all that decides its content.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jax
import numpy as np

from composable.assembly.backbones import LoadedBackbone
from composable.errors import TextError
from composable.files.atomic import Sink
from composable.interface import canonical_json, digest_bytes
from composable.model.backbone import Backbone
from composable.progress import CountProgress
from composable.training.config import TrainConfig
from composable.training.data import TappedRows
from composable.training.scouts import Features

# Rows that go through the trunk at once.
_BATCH: Final = 4
# What the trunk gives is kept where a run asks it for this much, weights times tokens: minutes of
# two cores ...
_WORTH_KEEPING: Final = 8e11
# ... and for this much, some seconds, it is run once more.
_CHEAP: Final = 4e11
# A scout reads this many times as many tokens as the body is trained on, while the trunk is cheap.
_SCOUT_SHARE: Final = 8
# Positions that a scout is trained on, in passes over its text: as many as this, but ...
_SCOUT_POSITIONS: Final = 2_000_000
# ... few passes teach it too little, and after many it learns nothing new.
_SCOUT_PASSES: Final = (4, 20)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What training reads of a text, and so whether what the trunk gives for it is worth keeping.

    Args:
        scout_tokens: Tokens that the scout reads alone, once body and scout were trained together.
        scout_steps: Optimiser steps that it reads them in, several times over: each costs next to
            nothing.
        pays_cache: Whether what the trunk gives is kept on disk, and read from there by both.
    """

    scout_tokens: int
    scout_steps: int
    pays_cache: bool


def plan_reading(backbone: Backbone, cfg: TrainConfig, n_tokens: int, scout_rows: int) -> Reading:
    """Return what a run reads of its text.

    A scout learns most from reading much (ADR 11), so it reads what more the trunk gives cheaply.
    Where the trunk is so large that the text is run through it in minutes, body and scout read the
    same tokens from disk; an accelerator runs it faster than a disk is read.

    Args:
        backbone: The model.
        cfg: The run.
        n_tokens: Tokens of the text.
        scout_rows: Rows of each of the scout's steps.
    """
    trunk, own = trunk_parameters(backbone), min(cfg.tokens, n_tokens)
    cheap = min(_SCOUT_SHARE * cfg.tokens, int(_CHEAP / trunk))
    tokens = min(n_tokens, max(own, cheap))
    n_rows = min(n_tokens - 1, tokens) // cfg.window
    passes = int(np.clip(round(_SCOUT_POSITIONS / tokens), *_SCOUT_PASSES))
    return Reading(
        scout_tokens=tokens,
        # One row cannot be split into what is learnt from and what is measured on.
        scout_steps=max(1, passes * n_rows // scout_rows) if n_rows > 1 else 0,
        pays_cache=jax.default_backend() == "cpu" and trunk * cfg.tokens > _WORTH_KEEPING,
    )


def trunk_parameters(backbone: Backbone) -> int:
    """Return how many weights every token is multiplied by below the tap."""
    return _layer_parameters(backbone) * backbone.cfg.tap


def upper_parameters(backbone: Backbone) -> int:
    """Return how many weights every token is multiplied by above the tap, logits included."""
    unembed = backbone.cfg.vocab_size * backbone.cfg.d_model
    return _layer_parameters(backbone) * len(backbone.cfg.slots) + unembed


def run_trunk(
    loaded: LoadedBackbone,
    tokens_RT: np.ndarray,
    cache: Path,
    progress: CountProgress | None = None,
) -> TappedRows:
    """Return rows of text with what the trunk gives for them, from the cache if it is there.

    Args:
        loaded: The backbone.
        tokens_RT: Rows of T + 1 tokens.
        cache: Folder of cached files. What the trunk gives tells much of the text: they are as
            private.
        progress: Called with positions done and in all.
    """
    cfg = loaded.backbone.cfg
    dtype = np.dtype(loaded.backbone.embed[...].dtype)
    tokens_RT = np.ascontiguousarray(tokens_RT, np.int32)
    shape = (len(tokens_RT), tokens_RT.shape[1] - 1, cfg.d_model)
    key = {
        "config": cfg.to_dict(),
        "trunk": loaded.interface.trunk,
        "tokens": digest_bytes(tokens_RT.tobytes()),
        "shape": list(shape),
    }
    name = digest_bytes(canonical_json(key)).removeprefix("sha256:")[:32]
    path = cache / f"{name}.tap"
    if not path.is_file() or path.stat().st_size != math.prod(shape) * dtype.itemsize:
        _write(loaded.backbone, tokens_RT[:, :-1], path, progress)
    return TappedRows(tokens_RT, np.memmap(path, dtype, "r", shape=shape))


def scout_features(backbone: Backbone, rows: TappedRows) -> Features:
    """Return what a scout reads at every position of the rows, and the class that follows."""
    classes_V = np.asarray(backbone.class_map[...])
    feature_RTD = np.concatenate(
        [np.asarray(_features(backbone, np.array(x_TD)[None])) for x_TD in rows.x_BTD]
    )
    return Features(feature_RTD, classes_V[rows.tokens_BT[:, 1:]])


def _write(
    backbone: Backbone,
    tokens_RT: np.ndarray,
    path: Path,
    progress: CountProgress | None,
) -> None:
    n_rows, window = tokens_RT.shape
    with Sink(path) as sink:
        for start in range(0, n_rows, _BATCH):
            rows_BT = tokens_RT[start : start + _BATCH]
            # Always a full batch, so that one program serves all.
            padded_BT = np.pad(rows_BT, ((0, _BATCH - len(rows_BT)), (0, 0)))
            sink.write(np.asarray(_trunk(backbone, padded_BT))[: len(rows_BT)].tobytes())
            if progress:
                progress(min(start + _BATCH, n_rows) * window, n_rows * window)


@jax.jit
def _trunk(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
    return backbone.trunk(tokens_BT)[0]


@jax.jit
def _features(backbone: Backbone, x_BTD: jax.Array) -> jax.Array:
    return backbone.features(x_BTD)


def _layer_parameters(backbone: Backbone) -> int:
    cfg = backbone.cfg
    attention = 2 * cfg.d_model * cfg.d_head * (cfg.n_heads + cfg.n_kv_heads)
    return attention + 3 * cfg.d_model * cfg.d_ff


# Rows of text that go through the trunk at once.
_TRUNK_ROWS: Final = 8


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
    progress: CountProgress | None = None,
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
    for start in range(0, len(tokens_RT), _TRUNK_ROWS):
        rows_BT = tokens_RT[start : start + _TRUNK_ROWS]
        # Always a full batch, so that one program serves all.
        padded_BT = np.pad(rows_BT, ((0, _TRUNK_ROWS - len(rows_BT)), (0, 0)))
        yield np.asarray(_trunk_features(backbone, padded_BT), np.float16)[: len(rows_BT)]


def _write_features(
    backbone: Backbone,
    tokens_RT: np.ndarray,
    path: Path,
    progress: CountProgress | None,
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
