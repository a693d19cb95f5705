"""Measurements of a model on documents: bits per byte, router weights, scout log-probabilities.

A document is read in consecutive windows of the model's context, or of 512 tokens if that is less.
Attention restarts with each window, for every method alike. The router's track record, which is one
number per expert, is carried from window to window.

Bits are counted per *byte* of the text, so that models with different tokenizers can be compared.
No limits are applied here; those are in `checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from composable.corpora.documents import truncate_utf8
from composable.errors import TextError
from composable.interface import RouterInterface
from composable.model import bank as banks
from composable.model import composed
from composable.model import mix as mix_mode
from composable.model import safe as safe_mode
from composable.model.bank import pad_scout
from composable.model.body import SlotMatrices
from composable.model.composed import Parts
from composable.model.model import BACKBONE, Model
from composable.model.router import ScoutBank, scout_evidence
from composable.model.scout import Scout
from composable.model.tokenizer import Tokenizer
from composable.progress import CountProgress
from composable.vetting.trunk import Trunk

# Documents scored at once: fixed, so that every call runs the same compiled program.
BATCH: Final = 8
# Longest window, in tokens: logits of a large vocabulary must fit, and figures must compare.
_MAX_WINDOW: Final = 512
# Tokens that are scored at once, at most.
WINDOW_TOKENS: Final = BATCH * _MAX_WINDOW


@dataclass(frozen=True)
class Score:
    """Negative log-likelihoods of documents.

    Args:
        nats_B: Negative log-likelihood of each document, in nats.
        n_bytes_B: UTF-8 bytes of each document.

    Example:
        >>> score = Score(np.array([8.0, 2.0]) * np.log(2), np.array([1, 4]))
        >>> round(score.bits_per_byte, 6)
        2.0
    """

    nats_B: np.ndarray
    n_bytes_B: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """Total bits over total bytes."""
        return float(self.nats_B.sum() / self.n_bytes_B.sum() / np.log(2))


# (tokens BT, targets BT, state) -> (negative log-likelihood BT, state); None starts documents.
_Step = Callable[[jax.typing.ArrayLike, jax.typing.ArrayLike, Any], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Scorer:
    """A way of using a model to score text.

    Args:
        step: Scores one window.
        tokenizer: The model's tokenizer.
    """

    step: _Step
    tokenizer: Tokenizer


@dataclass(frozen=True)
class _Window:
    """The same positions of every document in a batch.

    Args:
        inputs_BT: Tokens that are read.
        targets_BT: The token after each of them.
        is_scored_BT: Whether the target is part of a document, and not padding.
    """

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    is_scored_BT: np.ndarray


def mix_scorer(model: Model, trunk: Trunk | None = None) -> Scorer:
    """Return the scorer of mix mode.

    Args:
        model: The model.
        trunk: Its trunk, if outputs of it are to be used again; scores are the same to the bit.
    """
    if trunk is None:
        return Scorer(partial(_score_mix, model.parts), model.tokenizer)
    tap = trunk.tap

    def step(tokens_BT: Any, targets_BT: Any, state: Any) -> tuple[jax.Array, Any]:
        scored: tuple[jax.Array, Any] = _score_mix_from_tap(
            model.parts, tokens_BT, tap(tokens_BT), targets_BT, state
        )
        return scored

    return Scorer(step, model.tokenizer)


def safe_scorer(model: Model) -> Scorer:
    """Return the scorer of safe mode."""
    return Scorer(partial(_score_safe, model.parts), model.tokenizer)


def path_scorer(model: Model, name: str = BACKBONE) -> Scorer:
    """Return the scorer of one expert always on, or of the backbone alone."""
    index = model.names.index(name)
    return slots_scorer(model, banks.entry_slots(model.parts.bank, index))


def slots_scorer(model: Model, slots: tuple[SlotMatrices, ...]) -> Scorer:
    """Return the scorer of one body, always on.

    Args:
        model: The model.
        slots: The body's matrices, by slot.
    """
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
        context: Length of a window in tokens; at most 512 are used.
        max_bytes: Score at most this many bytes of each document, without splitting a character.
        progress: Called with the number of documents done and in all.

    Returns:
        The score of each document, in the given order.

    Raises:
        TextError: If there are no documents, or one is empty.
    """
    if not documents:
        raise TextError("there are no documents to score")
    documents = _truncate(documents, max_bytes)
    pieces = []
    for windows in _read_windows(documents, scorer.tokenizer, context):
        state, nats_B = None, np.zeros(BATCH)
        for window in windows:
            nll_BT, state = scorer.step(window.inputs_BT, window.targets_BT, state)
            scored_BT = np.where(window.is_scored_BT, np.asarray(nll_BT, np.float64), 0)
            nats_B += scored_BT.sum(axis=1)
        pieces.append(nats_B)
        if progress:
            progress(min(len(pieces) * BATCH, len(documents)), len(documents))
    n_bytes_B = np.array([len(document) for document in documents])
    return Score(np.concatenate(pieces)[: len(documents)], n_bytes_B)


