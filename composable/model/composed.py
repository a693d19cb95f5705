"""A backbone and a bank as one model, used in mix mode, in safe mode, or one path at a time.

*Mix* runs once and mixes the outputs of the top k experts in every slot. *Safe* runs the backbone's
path and the paths that the router shortlists whole, and mixes their output probabilities by what
each path really predicted. Everything here is a pure function of (parts, tokens, state).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from composable.interface import RouterInterface
from composable.kernels import (
    Dispatch,
    combine_rows,
    default_block,
    gather_rows,
    grouped_swiglu,
    make_dispatch,
)
from composable.model.backbone import Backbone, FeedForwardFn
from composable.model.bank import Bank, entry_slots
from composable.model.body import MATRICES
from composable.model.guard import (
    Tally,
    empty_tally,
    exceeds,
    give_back,
    tally_paths,
    tally_rows,
)
from composable.model.hedge import HedgeState, empty_hedge, hedge
from composable.model.layers import KVCache, swiglu
from composable.model.router import (
    NEVER,
    Choice,
    RouterState,
    choose,
    dense_weights,
    empty_state,
    evidence,
    evidence_of,
    log_prior,
    predictions,
    switching_trust,
    track_record,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a composed model is made of.

    Args:
        backbone: The frozen model.
        bank: The installed experts.
        interface: The contract; static.
    """

    backbone: Backbone
    bank: Bank
    interface: RouterInterface = field(metadata={"static": True})


class Caches(NamedTuple):
    """Keys and values of a sequence being decoded, S positions long.

    In safe mode the arrays of `upper` have a leading E: every path keeps its own.
    """

    trunk: tuple[KVCache, ...]
    upper: tuple[KVCache, ...]
    position: jax.Array


class MixState(NamedTuple):
    """What mix mode carries from one call to the next on the same documents."""

    router: RouterState
    tally: Tally
    hedge: HedgeState
    caches: Caches | None = None


class SafeState(NamedTuple):
    """What safe mode carries from one call to the next on the same documents.

    Its E runs in the order of the experts' keys, so that sums over paths do not depend on slots.
    """

    router: RouterState
    tally: Tally
    hedge: HedgeState
    posterior_BE: jax.Array  # log weights, summing to one over the living
    awake_BE: jax.Array  # paths that predicted the next token
    log_prob_EBV: jax.Array  # what each path predicted for the next token
    caches: Caches | None = None


class _Heard(NamedTuple):
    """What trunk and scouts give."""

    x_BTD: jax.Array  # the residual stream after the trunk
    classes_BT: jax.Array
    track_BTE: jax.Array  # each expert's own track record
    score_BTE: jax.Array  # what mix mode weighs experts by, prior included
    said_EBTC: jax.Array | None  # what scouts say of the next token, where they have a share of it


# Log probabilities of one path, BTV, where it was sound, BT, and its caches.
_PathOutput = tuple[jax.Array, jax.Array, tuple[KVCache, ...]]


def mix_state(parts: Parts, batch: int, cache_length: int | None = None) -> MixState:
    """Return mix mode's state at the begin of a document.

    Args:
        parts: The model.
        batch: Sequences (B).
        cache_length: Positions to make room for when decoding; None keeps no cache.
    """
    router = empty_state(batch, parts.bank.capacity, parts.interface.d_model)
    tally = empty_tally(parts.bank.capacity)
    hedged = empty_hedge(batch, parts.interface.n_classes)
    return MixState(router, tally, hedged, _empty_caches(parts, batch, cache_length))


