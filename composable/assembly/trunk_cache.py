"""What the trunk gives for rows of text, computed once and kept on disk, so that training an expert
runs nothing below the tap.

The trunk is frozen, so the residual stream at the tap is a fact about the text. It is stored in the
dtype that the trunk computes in, so training on it is the same computation: no rounding comes in
between. A file appears whole or not at all, named by the digest of all that decides its content.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jax
import numpy as np
import platformdirs

from composable.assembly.backbones import BackboneRelease
from composable.assembly.features import Features
from composable.interface import canonical_json, digest_bytes
from composable.model.backbone import Backbone
from composable.packaging.atomic import Sink
from composable.training.data import TappedRows
from composable.training.loop import TrainConfig

# Rows that go through the trunk at once.
_BATCH: Final = 4
# A scout may read the text alone for this share of what the body's training costs ...
_SCOUT_SHARE: Final = 0.02
# ... but no more often than this: it learns nothing new.
_MAX_SCOUT_PASSES: Final = 20


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How often training reads each token of the text, and so whether the cache pays.

    Args:
        body: Passes of body and scout together.
        scout: Further passes of the scout alone; each costs next to nothing, once the trunk's
            output is at hand.
    """

    body: float
    scout: int

    @property
    def pays_cache(self) -> bool:
        """Whether what the trunk gives is read at least twice: else keeping it saves nothing."""
        return self.body + self.scout >= 2


def plan_reading(backbone: Backbone, scout_width: int, cfg: TrainConfig, n_tokens: int) -> Reading:
    """Return how often a run reads its text.

    Args:
        backbone: The model.
        scout_width: Hidden width of the expert's scout.
        cfg: The run.
        n_tokens: Tokens of the text.
    """
    passes = int(
        _SCOUT_SHARE * upper_parameters(backbone) / _scout_parameters(backbone, scout_width)
    )
    return Reading(
        body=max(1.0, cfg.tokens / n_tokens),
        scout=min(passes, _MAX_SCOUT_PASSES) if passes >= 2 else 0,
    )


def trunk_parameters(backbone: Backbone) -> int:
    """Return how many weights every token is multiplied by below the tap."""
    return _layer_parameters(backbone) * backbone.cfg.tap


def upper_parameters(backbone: Backbone) -> int:
    """Return how many weights every token is multiplied by above the tap, logits included."""
    unembed = backbone.cfg.vocab_size * backbone.cfg.d_model
    return _layer_parameters(backbone) * len(backbone.cfg.slots) + unembed


def run_trunk(
    release: BackboneRelease,
    tokens_RT: np.ndarray,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TappedRows:
    """Return rows of text with what the trunk gives for them, from the cache if it is there.

    Args:
        release: The backbone.
        tokens_RT: Rows of T + 1 tokens.
        cache: Folder of cached files; in the user's cache folder by default.
        progress: Called with positions done and in all.
    """
    cfg = release.backbone.cfg
    dtype = np.dtype(release.backbone.embed[...].dtype)
    tokens_RT = np.ascontiguousarray(tokens_RT, np.int32)
    shape = (len(tokens_RT), tokens_RT.shape[1] - 1, cfg.d_model)
    key = {
        "config": cfg.to_dict(),
        "trunk": release.interface.trunk,
        "tokens": digest_bytes(tokens_RT.tobytes()),
        "shape": list(shape),
    }
    name = digest_bytes(canonical_json(key)).removeprefix("sha256:")[:32]
    path = (cache or _cache_folder()) / f"{name}.tap"
    if not path.is_file() or path.stat().st_size != math.prod(shape) * dtype.itemsize:
        _write(release.backbone, tokens_RT[:, :-1], path, progress)
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
    progress: Callable[[int, int], None] | None,
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


def _scout_parameters(backbone: Backbone, width: int) -> int:
    n_classes: int = backbone.scout.b_out.shape[0]
    return width * (backbone.cfg.d_model + n_classes)


def _cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("composable", appauthor=False)) / "trunk"