def trace_routing(
    model: Model, documents: Sequence[bytes], *, max_bytes: int | None = None
) -> list[np.ndarray]:
    """Return the router weights at each token of every document.

    Args:
        model: The model.
        documents: UTF-8 texts, not empty.
        max_bytes: Trace at most this many bytes of each document, without splitting a character.

    Returns:
        Weights of shape (tokens, E) for each document; entry e belongs to `model.names[e]`.
    """
    documents = _truncate(documents, max_bytes)
    traces = []
    for windows in _read_windows(documents, model.tokenizer, model.context):
        state, pieces = None, []
        for window in windows:
            weight_BTE, state = _route(model.parts, window.inputs_BT, state)
            pieces.append(np.asarray(weight_BTE))
        weights_BTE = np.concatenate(pieces, axis=1)
        is_scored_BT = np.concatenate([window.is_scored_BT for window in windows], axis=1)
        traces += [weights_BTE[row][is_scored_BT[row]] for row in range(BATCH)]
    return traces[: len(documents)]


def score_rows(
    scorer: Scorer, rows: Sequence[np.ndarray], *, context: int, skip: int
) -> np.ndarray:
    """Score the end of a batch of token rows, which need not be any text.

    Args:
        scorer: How to use the model.
        rows: Tokens from the start of a document on, one batch at most; what exceeds a window is
            left out.
        context: Length of a window in tokens; at most 512 are used.
        skip: Tokens at the start of each row that are read and not scored.

    Returns:
        Negative log-likelihoods in nats, one for each row.
    """
    window = _make_window(rows, context, skip)
    nll_BT, _ = scorer.step(window.inputs_BT, window.targets_BT, None)
    scored_BT = np.where(window.is_scored_BT, np.asarray(nll_BT, np.float64), 0)
    nats_B: np.ndarray = scored_BT.sum(axis=1)[: len(rows)]
    return nats_B


def trace_rows(model: Model, rows: Sequence[np.ndarray], *, skip: int) -> list[np.ndarray]:
    """Return the router weights, shape (tokens, E), at the end of each row; see `score_rows`."""
    window = _make_window(rows, model.context, skip)
    weight_BTE = np.asarray(_route(model.parts, window.inputs_BT, None)[0])
    return [weight_BTE[row][window.is_scored_BT[row]] for row in range(len(rows))]


def measure_norms(
    model: Model, name: str, documents: Sequence[bytes], *, max_bytes: int | None = None
) -> np.ndarray:
    """Return the size of a body's outputs at every token of some documents.

    Args:
        model: The model.
        name: The expert whose body is measured, always on.
        documents: UTF-8 texts, not empty.
        max_bytes: Read at most this many bytes of each document, without splitting a character.

    Returns:
        Root mean squares of shape LM, one M per token; NaN or infinite where an output is not
        finite.
    """
    slots = banks.entry_slots(model.parts.bank, model.names.index(name))
    pieces = []
    for windows in _read_windows(_truncate(documents, max_bytes), model.tokenizer, model.context):
        for window in windows:
            norm_LBT = np.asarray(_norms(model.parts, slots, window.inputs_BT))
            pieces.append(norm_LBT[:, window.is_scored_BT])
    return np.concatenate(pieces, axis=1)