def safe_state(parts: Parts, batch: int, cache_length: int | None = None) -> SafeState:
    """Return safe mode's state at the begin of a document; arguments as for `mix_state`."""
    n_experts, interface = parts.bank.capacity, parts.interface
    prior_E = _prior(parts)[jnp.argsort(parts.bank.key_E)]
    caches = _empty_caches(parts, batch, cache_length)
    if caches is not None:
        upper = jax.tree.map(lambda x: jnp.zeros((n_experts, *x.shape), x.dtype), caches.upper)
        caches = caches._replace(upper=upper)
    return SafeState(
        empty_state(batch, n_experts, interface.d_model),
        empty_tally(n_experts),
        empty_hedge(batch, interface.n_classes),
        jnp.broadcast_to(prior_E, (batch, n_experts)),
        jnp.zeros((batch, n_experts), bool).at[:, 0].set(True),
        jnp.zeros((n_experts, batch, interface.vocab_size), jnp.float32),
        caches,
    )


def mix(parts: Parts, tokens_BT: jax.Array, state: MixState) -> tuple[jax.Array, MixState]:
    """Return logits in mix mode.

    Args:
        parts: The model.
        tokens_BT: Token ids, from where the state left off.
        state: State before the first of them.

    Returns:
        Logits of the next token at every position, shape BTV float32, and the new state.
    """
    logits_BTV, _, state = trace_mix(parts, tokens_BT, state)
    return logits_BTV, state


def trace_mix(
    parts: Parts, tokens_BT: jax.Array, state: MixState
) -> tuple[jax.Array, jax.Array, MixState]:
    """Return logits in mix mode, the weights behind them, shape BTE, and the new state."""
    heard, router, caches = _listen(parts, tokens_BT, state.router, state.caches)
    choice = _trust(parts, heard.score_BTE)
    feed_forward, dispatch, zeroed = _mixed_feed_forward(parts, choice)
    if state.caches is None or caches is None:
        logits_BTV, _ = parts.backbone.upper(heard.x_BTD, feed_forward)
    else:
        logits_BTV, written = parts.backbone.upper(
            heard.x_BTD, feed_forward, state.caches.position, caches.upper
        )
        caches = caches._replace(upper=tuple(written))
    logits_BTV, hedged = _hedge(parts, logits_BTV, heard, state.router, state.hedge)
    tally = tally_rows(state.tally, zeroed, choice, dispatch)
    after = MixState(router, tally, hedged, caches)
    return logits_BTV, dense_weights(choice, parts.bank.capacity), after


def route(parts: Parts, tokens_BT: jax.Array, state: MixState) -> tuple[jax.Array, MixState]:
    """Return the weights of mix mode without running the upper layers.

    Returns:
        Weights, shape BTE, at every position for the prediction of the next token, and the state.
    """
    heard, router, caches = _listen(parts, tokens_BT, state.router, state.caches)
    weight_BTE = dense_weights(_trust(parts, heard.score_BTE), parts.bank.capacity)
    return weight_BTE, state._replace(router=router, caches=caches)


def track_records(parts: Parts, tokens_BT: jax.Array, state: RouterState) -> jax.Array:
    """Return every expert's track record at every position, shape BTE, in nats."""
    return _listen(parts, tokens_BT, state, None)[0].track_BTE


def path(parts: Parts, tokens_BT: jax.Array, slots: Sequence[Mapping[str, jax.Array]]) -> jax.Array:
    """Return logits with one body always on, shape BTV float32; the router is not asked.

    Args:
        parts: The model.
        tokens_BT: Token ids of whole sequences.
        slots: Matrices of every slot, as `bank.entry_slots` or `bank.average_slots` give them.
    """
    x_BTD, _ = parts.backbone.trunk(tokens_BT)
    feed_forward = _fixed_feed_forward(parts, slots)
    return parts.backbone.upper(x_BTD, feed_forward)[0]


