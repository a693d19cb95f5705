"""The output mixture: combines the model's probabilities with those of the experts' scouts.

A scout with router weight is a predictor of its domain, and its prediction is known before any body
runs. With w the router weights, P the model's probability of a class of tokens and q_i that of
expert i's scout,

    Q[c] = w_0 P[c] + sum over experts w_i q_i[c]              linear pool; the backbone enters as P
    G[c] = P[c]^(1 - power) Q[c]^power, normalised             logarithmic pool of P and Q
    p'[v] = p[v] ((1 - share) + share G[c(v)] / P[c(v)])       mixture of P and G, by class

where the share is updated at every token by how well G and P predicted it (fixed share). Scouts
that predict worse than the model therefore cost little: the output of a document of n tokens costs
at most -log(1 - prior) - n log(1 - rate prior) nats more than the model alone. Without experts, G
equals P and the logits are unchanged, bit for bit.

This file does not run scouts or compute router weights (`router.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from composable.model.chunks import Length, take_last
from composable.model.occupancy import IsDrawn

# An expert with less weight at a token is left out; its weight goes to the backbone.
_LEAST_WEIGHT = 1e-3
# Bounds on divisors from below and on ratios from above, so that everything stays finite. Where a
# bound applies, the pooled probabilities add up to less than one.
_LEAST_PROBABILITY = 1e-30
_LEAST_TOTAL = 1e-12
_LARGEST_RATIO = 1e30


class OutputMixtureState(NamedTuple):
    """State carried from one token of a document to the next."""

    share_B: jax.Array  # weight of G in the output, before the next token
    ratio_BC: jax.Array  # G / P of every class, for the next token


def empty_output_mixture(batch: int, n_classes: int) -> OutputMixtureState:
    """Return the state at the start of a document.

    Args:
        batch: Sequences (B).
        n_classes: Classes of tokens (C).
    """
    return OutputMixtureState(
        jnp.zeros(batch, jnp.float32), jnp.ones((batch, n_classes), jnp.float32)
    )


def mix_outputs(
    logits_BTV: jax.Array,
    scout_log_prob_EBTC: jax.Array,
    weight_BTE: jax.Array,
    classes_BT: jax.Array,
    class_map_V: jax.Array,
    order_E: jax.Array,
    started_B: jax.Array,
    state: OutputMixtureState,
    is_drawn: IsDrawn = False,
    length: Length = None,
    *,
    power: float,
    prior: float,
    rate: float,
) -> tuple[jax.Array, OutputMixtureState]:
    """Return the logits of the output mixture.

    Args:
        logits_BTV: The model's logits for the token after each position.
        scout_log_prob_EBTC: Every scout's log-probabilities of that token's class, in nats; the
            backbone's entry is not used.
        weight_BTE: Router weights, the backbone at entry 0; they sum to one over E.
        classes_BT: Classes of the tokens at these positions.
        class_map_V: Class of every token; the identity if there are as many classes as tokens.
        order_E: Bank entries in the order of their keys; sums over experts run in this order.
        started_B: Whether a position precedes these, so that their first token was predicted.
        state: State before the first position.
        is_drawn: Whether the model drew these tokens, which are then no evidence for the share.
        length: Tokens of the text.
        power: Exponent on Q, in (0, 1].
        prior: Share of G at the start of a document, in (0, 1).
        rate: Probability per token that the share restarts from `prior`, in (0, 1).

    Returns:
        Logits, shape BTV, and the state after the last position of the text.

    References:
        Genest and Zidek 1986, "Combining probability distributions" (logarithmic pool); Herbster
        and Warmuth 1998, "Tracking the best expert" (fixed share, of two predictors).
    """
    prob_BTC = _by_class(jax.nn.softmax(logits_BTV), class_map_V, scout_log_prob_EBTC.shape[-1])
    kept_weight_BTE = jnp.where(weight_BTE < _LEAST_WEIGHT, 0.0, weight_BTE).at[..., 0].set(0.0)
    ratio_BTC = _pool_ratio(prob_BTC, scout_log_prob_EBTC, kept_weight_BTE, order_E) ** power
    total_BT1 = jnp.maximum((prob_BTC * ratio_BTC).sum(-1, keepdims=True), _LEAST_TOTAL)
    has_expert_BT1 = (kept_weight_BTE > 0).any(-1, keepdims=True)
    ratio_BTC = jnp.where(has_expert_BT1, jnp.minimum(ratio_BTC / total_BT1, _LARGEST_RATIO), 1.0)
    before_BTC = jnp.concatenate([state.ratio_BC[:, None], ratio_BTC[:, :-1]], axis=1)
    gain_BT = jnp.take_along_axis(before_BTC, classes_BT[..., None], axis=-1)[..., 0]
    if is_drawn is not False:
        gain_BT = jnp.where(is_drawn, 1.0, gain_BT)

    def update_share(
        share_B: jax.Array, at: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        gain_B, was_predicted_B = at
        updated_B = share_B * gain_B / (1 - share_B + share_B * gain_B)
        share_B = jnp.where(was_predicted_B, (1 - rate) * updated_B + rate * prior, prior)
        return share_B, share_B

    was_predicted_BT = jnp.ones(classes_BT.shape, bool).at[:, 0].set(started_B)
    _, share_TB = jax.lax.scan(update_share, state.share_B, (gain_BT.T, was_predicted_BT.T))
    change_BTC = jnp.log1p(share_TB.T[..., None] * (ratio_BTC - 1))
    is_identity = change_BTC.shape[-1] == logits_BTV.shape[-1]
    change_BTV = change_BTC if is_identity else change_BTC[..., class_map_V]
    after = OutputMixtureState(take_last(share_TB.T, length), take_last(ratio_BTC, length))
    return logits_BTV + change_BTV, after


def _by_class(prob_BTV: jax.Array, class_map_V: jax.Array, n_classes: int) -> jax.Array:
    """Return the probability of every class."""
    if n_classes == prob_BTV.shape[-1]:
        return prob_BTV
    zeros_BTC = jnp.zeros((*prob_BTV.shape[:2], n_classes), prob_BTV.dtype)
    return zeros_BTC.at[..., class_map_V].add(prob_BTV)


def _pool_ratio(
    prob_BTC: jax.Array,
    scout_log_prob_EBTC: jax.Array,
    kept_weight_BTE: jax.Array,
    order_E: jax.Array,
) -> jax.Array:
    """Return Q / P of every class, shape BTC, from the weights of the experts kept."""

    def add_if_kept(sum_BTC: jax.Array, e: jax.Array) -> tuple[jax.Array, None]:
        weight_BT1 = kept_weight_BTE[..., e][..., None]

        def add_scout(sum_BTC: jax.Array) -> jax.Array:
            return sum_BTC + weight_BT1 * jnp.exp(scout_log_prob_EBTC[e])

        # At most tokens most experts are left out; the condition skips their work.
        return jax.lax.cond(
            (weight_BT1 > 0).any(), add_scout, lambda sum_BTC: sum_BTC, sum_BTC
        ), None

    sum_BTC, _ = jax.lax.scan(add_if_kept, jnp.zeros_like(prob_BTC), order_E)
    own_BT1 = 1 - kept_weight_BTE[..., order_E].sum(-1, keepdims=True)
    return own_BT1 + sum_BTC / jnp.maximum(prob_BTC, _LEAST_PROBABILITY)