def measure_evidence(
    model: Model, documents: Sequence[bytes], *, max_bytes: int | None = None
) -> np.ndarray:
    """Return the log-probability that every scout gives to each token's class.

    Args:
        model: The model.
        documents: UTF-8 texts, not empty.
        max_bytes: Read at most this many bytes of each document, without splitting a character.

    Returns:
        Log-probabilities in nats, shape EM, one M per token; entry e belongs to `model.names[e]`.
        Tokens have the same order for all scouts, which is not their order in the documents.
    """
    pieces = []
    for windows in _read_windows(_truncate(documents, max_bytes), model.tokenizer, model.context):
        for window in windows:
            evidence_EBT = _evidence(model.parts, window.inputs_BT, window.targets_BT)
            pieces.append(np.asarray(evidence_EBT, np.float64)[:, window.is_scored_BT])
    return np.concatenate(pieces, axis=1)


def measure_scout(
    trunk: Trunk,
    interface: RouterInterface,
    scout: Scout,
    documents: Sequence[bytes],
    tokenizer: Tokenizer,
    *,
    max_bytes: int | None = None,
) -> np.ndarray:
    """Return the log-probability that one scout gives to each token's class.

    Args:
        trunk: The backbone's trunk.
        interface: Its contract.
        scout: The scout.
        documents: UTF-8 texts, not empty.
        tokenizer: The backbone's.
        max_bytes: Read at most this many bytes of each document, without splitting a character.

    Returns:
        Log-probabilities in nats, shape M: the bits of the scout's entry of `measure_evidence`,
        whatever else is installed there.
    """
    padded, classes_V = pad_scout(scout, interface), trunk.backbone.class_map[...]
    context, pieces = trunk.backbone.cfg.context, []
    for windows in _read_windows(_truncate(documents, max_bytes), tokenizer, context):
        for window in windows:
            feature_BTD = trunk.features(window.inputs_BT)
            evidence_BT = _scout_evidence(padded, classes_V, feature_BTD, window.targets_BT)
            pieces.append(np.asarray(evidence_BT, np.float64)[window.is_scored_BT])
    return np.concatenate(pieces)


def measure_class_evidence(
    model: Model, name: str, documents: Sequence[bytes], *, max_bytes: int | None = None
) -> np.ndarray:
    """Return the log-probability that the model with one body gives to each token's class.

    It compares with what `measure_evidence` returns for a scout, which predicts classes only.

    Args:
        model: The model.
        name: The expert whose body is always on.
        documents: UTF-8 texts, not empty.
        max_bytes: Read at most this many bytes of each document, without splitting a character.

    Returns:
        Log-probabilities in nats, shape M, tokens in the order of `measure_evidence`.
    """
    slots = banks.entry_slots(model.parts.bank, model.names.index(name))
    pieces = []
    for windows in _read_windows(_truncate(documents, max_bytes), model.tokenizer, model.context):
        for window in windows:
            evidence_BT = _class_evidence(model.parts, slots, window.inputs_BT, window.targets_BT)
            pieces.append(np.asarray(evidence_BT, np.float64)[window.is_scored_BT])
    return np.concatenate(pieces)


def _truncate(documents: Sequence[bytes], max_bytes: int | None) -> Sequence[bytes]:
    """Return the starts of documents, no character split."""
    if max_bytes is None:
        return documents
    return [truncate_utf8(document, max_bytes) for document in documents]


