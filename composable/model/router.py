"""The router: weighs experts at every token by how well their scouts predicted the text so far.

    e[i,t] = log q_i(class(t) | trunk features at t-1)       evidence
    S[i,t] = discount * S[i,t-1] + e[i,t]                    track record
    w[.,t] = softmax over the top k of (log prior_i + S[i,t])

With the interface's rule `SwitchingFilter`, mix mode uses the posterior of a hidden Markov chain
that may switch experts at every token:

    v[i,t] = w[i,t-1] exp(power (e[i,t] - margin_i)), normalised
    w[i,t] = (1 - rate) v[i,t] + rate prior_i                the top k of it, above the floor

The margin is zero for the backbone and the same for all experts.

Pure functions on arrays. An expert's evidence and track record are computed by the same program on
the same numbers whatever else is installed, so they are bit-identical in every bank. This file does
not run bodies or the trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from composable.model.scout import class_log_probs

# Lower bound on log-probabilities, in nats, which also replaces those that are not finite: below
# those of any working scout, and small enough in size that sums along a document stay finite.
_WORST = -1e4
# Log weight of an entry that must never be chosen: zero after exp, and finite, which keeps
# gradients finite.
NEVER = -1e30


class ScoutBank(NamedTuple):
    """Stacked scouts of all experts; narrower ones are zero-padded (gelu(0) = 0 adds nothing)."""

    w_in_EDW: jax.Array
    b_in_EW: jax.Array
    w_out_EWC: jax.Array
    b_out_EC: jax.Array


class RouterState(NamedTuple):
    """State that the router carries along a document, in addition to the KV cache."""

    track_BE: jax.Array  # track records so far, nats
    posterior_BE: jax.Array  # log weights of the switching filter
    feature_BD: jax.Array  # trunk features at the last position
    started_B: jax.Array  # whether any position was read
    occupancy_BEO: jax.Array | None = None  # of the filter's chain; E and O in the order of keys


class Choice(NamedTuple):
    """One routing decision per token, shared by all slots; largest weight first.

    A choice below the floor has weight zero and the index E, which belongs to no expert.
    """

    expert_BTJ: jax.Array
    weight_BTJ: jax.Array


def empty_state(batch: int, n_experts: int, d_model: int) -> RouterState:
    """Return the state at the start of a document.

    Args:
        batch: Sequences (B).
        n_experts: Entries of the bank (E).
        d_model: Width of the trunk's features (D).
    """
    return RouterState(
        jnp.zeros((batch, n_experts), jnp.float32),
        jnp.zeros((batch, n_experts), jnp.float32),
        jnp.zeros((batch, d_model), jnp.float32),
        jnp.zeros(batch, bool),
    )


def evidence(
    scouts: ScoutBank,
    feature_BTD: jax.Array,
    classes_BT: jax.Array,
    state: RouterState,
    width_E: jax.Array | None = None,
) -> jax.Array:
    """Return the log-likelihood of each token under each scout, from the features just before it.

    Args:
        scouts: Stacked scouts.
        feature_BTD: Trunk features at these positions.
        classes_BT: Class of the token at each of these positions.
        state: State before the first of them.
        width_E: Hidden units of each scout before padding, 0 for an empty entry; by default all
            units are used.

    Returns:
        Log-likelihoods in nats, shape BTE; zero for a token without a position before it. An empty
        entry counts as the uniform distribution.
    """
    before_BTD = jnp.concatenate([state.feature_BD[:, None], feature_BTD[:, :-1]], axis=1)
    log_prob_EBT = _map_scouts(
        scouts, width_E, lambda *scout: scout_evidence(scout, before_BTD, classes_BT)
    )
    return _where_predicted(jnp.moveaxis(log_prob_EBT, 0, -1), state.started_B)


def scout_log_probs(
    scouts: ScoutBank,
    feature_BTD: jax.Array,
    state: RouterState,
    width_E: jax.Array | None = None,
) -> jax.Array:
    """Return each scout's log-probabilities of the next token's class.

    Args:
        scouts: Stacked scouts.
        feature_BTD: Trunk features at these positions.
        state: State before the first of them.
        width_E: As for `evidence`.

    Returns:
        Log-probabilities in nats, shape EBUC with U = T + 1: entry u is conditioned on position
        u - 1, and entry 0 on the last position in `state`.
    """
    feature_BUD = jnp.concatenate([state.feature_BD[:, None], feature_BTD], axis=1)
    return _map_scouts(
        scouts, width_E, lambda *scout: _bounded(class_log_probs(feature_BUD, *scout))
    )


def evidence_from(
    scout_log_prob_EBUC: jax.Array, classes_BT: jax.Array, started_B: jax.Array
) -> jax.Array:
    """Return the same evidence as `evidence`, from the result of `scout_log_probs`.

    Args:
        scout_log_prob_EBUC: Log-probabilities in nats, as `scout_log_probs` returns them.
        classes_BT: Class of the token at each of these positions.
        started_B: Whether a position precedes these.

    Returns:
        Log-likelihoods in nats, shape BTE.
    """
    log_prob_EBT1 = jnp.take_along_axis(
        scout_log_prob_EBUC[:, :, :-1], classes_BT[None, ..., None], axis=-1
    )
    return _where_predicted(jnp.moveaxis(log_prob_EBT1[..., 0], 0, -1), started_B)


def _where_predicted(log_prob_BTE: jax.Array, started_B: jax.Array) -> jax.Array:
    """Return evidence that is zero for a token without a position before it."""
    predicted_BT = jnp.ones(log_prob_BTE.shape[:2], bool).at[:, 0].set(started_B)
    return jnp.where(predicted_BT[..., None], log_prob_BTE, 0.0)


def _map_scouts(
    scouts: ScoutBank, width_E: jax.Array | None, score: Callable[..., jax.Array]
) -> jax.Array:
    """Return the score of each scout, E first; an empty entry counts as a uniform prediction.

    Scouts run one at a time, each through a program that depends on its own width alone. In one
    batched product the bits of a score could depend on how many other scouts there are. Multiplying
    padding and empty entries would cost as much as multiplying experts, so both are skipped.
    """
    n_experts, bound = scouts.b_in_EW.shape
    width_E = jnp.full(n_experts, bound) if width_E is None else width_E
    widths = sorted({max(1, bound // 2), bound})
    program_E = jnp.where(
        width_E > 0, 1 + jnp.searchsorted(jnp.asarray(widths), width_E, method="compare_all"), 0
    )

    def score_first_units(width: int) -> Callable[[jax.Array], jax.Array]:
        return lambda e: score(*_first_units(scouts, e, width))

    result = jax.eval_shape(score_first_units(bound), 0)

    def uniform(_: jax.Array) -> jax.Array:
        return jnp.full(result.shape, -jnp.log(jnp.float32(scouts.b_out_EC.shape[-1])))

    programs = [uniform, *map(score_first_units, widths)]
    stack: jax.Array = jax.lax.map(
        lambda entry: jax.lax.switch(entry[0], programs, entry[1]),
        (program_E, jnp.arange(n_experts)),
    )
    return stack


def scout_evidence(
    scout: tuple[jax.Array, ...], before_BTD: jax.Array, classes_BT: jax.Array
) -> jax.Array:
    """Return the log-likelihood of each token under one scout.

    Args:
        scout: Its arrays, of shapes DW, W, WC and C.
        before_BTD: Trunk features at the positions just before the tokens.
        classes_BT: Classes of the tokens.

    Returns:
        Log-likelihoods in nats, shape BT.
    """
    log_prob_BTC = class_log_probs(before_BTD, *scout)
    log_prob_BT = jnp.take_along_axis(log_prob_BTC, classes_BT[..., None], axis=-1)[..., 0]
    return _bounded(log_prob_BT)


def _bounded(log_prob: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(log_prob), jnp.maximum(log_prob, _WORST), _WORST)


def _first_units(scouts: ScoutBank, e: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """Return one scout's arrays cut to its first `width` hidden units; the others are padding."""
    return (
        scouts.w_in_EDW[e, :, :width],
        scouts.b_in_EW[e, :width],
        scouts.w_out_EWC[e, :width],
        scouts.b_out_EC[e],
    )


