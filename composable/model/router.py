"""The router: experts win tokens by predicting.

    e[i,t] = log q_i(class(t) | trunk features at t-1)       evidence
    S[i,t] = discount * S[i,t-1] + e[i,t]                    track record
    w[.,t] = softmax over the top k of (log prior_i + S[i,t])

or, where the interface says so, in mix mode by a filter that expects switches:

    v[i,t] = w[i,t-1] exp(power (e[i,t] - margin_i)), normalised
    w[i,t] = (1 - rate) v[i,t] + rate prior_i                the top k of it, above the floor

with a margin of zero for the backbone and one for all experts.

Pure functions on arrays. An expert's evidence and track record are computed by the same program on
the same numbers whatever else is installed, so they are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from composable.model.scout import class_log_probs

# What a prediction counts as that is not finite or lower still, in nats: worse than any scout that
# works, and few enough that sums along a document stay finite.
_WORST = -1e4
# The log weight of what must never be chosen: zero after exp, and finite, so gradients stay so.
NEVER = -1e30


class ScoutBank(NamedTuple):
    """Scouts of all experts, narrower ones padded with zeros (gelu(0) = 0 adds nothing)."""

    w_in_EDW: jax.Array
    b_in_EW: jax.Array
    w_out_EWC: jax.Array
    b_out_EC: jax.Array


class RouterState(NamedTuple):
    """What the router carries along a document, beside the KV cache."""

    track_BE: jax.Array  # track records so far, nats
    posterior_BE: jax.Array  # log weights of the switching filter
    feature_BD: jax.Array  # trunk features at the last position
    started_B: jax.Array  # whether there was a last position


class Choice(NamedTuple):
    """One routing decision per token, shared by all slots; best expert first.

    A choice below the floor has weight zero and the index E, which no expert has.
    """

    expert_BTJ: jax.Array
    weight_BTJ: jax.Array


def empty_state(batch: int, n_experts: int, d_model: int) -> RouterState:
    """Return the state at the start of a document."""
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
    """Return how well each scout predicted each token, from the features just before it.

    Args:
        scouts: Stacked scouts.
        feature_BTD: Trunk features of these positions.
        classes_BT: Class of the token at each of these positions.
        state: State before the first of them.
        width_E: Hidden units of each scout before it was padded, 0 where there is none; by
            default all are used.

    Returns:
        Log likelihoods in nats, shape BTE; zero where there is no position before. Where there is
        no scout they are those of the uniform distribution.
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
    """Return what each scout says of the class of the next token, at the last position, too.

    Args:
        scouts: Stacked scouts.
        feature_BTD: Trunk features of these positions.
        state: State before the first of them.
        width_E: As for `evidence`.

    Returns:
        Log probabilities, shape EBUC: first those after the position before these.
    """
    feature_BUD = jnp.concatenate([state.feature_BD[:, None], feature_BTD], axis=1)
    return _map_scouts(
        scouts, width_E, lambda *scout: _bounded(class_log_probs(feature_BUD, *scout))
    )


def evidence_from(
    scout_log_prob_EBUC: jax.Array, classes_BT: jax.Array, started_B: jax.Array
) -> jax.Array:
    """Return evidence as `evidence` does, shape BTE, from what `scout_log_probs` returned."""
    said_EBT1 = jnp.take_along_axis(
        scout_log_prob_EBUC[:, :, :-1], classes_BT[None, ..., None], axis=-1
    )
    return _where_predicted(jnp.moveaxis(said_EBT1[..., 0], 0, -1), started_B)


def _where_predicted(log_prob_BTE: jax.Array, started_B: jax.Array) -> jax.Array:
    """Return evidence without that of a token before which there was no position."""
    predicted_BT = jnp.ones(log_prob_BTE.shape[:2], bool).at[:, 0].set(started_B)
    return jnp.where(predicted_BT[..., None], log_prob_BTE, 0.0)