def path_norms(
    parts: Parts, tokens_BT: jax.Array, slots: Sequence[Mapping[str, jax.Array]]
) -> jax.Array:
    """Return how large one body's outputs are when it is always on.

    Arguments as for `path`.

    Returns:
        Root mean squares, shape LBT float32, one L per slot: what `output_bounds` bound.
    """
    feed_forward, norms = _fixed_feed_forward(parts, slots), []

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        y_BTD = feed_forward(layer, x_BTD)
        norms.append(jnp.sqrt(jnp.mean(jnp.square(y_BTD.astype(jnp.float32)), axis=-1)))
        return y_BTD

    x_BTD, _ = parts.backbone.trunk(tokens_BT)
    parts.backbone.upper(x_BTD, run)
    return jnp.stack(norms)


def safe(parts: Parts, tokens_BT: jax.Array, state: SafeState) -> tuple[jax.Array, SafeState]:
    """Return log probabilities in safe mode.

    The backbone's path is always awake; the router's best `top_k` experts are awake token by
    token, and an expert that sleeps neither gains nor loses. With prior p of the backbone and
    switch rate a, a document of n tokens costs at most
    `log(1/p) - n log(1 - a (1 - p))` nats more than the backbone alone, whatever is installed;
    where scouts have a share of the output, `RouterInterface.safe_bound` adds what that may cost.

    Args:
        parts: The model.
        tokens_BT: Token ids, from where the state left off.
        state: State before the first of them.

    Returns:
        Log probabilities of the next token, shape BTV float32, and the new state.

    References:
        Freund, Schapire, Singer and Warmuth 1997, "Using and combining predictors that
        specialize" (sleeping experts); Herbster and Warmuth 1998, "Tracking the best expert"
        (fixed share, here towards the prior).
    """
    log_prob_BTV, _, state = trace_safe(parts, tokens_BT, state)
    return log_prob_BTV, state


def trace_safe(
    parts: Parts, tokens_BT: jax.Array, state: SafeState
) -> tuple[jax.Array, jax.Array, SafeState]:
    """Return log probabilities in safe mode, the weights behind them, shape BTE, and the state."""
    heard, router, caches = _listen(parts, tokens_BT, state.router, state.caches)
    order_E = jnp.argsort(parts.bank.key_E)
    awake_BTE = _shortlist(parts, heard.track_BTE)[..., order_E]
    log_prob_EBTV, sound_BTE, upper = _paths(parts, heard.x_BTD, order_E, awake_BTE, state.caches)
    weight_BTE, posterior_BE = _posterior(parts, tokens_BT, state, awake_BTE, log_prob_EBTV)
    log_weight_EBT1 = jnp.moveaxis(weight_BTE, -1, 0)[..., None]
    log_prob_BTV = jax.nn.logsumexp(log_weight_EBT1 + log_prob_EBTV, axis=0)
    log_prob_BTV, hedged = _hedge(parts, log_prob_BTV, heard, state.router, state.hedge)
    if caches is not None:
        caches = caches._replace(upper=upper)
    slot_E = jnp.argsort(order_E)
    tally = tally_paths(state.tally, awake_BTE[..., slot_E], sound_BTE[..., slot_E])
    awake_BE, log_prob_EBV = awake_BTE[:, -1], log_prob_EBTV[:, :, -1]
    after = SafeState(router, tally, hedged, posterior_BE, awake_BE, log_prob_EBV, caches)
    return log_prob_BTV, jnp.exp(weight_BTE)[..., slot_E], after