def track_record(evidence_BTE: jax.Array, track_BE: jax.Array, discount: float) -> jax.Array:
    """Return the discounted sums of evidence, shape BTE.

    Args:
        evidence_BTE: Log-likelihoods in nats.
        track_BE: Track records before the first position, in nats.
        discount: Factor per token, in (0, 1].
    """

    def step(track_BE: jax.Array, evidence_BE: jax.Array) -> tuple[jax.Array, jax.Array]:
        track_BE = discount * track_BE + evidence_BE
        return track_BE, track_BE

    _, track_TBE = jax.lax.scan(step, track_BE, jnp.moveaxis(evidence_BTE, 1, 0))
    return jnp.moveaxis(track_TBE, 0, 1)


def switching_posterior(
    evidence_BTE: jax.Array,
    posterior_BE: jax.Array,
    log_prior_E: jax.Array,
    *,
    power: float,
    rate: float,
    margin_E: jax.Array | float = 0.0,
) -> jax.Array:
    """Return the log posterior of a hidden Markov chain that may switch experts at every token.

    A discounted track record forgets at a constant rate. This filter keeps its evidence inside a
    domain and still follows a switch, because no weight falls below `rate` times its prior. Scouts
    predict neighbouring tokens from similar features, so their evidence is correlated, although a
    product of likelihoods assumes independence; a `power` below 1 corrects for that. The weight of
    an expert whose scout is only as good as the backbone's would drift with noise; a positive
    margin makes it decay.

    Args:
        evidence_BTE: Log-likelihoods in nats, E in an order that does not depend on bank entries.
        posterior_BE: Log weights before the first position.
        log_prior_E: Log prior weights, to which the chain returns at a switch.
        power: Exponent on likelihoods, in (0, 1].
        rate: Probability of a switch per token, in (0, 1).
        margin_E: Amount subtracted from each expert's evidence per token, in nats.

    Returns:
        Log weights, shape BTE.

    References:
        Herbster and Warmuth 1998, "Tracking the best expert" (fixed share, here towards the prior);
        Grünwald 2012, "The safe Bayesian" (likelihoods to a power).
    """

    def step(posterior_BE: jax.Array, evidence_BE: jax.Array) -> tuple[jax.Array, jax.Array]:
        updated_BE = jax.nn.log_softmax(posterior_BE + power * (evidence_BE - margin_E), axis=-1)
        posterior_BE = jnp.logaddexp(updated_BE + jnp.log1p(-rate), jnp.log(rate) + log_prior_E)
        return posterior_BE, posterior_BE

    _, posterior_TBE = jax.lax.scan(step, posterior_BE, jnp.moveaxis(evidence_BTE, 1, 0))
    return jnp.moveaxis(posterior_TBE, 0, 1)


