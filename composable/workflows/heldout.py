"""What a trained expert predicts of the text that its training held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from flax import nnx

from composable.assembly.backbones import LoadedBackbone
from composable.assembly.experts import load_expert, make_expert
from composable.corpora.documents import read_documents
from composable.model.body import Expert
from composable.packaging.manifests.manifest import Manifest
from composable.training.config import TrainConfig
from composable.training.data import TappedRows, token_stream
from composable.training.objectives import tapped_objective
from composable.workflows.trunk_cache import cut_rows, run_trunk
from composable.workflows.workspace import HELDOUT_FILE, WORK

# Tokens of held-out text that are predicted, at most. A short training has fewer, a quarter of its
# own, so that measuring takes a twelfth of its time; but no fewer than tell experts apart.
_TOKENS: Final = (1 << 11, 1 << 14)


@dataclass(frozen=True, kw_only=True)
class HeldoutFigures:
    """Losses of an expert on its held-out text.

    Args:
        bits_per_token: Of its body, always on.
        scout_bits: Bits per class of its scout.
    """

    bits_per_token: float
    scout_bits: float


def measure_heldout(
    loaded: LoadedBackbone, folder: Path, cfg: TrainConfig, cache: Path
) -> HeldoutFigures:
    """Return the losses of a trained expert on the text that its training held out.

    Args:
        loaded: The backbone.
        folder: The expert.
        cfg: How it was trained: the rows of a batch, and their length at most.
        cache: Folder for the trunk's outputs, which experts with the same held-out text share.

    Raises:
        TextError: If the held-out text is shorter than two tokens.
    """
    stream_M = token_stream(read_documents([folder / WORK / HELDOUT_FILE]), loaded.tokenizer)
    window = max(1, min(cfg.window, len(stream_M) - 1))
    n_tokens = int(np.clip(cfg.tokens // 4, *_TOKENS))
    rows = run_trunk(loaded, cut_rows(stream_M, window, n_tokens), cache)
    parts, manifest = load_expert(loaded, folder), Manifest.read(folder)
    expert: Expert = nnx.eval_shape(lambda: make_expert(loaded.backbone, manifest, None))
    expert.body, expert.scout = parts.body, parts.scout
    graph, params = nnx.split(expert)
    objective = jax.jit(tapped_objective(graph))
    figures = []
    for start in range(0, len(rows.tokens_BU), cfg.batch_size):
        end = start + cfg.batch_size
        batch = TappedRows(rows.tokens_BU[start:end], np.array(rows.x_BTD[start:end]))
        found: Mapping[str, Any] = objective(params, loaded.backbone, batch)[1]
        figures.append({name: len(batch.tokens_BU) * float(x) for name, x in found.items()})
    return HeldoutFigures(
        **{
            name: sum(row[name] for row in figures) / len(rows.tokens_BU)
            for name in ("bits_per_token", "scout_bits")
        }
    )
