"""Ways to use experts together, each as one function from tokens to what every target cost.

A *gate* turns what has been read into a choice of experts; it may keep a state along the document
and may choose anew in every slot. `mixture` runs any gate the way mix mode runs the router: the
chosen blocks' outputs are mixed in every slot. Methods that run every expert whole and mix their
probabilities are in `ensembles.py`.

All of them see the same documents in the same windows, and none sees a token before it is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.composition.features import features_at, pool
from composable.interface import RouterInterface, SwitchingFilter
from composable.kernels import (
    combine_rows,
    default_block,
    gather_rows,
    grouped_swiglu,
    make_dispatch,
)
from composable.model import mix as mix_mode
from composable.model import safe as safe_mode
from composable.model.backbone import Backbone
from composable.model.bank import entry_slots
from composable.model.body import MATRICES, SlotMatrices
from composable.model.composed import (
    Parts,
)
from composable.model.layers import swiglu
from composable.model.router import (
    NEVER,
    RouterState,
    ScoutBank,
    choose,
    empty_state,
    evidence,
    log_prior,
    switching_posterior,
    track_record,
)

Slots = tuple[SlotMatrices, ...]
# What a gate decides in a slot: experts and their weights, J each.
Choice = tuple[jax.Array, jax.Array]

WINDOW: Final = 512
BATCH: Final = 8


@dataclass(frozen=True)
class Rows:
    """Documents as arrays: N rows of W windows, one token more, and which targets count."""

    tokens_NT: np.ndarray
    mask_NT: np.ndarray
    n_documents: int

    @classmethod
    def of(cls, documents: Sequence[bytes], encode: Callable[[bytes], Any], windows: int) -> Rows:
        """Cut documents to so many windows; the number of rows is a multiple of the batch."""
        width = windows * WINDOW
        n = -(-len(documents) // BATCH) * BATCH
        tokens_NT = np.zeros((n, width + 1), np.int32)
        mask_NT = np.zeros((n, width), bool)
        for i, document in enumerate(documents):
            row = np.asarray(encode(document))[: width + 1]
            tokens_NT[i, : len(row)] = row
            mask_NT[i, : len(row) - 1] = True
        return cls(tokens_NT, mask_NT, len(documents))

    def run(self, step: Callable[..., Any]) -> np.ndarray:
        """Return what a step gives for every position, documents in rows.

        Args:
            step: (tokens BT, targets BT, state) -> (array with B and T first, state); the state is
                None at the begin of documents.
        """
        batches = []
        for i in range(0, len(self.tokens_NT), BATCH):
            tokens_BT, state, windows = self.tokens_NT[i : i + BATCH], None, []
            for at in range(0, self.mask_NT.shape[1], WINDOW):
                here_BT = tokens_BT[:, at : at + WINDOW + 1]
                found, state = step(here_BT[:, :-1], here_BT[:, 1:], state)
                windows.append(np.asarray(found))
            batches.append(np.concatenate(windows, axis=1))
        return np.concatenate(batches)[: self.n_documents]

    @cached_property
    def n_targets(self) -> np.ndarray:
        """Targets of every document, shape N; for bytes, a target is a byte."""
        counts_N: np.ndarray = self.mask_NT[: self.n_documents].sum(1)
        return counts_N

    def total(self, nats_NT: np.ndarray) -> np.ndarray:
        """Return what every document cost, in nats."""
        sums_N: np.ndarray = (nats_NT * self.mask_NT[: self.n_documents]).sum(1, dtype=np.float64)
        return sums_N

    def bits(self, nats_N: np.ndarray) -> float:
        """Return bits per byte of all documents together."""
        return float(nats_N.sum() / self.n_targets.sum() / np.log(2))


def costs(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return the negative log likelihood of every target, in nats."""
    log_prob_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.take_along_axis(log_prob_BTV, targets_BT[..., None], axis=-1)[..., 0]


# ---- one path, or the shipped model ------------------------------------------------------------


@jax.jit
def _path(backbone: Backbone, slots: Slots, tokens_BT: Any, targets_BT: Any) -> jax.Array:
    first = backbone.cfg.tap

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        return swiglu(x_BTD, *(slots[layer - first][name] for name in MATRICES))

    x_BTD, _ = backbone.trunk(tokens_BT)
    return costs(backbone.upper(x_BTD, run)[0], targets_BT)


def path(backbone: Backbone, slots: Slots) -> Callable[..., Any]:
    """Return the step of one body, always on."""
    return lambda tokens, targets, _: (_path(backbone, slots, tokens, targets), None)