def log_prior(alive_E: jax.Array, backbone_prior: float, most: float = 1.0) -> jax.Array:
    """Return log prior weights: the backbone's prior, and the rest evenly over installed experts.

    Args:
        alive_E: Which bank entries are in use; the backbone's always is.
        backbone_prior: Prior weight of the backbone, in (0, 1).
        most: Largest prior weight of one expert; the remainder goes to the backbone.

    Returns:
        Log prior weights, shape E; NEVER for an empty entry.
    """
    n_experts = jnp.maximum(alive_E.sum() - 1, 1)
    # float32 rather than a weakly typed scalar: a weak type in the first state would make every
    # step compile twice.
    own = jnp.float32(backbone_prior)
    each = (1 - own) / n_experts
    if most < 1:
        each = jnp.minimum(each, most)
        own = 1 - n_experts * each
    share_E = jnp.where(jnp.arange(alive_E.shape[0]) == 0, own, each)
    return jnp.where(alive_E, jnp.log(share_E), NEVER)


def choose(score_BTE: jax.Array, key_E: jax.Array, k: int, floor: float = 0.0) -> Choice:
    """Return the k experts with the largest score at each token, and their softmax weights.

    An expert with less weight than the floor is left out and costs nothing; the best is always
    kept.

    Args:
        score_BTE: Log weights, such as log prior plus track record; NEVER for an empty entry.
        key_E: A number of each expert's own that settles exact ties, so that the index of its bank
            entry never does.
        k: Largest number of experts per token.
        floor: Least weight, in [0, 1).
    """
    n_experts = score_BTE.shape[-1]
    order_E = jnp.argsort(key_E)
    top_BTJ, rank_BTJ = jax.lax.top_k(score_BTE[..., order_E], min(k, n_experts))
    expert_BTJ, weight_BTJ = order_E[rank_BTJ], jax.nn.softmax(top_BTJ, axis=-1)
    if not floor:
        return Choice(expert_BTJ, weight_BTJ)
    is_kept_BTJ = (weight_BTJ >= floor).at[..., 0].set(True)
    weight_BTJ = jax.nn.softmax(jnp.where(is_kept_BTJ, top_BTJ, -jnp.inf), axis=-1)
    return Choice(jnp.where(is_kept_BTJ, expert_BTJ, n_experts), weight_BTJ)


def leave_out(choice: Choice, is_kept_T: jax.Array, n_experts: int) -> Choice:
    """Return a choice in which some tokens choose no expert.

    Args:
        choice: The choice.
        is_kept_T: Which tokens choose.
        n_experts: Entries of the bank (E).
    """
    is_kept_T1 = is_kept_T[:, None]
    return Choice(
        jnp.where(is_kept_T1, choice.expert_BTJ, n_experts),
        jnp.where(is_kept_T1, choice.weight_BTJ, 0),
    )


def dense_weights(choice: Choice, n_experts: int) -> jax.Array:
    """Return a choice as one weight per expert, shape BTE, zero for those not chosen."""
    chosen_BTJE = jax.nn.one_hot(choice.expert_BTJ, n_experts, dtype=choice.weight_BTJ.dtype)
    return jnp.einsum("BTJ,BTJE->BTE", choice.weight_BTJ, chosen_BTJE)