def _listen(
    parts: Parts, tokens_BT: jax.Array, state: RouterState, caches: Caches | None
) -> tuple[_Heard, RouterState, Caches | None]:
    """Run the trunk and the scouts."""
    backbone, interface = parts.backbone, parts.interface
    if caches is None:
        x_BTD, _ = backbone.trunk(tokens_BT)
    else:
        x_BTD, written = backbone.trunk(tokens_BT, caches.position, caches.trunk)
        position = caches.position + tokens_BT.shape[1]
        caches = caches._replace(trunk=tuple(written), position=position)
    feature_BTD = backbone.features(x_BTD)
    classes_BT = backbone.class_map[...][tokens_BT]
    bank, said_EBTC = parts.bank, None
    if interface.scout_prior:
        said_EBSC = predictions(bank.scouts, feature_BTD, state, bank.width_E)
        evidence_BTE = evidence_of(said_EBSC, classes_BT, state.started_B)
        said_EBTC = said_EBSC[:, :, 1:]
    else:
        evidence_BTE = evidence(bank.scouts, feature_BTD, classes_BT, state, bank.width_E)
    track_BTE = track_record(evidence_BTE, state.track_BE, interface.discount)
    if interface.mix_power:
        score_BTE = _follow(parts, evidence_BTE, state)
    else:
        score_BTE = _prior(parts) + track_BTE
    started_B = jnp.ones_like(state.started_B)
    after = RouterState(track_BTE[:, -1], score_BTE[:, -1], feature_BTD[:, -1], started_B)
    # At a document's first token there is no evidence for any expert.
    alone_E = jnp.full(bank.capacity, NEVER).at[0].set(0.0)
    first_BE = jnp.where(state.started_B[:, None], score_BTE[:, 0], alone_E)
    score_BTE = score_BTE.at[:, 0].set(first_BE)
    return _Heard(x_BTD, classes_BT, track_BTE, score_BTE, said_EBTC), after, caches


def _follow(parts: Parts, evidence_BTE: jax.Array, state: RouterState) -> jax.Array:
    """Return the log weights of the switching filter, shape BTE; sums run in order of keys."""
    interface, bank = parts.interface, parts.bank
    order_E = jnp.argsort(bank.key_E)
    prior_E = log_prior(bank.alive_E, interface.mix_prior, interface.mix_share)
    before_BE = jnp.where(state.started_B[:, None], state.trust_BE, prior_E)
    trust_BTE = switching_trust(
        evidence_BTE[..., order_E],
        before_BE[..., order_E],
        prior_E[order_E],
        power=interface.mix_power,
        rate=interface.mix_switch_rate,
        margin_E=jnp.full(len(order_E), interface.mix_margin).at[0].set(0.0)[order_E],
    )
    return trust_BTE[..., jnp.argsort(order_E)]


def _trust(parts: Parts, score_BTE: jax.Array) -> Choice:
    """Decide whom to mix."""
    interface = parts.interface
    return choose(score_BTE, parts.bank.key_E, interface.n_mixed, interface.mix_floor)


def _hedge(
    parts: Parts, logits_BTV: jax.Array, heard: _Heard, before: RouterState, state: HedgeState
) -> tuple[jax.Array, HedgeState]:
    """Give the experts' scouts their share of the output, if the interface says so."""
    if heard.said_EBTC is None:
        return logits_BTV, state
    order_E = jnp.argsort(parts.bank.key_E)
    weight_BTE = jax.nn.softmax(heard.score_BTE[..., order_E])[..., jnp.argsort(order_E)]
    return hedge(
        logits_BTV,
        heard.said_EBTC,
        weight_BTE,
        heard.classes_BT,
        parts.backbone.class_map[...],
        order_E,
        before.started_B,
        state,
        power=parts.interface.scout_power,
        prior=parts.interface.scout_prior,
        rate=parts.interface.scout_rate,
    )


def _prior(parts: Parts) -> jax.Array:
    """Return the log prior weight of every entry of the bank."""
    return log_prior(parts.bank.alive_E, parts.interface.backbone_prior)


def _shortlist(parts: Parts, track_BTE: jax.Array) -> jax.Array:
    """Return which paths predict each token, shape BTE: the backbone's and the best experts'."""
    alive_E = parts.bank.alive_E.at[0].set(False)
    score_BTE = jnp.where(alive_E, track_BTE, NEVER)
    choice = choose(score_BTE, parts.bank.key_E, parts.interface.top_k)
    chosen_BTE = jax.nn.one_hot(choice.expert_BTJ, alive_E.shape[0], dtype=bool).any(axis=-2)
    return (chosen_BTE & alive_E).at[..., 0].set(True)