def whole(model: Callable[[Any], jax.Array]) -> Callable[..., Any]:
    """Return the step of a model of its own, such as one trained on everybody's data."""
    run = jax.jit(lambda tokens_BT, targets_BT: costs(model(tokens_BT), targets_BT))
    return lambda tokens, targets, _: (run(tokens, targets), None)


@jax.jit
def _mix(parts: Parts, tokens_BT: Any, targets_BT: Any, state: Any) -> Any:
    state = mix_mode.mix_state(parts, tokens_BT.shape[0]) if state is None else state
    logits_BTV, weight_BTE, state = mix_mode.trace_mix(parts, tokens_BT, state)
    return costs(logits_BTV, targets_BT), weight_BTE, state


@jax.jit
def _safe(parts: Parts, tokens_BT: Any, targets_BT: Any, state: Any) -> Any:
    state = safe_mode.safe_state(parts, tokens_BT.shape[0]) if state is None else state
    log_prob_BTV, weight_BTE, state = safe_mode.trace_safe(parts, tokens_BT, state)
    nll_BT = -jnp.take_along_axis(log_prob_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return nll_BT, weight_BTE, state


def shipped(parts: Parts, mode: str, *, is_traced: bool = False) -> Callable[..., Any]:
    """Return the step of mix or safe mode as users run it; traced, that of its weights, BTE."""
    run = {"mix": _mix, "safe": _safe}[mode]

    def step(tokens: Any, targets: Any, state: Any) -> Any:
        nll_BT, weight_BTE, state = run(parts, tokens, targets, state)
        return weight_BTE if is_traced else nll_BT, state

    return step


# ---- merges of weights -------------------------------------------------------------------------


def deltas(stack: Slots) -> Slots:
    """Return what every expert adds to the backbone's matrices; entry 0 is the backbone's."""
    return jax.tree.map(lambda w: w[1:] - w[:1], stack)


def average(stack: Slots) -> Slots:
    """Return the mean of the experts (Wortsman et al. 2022, arXiv:2203.05482)."""
    return jax.tree.map(lambda w: w[1:].mean(0), stack)


def task_arithmetic(stack: Slots, scale: float) -> Slots:
    """Return backbone plus scaled sum of changes (Ilharco et al. 2023, arXiv:2212.04089)."""
    return jax.tree.map(lambda w: w[0] + scale * (w[1:] - w[:1]).sum(0), stack)


def ties(stack: Slots, scale: float, kept: float = 0.2) -> Slots:
    """Return a TIES merge: trim, elect signs, mean of those that agree.

    References:
        Yadav et al. 2023, arXiv:2306.01708, algorithm 1.
    """
    change = deltas(stack)
    flat_EN = np.concatenate(
        [np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(change)], axis=1
    )
    cut_E = np.quantile(np.abs(flat_EN), 1 - kept, axis=1)

    def merge(w: jax.Array, change: jax.Array) -> jax.Array:
        cut = jnp.asarray(cut_E).reshape(-1, *[1] * (change.ndim - 1))
        trimmed = jnp.where(jnp.abs(change) >= cut, change, 0.0)
        sign = jnp.sign(trimmed.sum(0))
        agreeing = (jnp.sign(trimmed) == sign) & (trimmed != 0)
        mean = jnp.where(agreeing, trimmed, 0).sum(0) / jnp.maximum(agreeing.sum(0), 1)
        return w[0] + scale * mean

    return jax.tree.map(merge, stack, change)


# ---- mixtures in every slot --------------------------------------------------------------------


class Seen(NamedTuple):
    """What a gate may look at."""

    tokens_BT: jax.Array
    feature_BTD: jax.Array


def _take_top(score_BTE: jax.Array, k: int) -> Choice:
    top_BTJ, expert_BTJ = jax.lax.top_k(score_BTE, min(k, score_BTE.shape[-1]))
    return expert_BTJ, jax.nn.softmax(top_BTJ, axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Constant:
    """The same weights for every token."""

    weight_E: jax.Array

    def route(self, seen: Seen, state: Any, backbone: Backbone) -> Any:
        shape = (*seen.tokens_BT.shape, len(self.weight_E))
        expert_BTJ = jnp.broadcast_to(jnp.arange(shape[-1]), shape)
        choice = expert_BTJ, jnp.broadcast_to(self.weight_E, shape)
        return (lambda layer, x_BTD: choice), None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Random:
    """One expert or the backbone, drawn anew for every token."""

    uniform_E: jax.Array

    def route(self, seen: Seen, state: Any, backbone: Backbone) -> Any:
        key = jax.random.key(0) if state is None else state
        key, draw = jax.random.split(key)
        expert_BT1 = jax.random.randint(draw, (*seen.tokens_BT.shape, 1), 0, len(self.uniform_E))
        return (lambda layer, x_BTD: (expert_BT1, jnp.ones(expert_BT1.shape))), key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quadratic:
    """Gaussian models of pooled features, one per contributor from the moments of its own text."""

    mean_ED: jax.Array
    precision_EDD: jax.Array
    constant_E: jax.Array
    temperature: jax.Array
    k: int = field(metadata={"static": True})

    def route(self, seen: Seen, state: Any, backbone: Backbone) -> Any:
        pooled_BTD, state = pool(seen.feature_BTD, state)

        def score(one: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            mean_D, precision_DD, constant = one
            away_BTD = pooled_BTD - mean_D
            return constant - 0.5 * ((away_BTD @ precision_DD) * away_BTD).sum(-1)

        score_EBT = jax.lax.map(score, (self.mean_ED, self.precision_EDD, self.constant_E))
        choice = _take_top(jnp.moveaxis(score_EBT, 0, -1) * self.temperature, self.k)
        return (lambda layer, x_BTD: choice), state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Linear:
    """A linear score of pooled features: linear discriminants, or a ridge regression."""

    w_DE: jax.Array
    b_E: jax.Array
    temperature: jax.Array
    k: int = field(metadata={"static": True})

    def route(self, seen: Seen, state: Any, backbone: Backbone) -> Any:
        pooled_BTD, state = pool(seen.feature_BTD, state)
        choice = _take_top((pooled_BTD @ self.w_DE + self.b_E) * self.temperature, self.k)
        return (lambda layer, x_BTD: choice), state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerSlot:
    """One vector per slot and expert, held against the input of the slot.

    Kinds:
        row: inner product and a bias (FlexOlmo, BTX); the backbone has a row of its own.
        standard: inner product of both, standardised, over root D (PHATGOOSE, section 3.2).
        arrow: magnitude of the inner product (Ostapenko et al. 2024, arXiv:2405.11157, equation 4).

    The last two know no backbone: they choose among experts only.
    """

    row_LED: jax.Array
    bias_LE: jax.Array
    kind: str = field(metadata={"static": True})
    k: int = field(metadata={"static": True})

    def route(self, seen: Seen, state: Any, backbone: Backbone) -> Any:
        first = backbone.cfg.tap

        def run(layer: int, x_BTD: jax.Array) -> Choice:
            row_ED = self.row_LED[layer - first]
            if self.kind == "row":
                return _take_top(x_BTD @ row_ED.T + self.bias_LE[layer - first], self.k)
            if self.kind == "standard":
                score_BTE = _standardise(x_BTD) @ _standardise(row_ED).T
                score_BTE = score_BTE / x_BTD.shape[-1] ** 0.5
            else:
                score_BTE = jnp.abs(x_BTD @ row_ED.T)
            expert_BTJ, weight_BTJ = _take_top(score_BTE, self.k)
            return expert_BTJ + 1, weight_BTJ

        return run, None


def _standardise(x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.maximum(jnp.std(x, axis=-1, keepdims=True), 1e-6)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scouts:
    """Mix mode's router, with scouts of any kind, at any tap, and any settings."""

    scouts: ScoutBank
    interface: RouterInterface = field(metadata={"static": True})
    tap: int = field(metadata={"static": True})

    def route(self, seen: Seen, state: Any, backbone: Backbone) -> Any:
        rule, n = self.interface, self.scouts.b_out_EC.shape[0]
        batch = seen.tokens_BT.shape[0]
        alive_E = jnp.ones(n, bool)
        mix = rule.mix
        is_filter = isinstance(mix, SwitchingFilter)
        if is_filter:
            prior_E = log_prior(alive_E, mix.backbone_prior, mix.max_expert_prior)
        else:
            prior_E = log_prior(alive_E, rule.backbone_prior)
        if state is None:
            state = empty_state(batch, n, seen.feature_BTD.shape[-1])
            state = state._replace(posterior_BE=jnp.broadcast_to(prior_E, (batch, n)))
        feature_BTD = seen.feature_BTD
        if self.tap != backbone.cfg.tap:
            feature_BTD = features_at(backbone, seen.tokens_BT, self.tap)
        classes_BT = backbone.class_map[...][seen.tokens_BT]
        evidence_BTE = evidence(self.scouts, feature_BTD, classes_BT, state)
        track_BTE = track_record(evidence_BTE, state.track_BE, rule.discount)
        score_BTE = prior_E + track_BTE
        if is_filter:
            score_BTE = switching_posterior(
                evidence_BTE,
                state.posterior_BE,
                prior_E,
                power=mix.power,
                rate=mix.switch_rate,
                margin_E=jnp.full(n, mix.margin).at[0].set(0.0),
            )
        alone_E = jnp.full(n, NEVER).at[0].set(0.0)
        first_BE = jnp.where(state.started_B[:, None], score_BTE[:, 0], alone_E)
        scored_BTE = score_BTE.at[:, 0].set(first_BE)
        picked = choose(scored_BTE, jnp.arange(n), rule.n_mixed, mix.floor)
        choice = picked.expert_BTJ, picked.weight_BTJ
        started_B = jnp.ones_like(state.started_B)
        after = RouterState(track_BTE[:, -1], score_BTE[:, -1], feature_BTD[:, -1], started_B)
        return (lambda layer, x_BTD: choice), after


def stack_scouts(scouts: Sequence[Mapping[str, np.ndarray]]) -> ScoutBank:
    """Return scouts of one width, given by their tensors, as a bank."""
    parts = (jnp.stack([jnp.asarray(s[name]) for s in scouts]) for name in _SCOUT_PARTS)
    return ScoutBank(*parts)


def unigram_scouts(log_prob_EC: np.ndarray, d_model: int) -> ScoutBank:
    """Return scouts that always say the same."""
    n, classes = log_prob_EC.shape
    zeros = jnp.zeros
    return ScoutBank(
        zeros((n, d_model, 1)), zeros((n, 1)), zeros((n, 1, classes)), jnp.asarray(log_prob_EC)
    )


_SCOUT_PARTS: Final = ("w_in", "b_in", "w_out", "b_out")


def mix_blocks(
    slot: SlotMatrices, x_BTD: jax.Array, expert_BTJ: jax.Array, weight_BTJ: jax.Array
) -> jax.Array:
    """Return the weighted sum of the chosen experts' blocks in one slot."""
    n_choices, n_experts = expert_BTJ.shape[-1], slot["w_gate"].shape[0]
    flat_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    block = default_block(len(flat_MD), n_choices)
    dispatch = make_dispatch(expert_BTJ.reshape(-1, n_choices), n_experts, block)
    x_PD = gather_rows(flat_MD, dispatch)
    y_PD = grouped_swiglu(x_PD, slot["w_gate"], slot["w_up"], slot["w_down"], dispatch)
    weight_MJ = weight_BTJ.reshape(-1, n_choices).astype(y_PD.dtype)
    return combine_rows(y_PD, weight_MJ, dispatch).reshape(x_BTD.shape)


def mixture_costs(
    backbone: Backbone, stack: Slots, gate: Any, tokens_BT: Any, targets_BT: Any, state: Any
) -> Any:
    """Return what every target costs where blocks are mixed as a gate says, and its state."""
    first = backbone.cfg.tap
    x_BTD, _ = backbone.trunk(tokens_BT)
    seen = Seen(tokens_BT, backbone.features(x_BTD))
    choose_in, state = gate.route(seen, state, backbone)

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        return mix_blocks(stack[layer - first], x_BTD, *choose_in(layer, x_BTD))

    return costs(backbone.upper(x_BTD, run)[0], targets_BT), state


_mixture = jax.jit(mixture_costs)


def mixture(backbone: Backbone, stack: Slots, gate: Any) -> Callable[..., Any]:
    """Return the step that mixes blocks as a gate says."""
    return partial(_mixture, backbone, stack, gate)


@jax.jit
def _gate_weights(backbone: Backbone, gate: Any, tokens_BT: Any, n: Any, state: Any) -> Any:
    x_BTD, _ = backbone.trunk(tokens_BT)
    choose_in, state = gate.route(Seen(tokens_BT, backbone.features(x_BTD)), state, backbone)
    expert_BTJ, weight_BTJ = choose_in(backbone.cfg.tap, x_BTD)
    one_hot = jax.nn.one_hot(expert_BTJ, n.shape[0])
    return jnp.einsum("BTJ,BTJE->BTE", weight_BTJ, one_hot), state


def weights(backbone: Backbone, gate: Any, n_experts: int) -> Callable[..., Any]:
    """Return the step that gives a gate's weights, shape BTE."""
    n = np.zeros(n_experts)
    return lambda tokens, targets, state: _gate_weights(backbone, gate, tokens, n, state)


def stack_of(parts: Parts, count: int) -> Slots:
    """Return the first entries of a bank's stacked blocks: the backbone and its experts."""
    entries = [entry_slots(parts.bank, index) for index in range(count)]
    return jax.tree.map(lambda *w: jnp.stack(w).astype(jnp.float32), *entries)


def entry(stack: Slots, index: int) -> Slots:
    """Return the blocks of one expert."""
    return jax.tree.map(lambda w: w[index], stack)
