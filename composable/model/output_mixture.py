"""The output mixture: the model's probabilities with those of the experts' scouts.

A scout that wins tokens is a predictor of its domain, and it has spoken before any body runs. With
w the router's weights and P the model's probability of a class of tokens,

    Q[c] = w_0 P[c] + sum over experts w_i q_i[c]              what scouts say; for the backbone, P
    G[c] = P[c]^(1 - power) Q[c]^power, normalised             both together, a logarithmic pool
    p'[v] = p[v] ((1 - share) + share G[c(v)] / P[c(v)])       a mixture of P and G, by class

where the share follows, token by token, how well G and P really predicted (fixed share). So the
scouts cost next to nothing where they know less than the model: the output of a document of n
tokens costs at most -log(1 - prior) - n log(1 - rate prior) nats more than the model alone would.
Without experts G is P, and nothing changes, to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# An expert with less weight at a token is left out; the backbone's part grows by it.
_LEAST = 1e-3
# What is divided by is no less, and a ratio no more, so that all stays finite; where that bites,
# what is said adds up to less than one.
_LEAST_PROBABILITY = 1e-30
_LEAST_TOTAL = 1e-12
_LARGEST_RATIO = 1e30


class OutputMixtureState(NamedTuple):
    """What is carried along a document for the next token."""

    share_B: jax.Array  # the scouts' share of the output
    ratio_BC: jax.Array  # G / P of every class


def empty_output_mixture(batch: int, n_classes: int) -> OutputMixtureState:
    """Return the state at the start of a document."""
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
    *,
    power: float,
    prior: float,
    rate: float,
) -> tuple[jax.Array, OutputMixtureState]:
    """Return logits of the model and its experts' scouts together.

    Args:
        logits_BTV: The model's logits of the token after each position.
        scout_log_prob_EBTC: Every scout's log-probabilities of that token's class; the backbone's
            entry is not used.
        weight_BTE: Router weights, the backbone at entry 0; they sum to one over E.
        classes_BT: Classes of these positions' tokens.
        class_map_V: Class of every token; the identity where there are as many classes as tokens.
        order_E: Bank entries in the order of their keys, in which sums run.
        started_B: Whether the first of these tokens was predicted.
        state: State before the first position.
        power: Exponent on what scouts say, in (0, 1].
        prior: The scouts' share at first, in (0, 1).
        rate: Probability per token that it starts anew, in (0, 1).

    References:
        Genest and Zidek 1986, "Combining probability distributions" (logarithmic pool); Herbster
        and Warmuth 1998, "Tracking the best expert" (fixed share, of two predictors).
    """
    prob_BTC = _by_class(jax.nn.softmax(logits_BTV), class_map_V, scout_log_prob_EBTC.shape[-1])
    heard_BTE = jnp.where(weight_BTE < _LEAST, 0.0, weight_BTE).at[..., 0].set(0.0)
    ratio_BTC = _said_ratio(prob_BTC, scout_log_prob_EBTC, heard_BTE, order_E) ** power
    total_BT1 = jnp.maximum((prob_BTC * ratio_BTC).sum(-1, keepdims=True), _LEAST_TOTAL)
    is_heard_BT1 = (heard_BTE > 0).any(-1, keepdims=True)
    ratio_BTC = jnp.where(is_heard_BT1, jnp.minimum(ratio_BTC / total_BT1, _LARGEST_RATIO), 1.0)
    before_BTC = jnp.concatenate([state.ratio_BC[:, None], ratio_BTC[:, :-1]], axis=1)
    gain_BT = jnp.take_along_axis(before_BTC, classes_BT[..., None], axis=-1)[..., 0]

    def step(share_B: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        gain_B, was_predicted_B = at
        heard_B = share_B * gain_B / (1 - share_B + share_B * gain_B)
        share_B = jnp.where(was_predicted_B, (1 - rate) * heard_B + rate * prior, prior)
        return share_B, share_B

    was_predicted_BT = jnp.ones(classes_BT.shape, bool).at[:, 0].set(started_B)
    share_B, share_TB = jax.lax.scan(step, state.share_B, (gain_BT.T, was_predicted_BT.T))
    change_BTC = jnp.log1p(share_TB.T[..., None] * (ratio_BTC - 1))
    is_identity = change_BTC.shape[-1] == logits_BTV.shape[-1]
    change_BTV = change_BTC if is_identity else change_BTC[..., class_map_V]
    return logits_BTV + change_BTV, OutputMixtureState(share_B, ratio_BTC[:, -1])


def _by_class(prob_BTV: jax.Array, class_map_V: jax.Array, n_classes: int) -> jax.Array:
    """Return the probability of every class."""
    if n_classes == prob_BTV.shape[-1]:
        return prob_BTV
    zeros_BTC = jnp.zeros((*prob_BTV.shape[:2], n_classes), prob_BTV.dtype)
    return zeros_BTC.at[..., class_map_V].add(prob_BTV)


def _said_ratio(
    prob_BTC: jax.Array, scout_log_prob_EBTC: jax.Array, heard_BTE: jax.Array, order_E: jax.Array
) -> jax.Array:
    """Return Q / P of every class, shape BTC, from the weights of the experts left in."""

    def add(sum_BTC: jax.Array, e: jax.Array) -> tuple[jax.Array, None]:
        weight_BT1 = heard_BTE[..., e][..., None]

        def listen(sum_BTC: jax.Array) -> jax.Array:
            return sum_BTC + weight_BT1 * jnp.exp(scout_log_prob_EBTC[e])

        # Most experts are left out at most tokens, and then cost nothing.
        return jax.lax.cond((weight_BT1 > 0).any(), listen, lambda sum_BTC: sum_BTC, sum_BTC), None

    sum_BTC, _ = jax.lax.scan(add, jnp.zeros_like(prob_BTC), order_E)
    own_BT1 = 1 - heard_BTE[..., order_E].sum(-1, keepdims=True)
    return own_BT1 + sum_BTC / jnp.maximum(prob_BTC, _LEAST_PROBABILITY)