def _mixed_feed_forward(
    parts: Parts, choice: Choice
) -> tuple[FeedForwardFn, Dispatch, list[jax.Array]]:
    """Return the mixture of the chosen experts; groups are made once and shared by all slots.

    In each slot, what counts as zero leaves its weight to the token's other choices, and to the
    backbone's own block where no choice is left: as if whoever broke had not been chosen there.

    With it come the groups, and a list that gets, from every slot that runs, which rows of the
    groups counted as zero.
    """
    batch, n_tokens, n_choices = choice.expert_BTJ.shape
    expert_MJ = choice.expert_BTJ.reshape(-1, n_choices)
    weight_MJ = choice.weight_BTJ.reshape(-1, n_choices)
    capacity = parts.bank.capacity
    block = default_block(batch * n_tokens, n_choices)
    dispatch = make_dispatch(expert_MJ, capacity, block)

    is_guest_P = jnp.repeat(dispatch.expert_of_block, block) != 0
    zeroed: list[jax.Array] = []

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        index = parts.interface.slots.index(layer)
        slot, bound = parts.bank.slots[index], parts.interface.output_bounds[index]
        x_MD = x_BTD.reshape(batch * n_tokens, -1)
        x_PD = gather_rows(x_MD, dispatch)
        y_PD = grouped_swiglu(x_PD, slot["w_gate"], slot["w_up"], slot["w_down"], dispatch)
        # A guest's contribution beyond the bound counts as zero, and so does one that is not
        # finite: no trust, however little, multiplies it.
        zeroed.append(is_guest_P & exceeds(y_PD, bound))
        y_PD = jnp.where(zeroed[-1][:, None], 0, y_PD)
        left_MJ, bereft_M = give_back(weight_MJ, zeroed[-1], dispatch)
        y_MD = combine_rows(y_PD, left_MJ.astype(y_PD.dtype), dispatch)

        def fall_back(y_MD: jax.Array) -> jax.Array:
            own_MD = parts.backbone.own_feed_forward(layer, x_MD)
            return jnp.where(bereft_M[:, None], own_MD, y_MD)

        # Sound experts pay for a look at whether it is needed, not for the backbone's block.
        y_MD = jax.lax.cond(bereft_M.any(), fall_back, lambda y_MD: y_MD, y_MD)
        return y_MD.reshape(x_BTD.shape)

    return run, dispatch, zeroed


def _fixed_feed_forward(parts: Parts, slots: Sequence[Mapping[str, jax.Array]]) -> FeedForwardFn:
    """Return one body, always on."""
    index_of = parts.interface.slots.index

    def run(layer: int, x_BTD: jax.Array) -> jax.Array:
        return swiglu(x_BTD, *(slots[index_of(layer)][name] for name in MATRICES))

    return run