def _make_window(rows: Sequence[np.ndarray], context: int, skip: int) -> _Window:
    """Return the first window of token rows, of the shape that `_read_windows` uses."""
    length = min(context, _MAX_WINDOW)
    tokens_BT = np.zeros((BATCH, length + 1), np.int32)
    is_scored_BT = np.zeros((BATCH, length), bool)
    for index, row_T in enumerate(rows):
        start_T = row_T[: length + 1]
        tokens_BT[index, : len(start_T)] = start_T
        is_scored_BT[index, skip - 1 : len(start_T) - 1] = True
    return _Window(tokens_BT[:, :-1], tokens_BT[:, 1:], is_scored_BT)


def _read_windows(
    documents: Sequence[bytes], tokenizer: Tokenizer, context: int
) -> Iterator[list[_Window]]:
    """Yield the windows of each batch of documents, in order, padded to full batches and windows.

    Every window has the same shape, so that one compiled program serves them all.
    """
    length = min(context, _MAX_WINDOW)
    for start in range(0, len(documents), BATCH):
        rows = [tokenizer.encode(document) for document in documents[start : start + BATCH]]
        n_windows = -(-max(len(row) - 1 for row in rows) // length)
        tokens_BT = np.zeros((BATCH, n_windows * length + 1), np.int32)
        is_scored_BT = np.zeros((BATCH, n_windows * length), bool)
        for index, tokens_T in enumerate(rows):
            tokens_BT[index, : len(tokens_T)] = tokens_T
            is_scored_BT[index, : len(tokens_T) - 1] = True
        inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        yield [
            _Window(inputs_BT[:, at], targets_BT[:, at], is_scored_BT[:, at])
            for at in (slice(i * length, (i + 1) * length) for i in range(n_windows))
        ]


def _pick(log_prob_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return the negative log-probability of each target."""
    return -jnp.take_along_axis(log_prob_BTV, targets_BT[..., None], axis=-1)[..., 0]


@jax.jit
def _score_mix(
    parts: Parts, tokens_BT: jax.Array, targets_BT: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    state = mix_mode.mix_state(parts, tokens_BT.shape[0]) if state is None else state
    logits_BTV, state = mix_mode.mix(parts, tokens_BT, state)
    return _pick(jax.nn.log_softmax(logits_BTV), targets_BT), state


@jax.jit
def _score_mix_from_tap(
    parts: Parts, tokens_BT: jax.Array, x_BTD: jax.Array, targets_BT: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    state = mix_mode.mix_state(parts, tokens_BT.shape[0]) if state is None else state
    logits_BTV, state = mix_mode.mix_from_tap(parts, tokens_BT, x_BTD, state)
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
    evidence_EBT: jax.Array = jax.lax.map(
        lambda scout: scout_evidence(scout, feature_BTD, classes_BT), parts.bank.scouts
    )
    return evidence_EBT


@jax.jit
def _scout_evidence(
    scout: ScoutBank,
    classes_V: jax.Array,
    feature_BTD: jax.Array,
    targets_BT: jax.typing.ArrayLike,
) -> jax.Array:
    return scout_evidence(scout, feature_BTD, classes_V[targets_BT])


@jax.jit
def _class_evidence(
    parts: Parts,
    slots: tuple[SlotMatrices, ...],
    tokens_BT: jax.typing.ArrayLike,
    targets_BT: jax.typing.ArrayLike,
) -> jax.Array:
    logits_BTV = composed.path(parts, jnp.asarray(tokens_BT), slots)
    classes_V = parts.backbone.class_map[...]
    is_in_class_BTV = classes_V == classes_V[jnp.asarray(targets_BT)][..., None]
    in_class_BT = jax.nn.logsumexp(logits_BTV, axis=-1, where=is_in_class_BTV)
    return in_class_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


@jax.jit
def _route(parts: Parts, tokens_BT: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    state = mix_mode.mix_state(parts, tokens_BT.shape[0]) if state is None else state
    return mix_mode.route(parts, tokens_BT, state)