def _map_scouts(
    scouts: ScoutBank, width_E: jax.Array | None, score: Callable[..., jax.Array]
) -> jax.Array:
    """Return what each scout answers, E first; an empty entry's scout says that all is as likely.

    One scout at a time, through a program that only its own width decides: the bits of its score
    cannot depend on how many others there are, as they could in one batched product. Units that
    are padding cost as much as others, and a bank's empty entries as much as experts, so neither
    is multiplied.
    """
    n_experts, bound = scouts.b_in_EW.shape
    width_E = jnp.full(n_experts, bound) if width_E is None else width_E
    widths = sorted({max(1, bound // 2), bound})
    program_E = jnp.where(width_E > 0, 1 + jnp.searchsorted(jnp.asarray(widths), width_E), 0)

    def score_first_units(width: int) -> Callable[[jax.Array], jax.Array]:
        return lambda e: score(*_first_units(scouts, e, width))

    answer = jax.eval_shape(score_first_units(bound), 0)

    def uniform(_: jax.Array) -> jax.Array:
        return jnp.full(answer.shape, -jnp.log(jnp.float32(scouts.b_out_EC.shape[-1])))

    programs = [uniform, *map(score_first_units, widths)]
    return jax.lax.map(
        lambda entry: jax.lax.switch(entry[0], programs, entry[1]),
        (program_E, jnp.arange(n_experts)),
    )


def scout_evidence(
    scout: tuple[jax.Array, ...], before_BTD: jax.Array, classes_BT: jax.Array
) -> jax.Array:
    """Return how well one scout predicted each token, shape BT, in nats.

    Args:
        scout: Its matrices DW, W, WC and C.
        before_BTD: Trunk features of the positions just before the tokens.
        classes_BT: Classes of the tokens.
    """
    log_prob_BTC = class_log_probs(before_BTD, *scout)
    log_prob_BT = jnp.take_along_axis(log_prob_BTC, classes_BT[..., None], axis=-1)[..., 0]
    return _bounded(log_prob_BT)


def _bounded(log_prob: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(log_prob), jnp.maximum(log_prob, _WORST), _WORST)


def _first_units(scouts: ScoutBank, e: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """Return one scout without the hidden units from `width` on, which are padding."""
    return (
        scouts.w_in_EDW[e, :, :width],
        scouts.b_in_EW[e, :width],
        scouts.w_out_EWC[e, :width],
        scouts.b_out_EC[e],
    )


def track_record(evidence_BTE: jax.Array, track_BE: jax.Array, discount: float) -> jax.Array:
    """Return the discounted sums of evidence, shape BTE.

    Args:
        evidence_BTE: Log likelihoods in nats.
        track_BE: Track records before the first position.
        discount: Factor per token.
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
    """Return log weights by a hidden Markov chain that seldom changes experts, shape BTE.

    A discounted track record forgets at one pace; this remembers long inside a document and little
    at a switch, because no weight falls below `rate` times its prior. Scouts predict neighbouring
    tokens from much the same features, so their evidence is not as independent as the product of
    likelihoods takes it to be; `power` below 1 corrects for that. Where an expert's scout is as
    good as the backbone's, its weight wanders with the noise; a margin has it sink.

    Args:
        evidence_BTE: Log likelihoods in nats, E in an order that no slot decides.
        posterior_BE: Log weights before the first position.
        log_prior_E: Log prior weights, to which the chain returns.
        power: Exponent on likelihoods.
        rate: Probability of a change per token.
        margin_E: What is subtracted from each expert's evidence per token, in nats.

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
    """Return log prior weights: the backbone's share, the rest evenly to the living experts.

    Args:
        alive_E: Which slots of the bank hold an expert; the backbone's is always alive.
        backbone_prior: The backbone's share, in (0, 1).
        most: What one expert may have at most; what then is left is the backbone's, too.
    """
    n_experts = jnp.maximum(alive_E.sum() - 1, 1)
    # Of a strong type: a weak one in the first state would compile every step twice.
    own = jnp.float32(backbone_prior)
    each = (1 - own) / n_experts
    if most < 1:
        each = jnp.minimum(each, most)
        own = 1 - n_experts * each
    share_E = jnp.where(jnp.arange(alive_E.shape[0]) == 0, own, each)
    return jnp.where(alive_E, jnp.log(share_E), NEVER)


def choose(score_BTE: jax.Array, key_E: jax.Array, k: int, floor: float = 0.0) -> Choice:
    """Return the k best experts of each token and their softmax weights.

    Who has less weight than the floor is left out and costs nothing; the best never is.

    Args:
        score_BTE: Log prior plus track record; NEVER for a dead slot.
        key_E: A number of each expert's own that settles exact ties, so that the slot it happens
            to sit in never does.
        k: How many at most.
        floor: Least weight, in [0, 1).
    """
    n_experts = score_BTE.shape[-1]
    order_E = jnp.argsort(key_E)
    top_BTJ, rank_BTJ = jax.lax.top_k(score_BTE[..., order_E], min(k, n_experts))
    expert_BTJ, weight_BTJ = order_E[rank_BTJ], jax.nn.softmax(top_BTJ, axis=-1)
    if not floor:
        return Choice(expert_BTJ, weight_BTJ)
    taken_BTJ = (weight_BTJ >= floor).at[..., 0].set(True)
    weight_BTJ = jax.nn.softmax(jnp.where(taken_BTJ, top_BTJ, -jnp.inf), axis=-1)
    return Choice(jnp.where(taken_BTJ, expert_BTJ, n_experts), weight_BTJ)


def dense_weights(choice: Choice, n_experts: int) -> jax.Array:
    """Return a choice as one weight per expert, shape BTE, zero for those not chosen."""
    chosen_BTJE = jax.nn.one_hot(choice.expert_BTJ, n_experts, dtype=choice.weight_BTJ.dtype)
    return jnp.einsum("BTJ,BTJE->BTE", choice.weight_BTJ, chosen_BTJE)