def _paths(
    parts: Parts,
    x_BTD: jax.Array,
    order_E: jax.Array,
    awake_BTE: jax.Array,
    caches: Caches | None,
) -> tuple[jax.Array, jax.Array, tuple[KVCache, ...]]:
    """Run every path that is needed whole: log probabilities EBTV, where sound BTE, and caches.

    Without caches a path that no token shortlists is skipped. With them every living path runs,
    since a later token may ask for it.
    """
    backbone, bank = parts.backbone, parts.bank
    needed_E = awake_BTE.any(axis=(0, 1)) if caches is None else bank.alive_E[order_E]
    vocab = parts.interface.vocab_size
    uniform_BTV = jnp.full((*x_BTD.shape[:2], vocab), -jnp.log(vocab), jnp.float32)
    own = () if caches is None else caches.upper
    position = 0 if caches is None else caches.position

    def run(index: jax.Array, cache: tuple[KVCache, ...]) -> _PathOutput:
        feed_forward = _fixed_feed_forward(parts, entry_slots(bank, index))
        logits_BTV, written = backbone.upper(x_BTD, feed_forward, position, cache or None)
        # A path that breaks predicts nothing: the uniform distribution.
        sound_BT1 = jnp.isfinite(logits_BTV).all(axis=-1, keepdims=True)
        log_prob_BTV = jax.nn.log_softmax(jnp.where(sound_BT1, logits_BTV, 0.0), axis=-1)
        return log_prob_BTV, sound_BT1[..., 0], tuple(written)

    def one(entry: tuple[jax.Array, jax.Array, tuple[KVCache, ...]]) -> _PathOutput:
        index, needed, cache = entry

        def skip(_: jax.Array, cache: tuple[KVCache, ...]) -> _PathOutput:
            return uniform_BTV, jnp.ones(x_BTD.shape[:2], bool), cache

        return jax.lax.cond(needed, run, skip, index, cache)

    log_prob_EBTV, sound_EBT, upper = jax.lax.map(one, (order_E, needed_E, own))
    return log_prob_EBTV, jnp.moveaxis(sound_EBT, 0, -1), upper


def _posterior(
    parts: Parts,
    tokens_BT: jax.Array,
    state: SafeState,
    awake_BTE: jax.Array,
    log_prob_EBTV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return each path's log weight at every position, BTE, and the last posterior, BE."""
    # What each path had said of token t, one position earlier.
    before_EBTV = jnp.concatenate([state.log_prob_EBV[:, :, None], log_prob_EBTV[:, :, :-1]], 2)
    said_EBT = jnp.take_along_axis(before_EBTV, tokens_BT[None, ..., None], axis=-1)[..., 0]
    voted_BTE = jnp.concatenate([state.awake_BE[:, None], awake_BTE[:, :-1]], axis=1)
    seen_BT = jnp.ones(tokens_BT.shape, bool).at[:, 0].set(state.router.started_B)
    prior_E = _prior(parts)[jnp.argsort(parts.bank.key_E)]
    rate = parts.interface.switch_rate

    def step(
        posterior_BE: jax.Array, at: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array]]:
        said_BE, voted_BE, awake_BE, seen_B = at
        weight_BE = _normalise(posterior_BE, voted_BE)
        mixture_B1 = jax.nn.logsumexp(weight_BE + said_BE, axis=-1, keepdims=True)
        updated_BE = jnp.where(voted_BE, posterior_BE + said_BE - mixture_B1, posterior_BE)
        if rate:
            updated_BE = jnp.logaddexp(updated_BE + jnp.log1p(-rate), jnp.log(rate) + prior_E)
        posterior_BE = jnp.where(seen_B[:, None], updated_BE, posterior_BE)
        return posterior_BE, (_normalise(posterior_BE, awake_BE),)

    per_token = (said_EBT.transpose(2, 1, 0), voted_BTE, awake_BTE, seen_BT)
    along_T = (per_token[0], *(jnp.moveaxis(x, 1, 0) for x in per_token[1:]))
    posterior_BE, (weight_TBE,) = jax.lax.scan(step, state.posterior_BE, along_T)
    return jnp.moveaxis(weight_TBE, 0, 1), posterior_BE


def _normalise(log_weight_BE: jax.Array, mask_BE: jax.Array) -> jax.Array:
    """Return log weights that sum to one over the masked entries."""
    return jax.nn.log_softmax(jnp.where(mask_BE, log_weight_BE, NEVER), axis=-1)


def _empty_caches(parts: Parts, batch: int, length: int | None) -> Caches | None:
    """Return empty caches of a length, or None for none."""
    if length is None:
        return None
    backbone = parts.backbone
    return Caches(
        tuple(backbone.empty_caches(batch, length, range(backbone.cfg.tap))),
        tuple(backbone.empty_caches(batch, length, backbone.cfg.slots)),
        jnp.int32(0),
    )
