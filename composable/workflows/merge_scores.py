"""Losses of merged bodies and scouts on text, on trunk outputs that are computed once per text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from composable.assembly.backbones import LoadedBackbone
from composable.corpora.documents import Document
from composable.errors import TextError
from composable.model.backbone import Backbone
from composable.model.body import MATRICES
from composable.model.layers import swiglu
from composable.model.scout import class_log_probs
from composable.vetting.evaluation import BATCH

# Positions of each document, from its start, at most; rows are padded to a multiple of the second,
# so that few programs serve texts of any length.
_WINDOW = 512
_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A text with the trunk's outputs for it, in batches of documents.

    Args:
        backbone: The backbone.
        documents: The documents as UTF-8.
        batches: For each batch the tokens BU, the residual stream at the tap BTD and whether each
            target is part of a document, BT.
        n_tokens: Targets in all.
    """

    backbone: Backbone
    documents: tuple[bytes, ...]
    batches: tuple[tuple[jax.Array, jax.Array, jax.Array], ...]
    n_tokens: int

    def score(self, part: str, matrices: Mapping[str, np.ndarray]) -> float:
        """Return the loss of a body, always on, or of a scout, in nats per token.

        Args:
            part: `body` or `scout`.
            matrices: Of `to_matrices`.
        """
        run = _score_body if part == "body" else _score_scout
        own = {name: w for name, w in matrices.items() if name.startswith(part)}
        device = jax.tree.map(jnp.asarray, own)
        total = sum(float(run(self.backbone, device, *batch)) for batch in self.batches)
        return total / self.n_tokens

    def best(self, part: str, sides: Sequence[Mapping[str, np.ndarray]]) -> float:
        """Return the least loss of several experts.

        Args:
            part: `body` or `scout`.
            sides: Matrices of each.
        """
        return min(self.score(part, matrices) for matrices in sides)


def prepare_text(loaded: LoadedBackbone, documents: Sequence[Document]) -> ScoredText:
    """Run the trunk on the starts of documents.

    Args:
        loaded: The backbone.
        documents: The documents.

    Raises:
        TextError: If there is none, or one is empty.
    """
    texts = [document.text.encode() for document in documents]
    if not texts or not all(texts):
        raise TextError("there are no documents to judge on, or one is empty")
    window = min(_WINDOW, loaded.backbone.cfg.context)
    rows = [loaded.tokenizer.encode(text)[: window + 1] for text in texts]
    longest = max(len(tokens_T) for tokens_T in rows) - 1
    window = min(window, -(-longest // _MULTIPLE) * _MULTIPLE)
    batches, size = [], min(BATCH, len(rows))
    for start in range(0, len(rows), size):
        tokens_BU = np.zeros((size, window + 1), np.int32)
        is_scored_BT = np.zeros((size, window), bool)
        for i, tokens_T in enumerate(rows[start : start + size]):
            tokens_BU[i, : len(tokens_T)] = tokens_T
            is_scored_BT[i, : len(tokens_T) - 1] = True
        x_BTD = _tap(loaded.backbone, tokens_BU[:, :-1])
        batches.append((jnp.asarray(tokens_BU), x_BTD, jnp.asarray(is_scored_BT)))
    return ScoredText(
        backbone=loaded.backbone,
        documents=tuple(texts),
        batches=tuple(batches),
        n_tokens=sum(len(tokens_T) - 1 for tokens_T in rows),
    )


@jax.jit
def _tap(backbone: Backbone, tokens_BT: jax.Array) -> jax.Array:
    x_BTD, _ = backbone.trunk(tokens_BT)
    return x_BTD


@jax.jit
def _score_body(
    backbone: Backbone,
    matrices: Mapping[str, jax.Array],
    tokens_BU: jax.Array,
    x_BTD: jax.Array,
    is_scored_BT: jax.Array,
) -> jax.Array:
    def feed_forward(layer: int, h_BTD: jax.Array) -> jax.Array:
        slot = (matrices[f"body.slots.{layer}.{name}"].astype(h_BTD.dtype) for name in MATRICES)
        return swiglu(h_BTD, *slot)

    logits_BTV, _ = backbone.upper(x_BTD, feed_forward)
    return _sum_nats(jax.nn.log_softmax(logits_BTV), tokens_BU[:, 1:], is_scored_BT)


@jax.jit
def _score_scout(
    backbone: Backbone,
    matrices: Mapping[str, jax.Array],
    tokens_BU: jax.Array,
    x_BTD: jax.Array,
    is_scored_BT: jax.Array,
) -> jax.Array:
    w_in_DW, w_out_WC = matrices["scout.w_in"], matrices["scout.w_out"]
    parts = w_in_DW[:-1], w_in_DW[-1], w_out_WC[:-1], w_out_WC[-1]
    log_prob_BTC = class_log_probs(backbone.features(x_BTD), *parts)
    return _sum_nats(log_prob_BTC, backbone.class_map[...][tokens_BU[:, 1:]], is_scored_BT)


def _sum_nats(log_prob_BTV: jax.Array, targets_BT: jax.Array, is_scored_BT: jax.Array) -> jax.Array:
    nats_BT = -jnp.take_along_axis(log_prob_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.where(is_scored_BT, nats_BT, 0).sum()
