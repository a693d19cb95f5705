"""Bits per byte of documents under any way of using a model, and who was trusted where.

A document is read in consecutive windows of the model's context. Attention restarts with each
window, for every method alike; the router's track record, which is one number per expert, is
carried on, since it speaks of the document and not of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from composable.errors import TextError
from composable.model import bank as banks
from composable.model import composed
from composable.model.body import SlotMatrices
from composable.model.composed import Parts
from composable.model.model import BACKBONE, Model
from composable.model.tokenizer import ByteTokenizer

# Documents scored at once: fixed, so that every call runs the same compiled program.
BATCH: Final = 8


@dataclass(frozen=True)
class Score:
    """What a text cost.

    Args:
        nats: Negative log likelihood of each document.
        n_bytes: Bytes of each document.
    """

    nats: np.ndarray
    n_bytes: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """Total bits over total bytes."""
        return float(self.nats.sum() / self.n_bytes.sum() / np.log(2))


# (tokens BT, targets BT, state) -> (negative log likelihood BT, state); state None begins.
Scorer = Callable[[jax.typing.ArrayLike, jax.typing.ArrayLike, Any], tuple[jax.Array, Any]]


def mix_scorer(model: Model) -> Scorer:
    """Return the scorer of mix mode."""
    return partial(_score_mix, model.parts)


def safe_scorer(model: Model) -> Scorer:
    """Return the scorer of safe mode."""
    return partial(_score_safe, model.parts)


def path_scorer(model: Model, name: str = BACKBONE) -> Scorer:
    """Return the scorer of one expert always on, or of the backbone alone."""
    index = model.names.index(name)
    return slots_scorer(model, banks.entry_slots(model.parts.bank, index))


def slots_scorer(model: Model, slots: tuple[SlotMatrices, ...]) -> Scorer:
    """Return the scorer of a body, given as the matrices of every slot, always on."""
    return partial(_score_path, model.parts, slots)


def score_documents(
    scorer: Scorer,
    documents: Sequence[bytes],
    *,
    context: int,
    max_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score documents.

    Args:
        scorer: How to use the model.
        documents: UTF-8 texts, not empty.
        context: Window, in tokens.
        max_bytes: Score at most this many bytes of each document.
        progress: Called with documents done and documents in all.

    Raises:
        TextError: If there are no documents, or one is empty.
    """
    nats, n_bytes = [], []
    for start in range(0, len(documents), BATCH):
        chunk = documents[start : start + BATCH]
        tokens_BT, mask_BT = _to_windows(chunk, context, max_bytes)
        nats_B = np.zeros(BATCH)
        state = None
        for at in range(0, mask_BT.shape[1], context):
            window = slice(at, at + context)
            inputs_BT = tokens_BT[:, :-1][:, window]
            nll_BT, state = scorer(inputs_BT, tokens_BT[:, 1:][:, window], state)
            nats_B += np.where(mask_BT[:, window], np.asarray(nll_BT, np.float64), 0).sum(axis=1)
        nats.append(nats_B[: len(chunk)])
        n_bytes.append(mask_BT.sum(axis=1)[: len(chunk)])
        if progress:
            progress(min(start + BATCH, len(documents)), len(documents))
    if not documents:
        raise TextError("there are no documents to score")
    return Score(np.concatenate(nats), np.concatenate(n_bytes))


def trace_routing(
    model: Model, documents: Sequence[bytes], *, max_bytes: int | None = None
) -> list[np.ndarray]:
    """Return who was trusted to predict each byte of every document.

    Args:
        model: The model.
        documents: UTF-8 texts, not empty.
        max_bytes: Trace at most this many bytes of each document.

    Returns:
        Weights of shape (bytes, E) for each document; entry e belongs to `model.names[e]`.
    """
    traces = []
    for start in range(0, len(documents), BATCH):
        chunk = documents[start : start + BATCH]
        tokens_BT, mask_BT = _to_windows(chunk, model.context, max_bytes)
        state, pieces = None, []
        for at in range(0, mask_BT.shape[1], model.context):
            inputs_BT = tokens_BT[:, :-1][:, at : at + model.context]
            weight_BTE, state = _route(model.parts, inputs_BT, state)
            pieces.append(np.asarray(weight_BTE))
        weight_BTE = np.concatenate(pieces, axis=1)
        traces += [weight_BTE[i][mask_BT[i]] for i in range(len(chunk))]
    return traces


def _to_windows(
    documents: Sequence[bytes], context: int, max_bytes: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens of shape (BATCH, n * context + 1) and which targets count."""
    encode = ByteTokenizer().encode
    rows = [
        encode(document)[: None if max_bytes is None else max_bytes + 1] for document in documents
    ]
    longest = max(len(row) for row in rows) - 1
    width = -(-longest // context) * context
    tokens_BT = np.zeros((BATCH, width + 1), np.int32)
    mask_BT = np.zeros((BATCH, width), bool)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = row
        mask_BT[i, : len(row) - 1] = True
    return tokens_BT, mask_BT


def _pick(log_prob_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return the negative log probability of each target."""
    return -jnp.take_along_axis(log_prob_BTV, targets_BT[..., None], axis=-1)[..., 0]


@jax.jit
def _score_mix(
    parts: Parts, tokens_BT: jax.Array, targets_BT: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    state = composed.mix_state(parts, tokens_BT.shape[0]) if state is None else state
    logits_BTV, state = composed.mix(parts, tokens_BT, state)
    return _pick(jax.nn.log_softmax(logits_BTV), targets_BT), state


@jax.jit
def _score_safe(
    parts: Parts, tokens_BT: jax.Array, targets_BT: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    state = composed.safe_state(parts, tokens_BT.shape[0]) if state is None else state
    log_prob_BTV, state = composed.safe(parts, tokens_BT, state)
    return _pick(log_prob_BTV, targets_BT), state


@jax.jit
def _score_path(
    parts: Parts,
    slots: tuple[SlotMatrices, ...],
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    state: None,
) -> tuple[jax.Array, None]:
    logits_BTV = composed.path(parts, tokens_BT, slots)
    return _pick(jax.nn.log_softmax(logits_BTV), targets_BT), None


@jax.jit
def _route(parts: Parts, tokens_BT: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    state = composed.mix_state(parts, tokens_BT.shape[0]) if state is None else state
    return composed.route(parts, tokens_BT, state)
