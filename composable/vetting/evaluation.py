"""Bits per byte of documents under any way of using a model, router weights, and evidence.

A document is read in consecutive windows, of the model's context or 512 tokens if that is less.
Attention restarts with each window, for every method alike; the router's track record, which is one
number per expert, is carried on, since it speaks of the document and not of the window.

What is counted is bits per *byte* of the text, whatever its tokens are, so that tokenizers compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from composable.corpora.documents import truncate_utf8
from composable.errors import TextError
from composable.model import bank as banks
from composable.model import composed
from composable.model import mix as mix_mode
from composable.model import safe as safe_mode
from composable.model.body import SlotMatrices
from composable.model.composed import Parts
from composable.model.model import BACKBONE, Model
from composable.model.router import scout_evidence
from composable.model.tokenizer import Tokenizer
from composable.progress import CountProgress

# Documents scored at once: fixed, so that every call runs the same compiled program.
BATCH: Final = 8
# Longest window, in tokens: logits of a large vocabulary must fit, and figures must compare.
_MAX_WINDOW: Final = 512


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
_Step = Callable[[jax.typing.ArrayLike, jax.typing.ArrayLike, Any], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Scorer:
    """A way of using a model to score text.

    Args:
        step: Scores one window.
        tokenizer: The model's.
    """

    step: _Step
    tokenizer: Tokenizer


def mix_scorer(model: Model) -> Scorer:
    """Return the scorer of mix mode."""
    return Scorer(partial(_score_mix, model.parts), model.tokenizer)


def safe_scorer(model: Model) -> Scorer:
    """Return the scorer of safe mode."""
    return Scorer(partial(_score_safe, model.parts), model.tokenizer)


def path_scorer(model: Model, name: str = BACKBONE) -> Scorer:
    """Return the scorer of one expert always on, or of the backbone alone."""
    index = model.names.index(name)
    return slots_scorer(model, banks.entry_slots(model.parts.bank, index))


def slots_scorer(model: Model, slots: tuple[SlotMatrices, ...]) -> Scorer:
    """Return the scorer of a body, given as the matrices of every slot, always on."""
    return Scorer(partial(_score_path, model.parts, slots), model.tokenizer)


def score_documents(
    scorer: Scorer,
    documents: Sequence[bytes],
    *,
    context: int,
    max_bytes: int | None = None,
    progress: CountProgress | None = None,
) -> Score:
    """Score documents.

    Args:
        scorer: How to use the model.
        documents: UTF-8 texts, not empty.
        context: Window, in tokens; 512 at most are used.
        max_bytes: Score at most this many bytes of each document, up to a character's end.
        progress: Called with documents done and documents in all.

    Raises:
        TextError: If there are no documents, or one is empty.
    """
    window = min(context, _MAX_WINDOW)
    documents = _cut(documents, max_bytes)
    nats, n_bytes = [], []
    for start in range(0, len(documents), BATCH):
        chunk = documents[start : start + BATCH]
        tokens_BT, mask_BT = _to_windows(chunk, scorer.tokenizer, window)
        nats_B = np.zeros(BATCH)
        state = None
        for at in range(0, mask_BT.shape[1], window):
            here = slice(at, at + window)
            inputs_BT = tokens_BT[:, :-1][:, here]
            nll_BT, state = scorer.step(inputs_BT, tokens_BT[:, 1:][:, here], state)
            nats_B += np.where(mask_BT[:, here], np.asarray(nll_BT, np.float64), 0).sum(axis=1)
        nats.append(nats_B[: len(chunk)])
        n_bytes.append(np.array([len(document) for document in chunk]))
        if progress:
            progress(min(start + BATCH, len(documents)), len(documents))
    if not documents:
        raise TextError("there are no documents to score")
    return Score(np.concatenate(nats), np.concatenate(n_bytes))


def trace_routing(
    model: Model, documents: Sequence[bytes], *, max_bytes: int | None = None
) -> list[np.ndarray]:
    """Return the router weights at each token of every document.

    Args:
        model: The model.
        documents: UTF-8 texts, not empty.
        max_bytes: Trace at most this many bytes of each document, up to a character's end.

    Returns:
        Weights of shape (tokens, E) for each document; entry e belongs to `model.names[e]`.
    """
    window = min(model.context, _MAX_WINDOW)
    documents = _cut(documents, max_bytes)
    traces = []
    for start in range(0, len(documents), BATCH):
        chunk = documents[start : start + BATCH]
        tokens_BT, mask_BT = _to_windows(chunk, model.tokenizer, window)
        state, pieces = None, []
        for at in range(0, mask_BT.shape[1], window):
            inputs_BT = tokens_BT[:, :-1][:, at : at + window]
            weight_BTE, state = _route(model.parts, inputs_BT, state)
            pieces.append(np.asarray(weight_BTE))
        weight_BTE = np.concatenate(pieces, axis=1)
        traces += [weight_BTE[i][mask_BT[i]] for i in range(len(chunk))]
    return traces


def measure_norms(
    model: Model, name: str, documents: Sequence[bytes], *, max_bytes: int | None = None
) -> np.ndarray:
    """Return how large a body's outputs are on every token of some documents.

    Args:
        model: The model.
        name: Whose body; it is always on.
        documents: UTF-8 texts, not empty.
        max_bytes: Read at most this many bytes of each document, up to a character's end.

    Returns:
        Root mean squares of shape (slots, tokens); NaN or infinite where an output is not finite.
    """
    window = min(model.context, _MAX_WINDOW)
    documents = _cut(documents, max_bytes)
    slots = banks.entry_slots(model.parts.bank, model.names.index(name))
    pieces = []
    for start in range(0, len(documents), BATCH):
        chunk = documents[start : start + BATCH]
        tokens_BT, mask_BT = _to_windows(chunk, model.tokenizer, window)
        for at in range(0, mask_BT.shape[1], window):
            here = slice(at, at + window)
            norm_LBT = np.asarray(_norms(model.parts, slots, tokens_BT[:, :-1][:, here]))
            pieces.append(norm_LBT[:, mask_BT[:, here]])
    return np.concatenate(pieces, axis=1)


def measure_evidence(
    model: Model, documents: Sequence[bytes], *, max_bytes: int | None = None
) -> np.ndarray:
    """Return how well every scout predicts the tokens of some documents.

    Args:
        model: The model.
        documents: UTF-8 texts, not empty.
        max_bytes: Read at most this many bytes of each document, up to a character's end.

    Returns:
        Log likelihoods of the tokens' classes in nats, shape (E, tokens) float64; entry e belongs
        to `model.names[e]`. The order of the tokens is one for all scouts, not that of the texts.
    """
    window = min(model.context, _MAX_WINDOW)
    documents = _cut(documents, max_bytes)
    pieces = []
    for start in range(0, len(documents), BATCH):
        chunk = documents[start : start + BATCH]
        tokens_BT, mask_BT = _to_windows(chunk, model.tokenizer, window)
        for at in range(0, mask_BT.shape[1], window):
            here = slice(at, at + window)
            inputs_BT, targets_BT = tokens_BT[:, :-1][:, here], tokens_BT[:, 1:][:, here]
            evidence_EBT = np.asarray(_evidence(model.parts, inputs_BT, targets_BT), np.float64)
            pieces.append(evidence_EBT[:, mask_BT[:, here]])
    return np.concatenate(pieces, axis=1)


def _cut(documents: Sequence[bytes], max_bytes: int | None) -> Sequence[bytes]:
    """Return the starts of documents, no character split."""
    if max_bytes is None:
        return documents
    return [truncate_utf8(document, max_bytes) for document in documents]


def _to_windows(
    documents: Sequence[bytes], tokenizer: Tokenizer, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens of shape (BATCH, n * window + 1) and which targets count."""
    rows = [tokenizer.encode(document) for document in documents]
    longest = max(len(row) for row in rows) - 1
    width = -(-longest // window) * window
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
    state = mix_mode.mix_state(parts, tokens_BT.shape[0]) if state is None else state
    logits_BTV, state = mix_mode.mix(parts, tokens_BT, state)
    return _pick(jax.nn.log_softmax(logits_BTV), targets_BT), state


@jax.jit
def _score_safe(
    parts: Parts, tokens_BT: jax.Array, targets_BT: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    state = safe_mode.safe_state(parts, tokens_BT.shape[0]) if state is None else state
    log_prob_BTV, state = safe_mode.safe(parts, tokens_BT, state)
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
def _norms(
    parts: Parts, slots: tuple[SlotMatrices, ...], tokens_BT: jax.typing.ArrayLike
) -> jax.Array:
    return composed.path_norms(parts, jnp.asarray(tokens_BT), slots)


@jax.jit
def _evidence(
    parts: Parts, tokens_BT: jax.typing.ArrayLike, targets_BT: jax.typing.ArrayLike
) -> jax.Array:
    backbone = parts.backbone
    x_BTD, _ = backbone.trunk(jnp.asarray(tokens_BT))
    feature_BTD, classes_BT = backbone.features(x_BTD), backbone.class_map[...][targets_BT]
    return jax.lax.map(
        lambda scout: scout_evidence(scout, feature_BTD, classes_BT), parts.bank.scouts
    )


@jax.jit
def _route(parts: Parts, tokens_BT: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    state = mix_mode.mix_state(parts, tokens_BT.shape[0]) if state is None else state
    return mix_mode.route(parts, tokens_BT, state)
