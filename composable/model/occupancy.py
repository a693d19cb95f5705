"""How many tokens of a document belong to each expert, and the posterior while the model writes.

A token that the model drew is an act, not an observation: it shows what the model does, not what
the text is about. Conditioned on acts, do(x), the chain over experts is not updated by x. It moves
by its own law: a segment of written text lasts 1 / rate tokens, and the next is of a kind that the
text given last was of, with a Dirichlet prior whose mean is the interface's prior. So while the
model writes,

    theta = (prior + E[tokens of each expert | given tokens]) / (1 + tokens)
    w[t]  = (1 - rate) w[t-1] + rate theta

where a token that was given n given tokens ago counts (1 - 1 / horizon)^n, and no expert can gain
weight by what it writes itself. The expectation is over the smoothed chain and is computed
forward, with the statistic

    S[t](j, i) = E[tokens of i up to t | expert j at t]

The text begins as what the last tokens of its prompt point to, and becomes what most of the
horizon was: a lead of a few words is followed, and a few odd tokens are forgotten.

The filter takes likelihoods to a power below 1, since it has to stay ready for the evidence that
follows. None follows what is written, and tokens drawn from a blend of experts are text of none of
them. The model therefore writes with the evidence at its full strength:

    v[t](i)  is proportional to  prior(i) (w[t](i) / prior(i)) ^ (1 / power)

What this assumes: switches do not depend on what is written, and later segments are of the kinds
that the document had of late. Text that is given later counts as evidence again.

References:
    Ortega et al. 2021, "Shaking the foundations", arXiv:2110.10819 (acts are interventions); Cappé
    2011, "Online EM algorithm for hidden Markov models", section 2.2 (the forward recursion, with
    a discount).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from composable.model.chunks import Length, is_text

# Whether the model drew a token: a Python False where that is known when compiling.
IsDrawn = jax.Array | bool
# The prior counts as this many tokens.
_PRIOR_TOKENS = 1.0
# Given tokens over which the targets look back, and probability of a switch per written token.
HORIZON = 64
WRITING_RATE = 0.03
_TINY = 1e-30


def empty_occupancy(batch: int, n_experts: int) -> jax.Array:
    """Return the statistic before the first token, shape BEO."""
    return jnp.zeros((batch, n_experts, n_experts), jnp.float32)


def update_occupancy(
    occupancy_BEO: jax.Array,
    posterior_BTE: jax.Array,
    restart_BE: jax.Array,
    rate: jax.Array | float,
    is_given: jax.Array | bool = True,
    length: Length = None,
) -> jax.Array:
    """Return the statistic after more tokens.

    Args:
        occupancy_BEO: The statistic S so far; O counts the tokens of each expert.
        posterior_BTE: Log posterior of the chain after each token.
        restart_BE: Log weights to which the chain restarted at these tokens.
        rate: Probability of a restart per token, in [0, 1).
        is_given: Whether the tokens were given; tokens that the model drew are not counted, and
            age no others.
        length: Tokens of the text; those after it change nothing.

    Returns:
        The statistic after the last of the tokens, shape BEO.
    """
    restarted_BE = rate * jnp.exp(restart_BE)
    counted_EO = jnp.where(is_given, jnp.eye(occupancy_BEO.shape[-1]), 0.0)
    kept = jnp.where(is_given, 1 - 1 / HORIZON, 1.0)

    def step(
        occupancy_BEO: jax.Array, at: tuple[jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, None]:
        posterior_BE, is_kept = at
        weight_BE = jnp.exp(posterior_BE)
        stayed_BE = jnp.maximum(weight_BE - restarted_BE, 0.0)
        mean_BO = jnp.einsum("BE,BEO->BO", stayed_BE / (1 - rate), occupancy_BEO)
        stay_BE1 = (stayed_BE / jnp.maximum(weight_BE, _TINY))[..., None]
        moved_BEO = stay_BE1 * occupancy_BEO + (1 - stay_BE1) * mean_BO[:, None]
        moved_BEO = kept * moved_BEO + counted_EO
        return moved_BEO if is_kept is None else jnp.where(is_kept, moved_BEO, occupancy_BEO), None

    is_kept_T = None if length is None else is_text(posterior_BTE.shape[1], length)
    along_T = jnp.moveaxis(posterior_BTE, 1, 0), is_kept_T
    occupancy_BEO, _ = jax.lax.scan(step, occupancy_BEO, along_T)
    return occupancy_BEO


def switch_targets(
    occupancy_BEO: jax.Array, posterior_BE: jax.Array, log_prior_E: jax.Array
) -> jax.Array:
    """Return the log of theta, the weights that a switch in this document leads to, shape BE.

    Args:
        occupancy_BEO: The statistic S.
        posterior_BE: Log posterior of the chain.
        log_prior_E: Log prior weights.
    """
    tokens_BO = jnp.einsum("BE,BEO->BO", jnp.exp(posterior_BE), occupancy_BEO)
    weight_BE = tokens_BO + _PRIOR_TOKENS * jnp.exp(log_prior_E)
    weight_BE = weight_BE / weight_BE.sum(-1, keepdims=True)
    return jnp.where(jnp.exp(log_prior_E) > 0, jnp.log(jnp.maximum(weight_BE, _TINY)), log_prior_E)


def follow_given(
    posterior_BTE: jax.Array,
    before_BE: jax.Array,
    log_prior_E: jax.Array,
    rate: float,
    occupancy_BEO: jax.Array,
    is_drawn: IsDrawn,
    length: Length = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the log posterior that takes tokens as given or as drawn, and the new statistic.

    Args:
        posterior_BTE: Log posterior after each token, with the tokens as evidence.
        before_BE: Log posterior before the first.
        log_prior_E: Log prior weights.
        rate: Probability of a switch per given token, in [0, 1).
        occupancy_BEO: The statistic S before the first.
        is_drawn: Whether the model drew the tokens; then there is one token.
        length: Tokens of the text; those after it do not change the statistic.

    Returns:
        The posterior, shape BTE: unchanged if the tokens were given. The statistic, shape BEO.
    """
    restart_BE = jnp.broadcast_to(log_prior_E, before_BE.shape)
    if is_drawn is not False and posterior_BTE.shape[1] == 1:
        target_BE = switch_targets(occupancy_BEO, before_BE, log_prior_E)
        written_BE = write_posterior(before_BE, target_BE)
        posterior_BTE = jnp.where(is_drawn, written_BE[:, None], posterior_BTE)
        restart_BE = jnp.where(is_drawn, target_BE, restart_BE)
    moved = jnp.where(is_drawn, WRITING_RATE, rate)
    is_given = jnp.logical_not(is_drawn)
    return posterior_BTE, update_occupancy(
        occupancy_BEO, posterior_BTE, restart_BE, moved, is_given, length
    )


def writing_weights(posterior_BTE: jax.Array, log_prior_E: jax.Array, power: float) -> jax.Array:
    """Return the log weights that a model writes with, shape BTE: evidence at its full strength.

    Args:
        posterior_BTE: Log posterior of a filter that takes likelihoods to a power.
        log_prior_E: Its log prior weights.
        power: That power, in (0, 1].

    Example:
        >>> import numpy as np
        >>> log_posterior_BTE = np.log([[[0.6, 0.4]]])
        >>> v_BTE = np.exp(writing_weights(log_posterior_BTE, np.log([0.5, 0.5]), power=0.25))
        >>> [round(float(v), 2) for v in v_BTE[0, 0]]
        [0.84, 0.16]
    """
    full_BTE = log_prior_E + (posterior_BTE - log_prior_E) / power
    return jax.nn.log_softmax(full_BTE, axis=-1)


def write_posterior(posterior_BE: jax.Array, target_BE: jax.Array) -> jax.Array:
    """Return the log posterior after a token that the model drew, shape BE.

    Args:
        posterior_BE: Log posterior before it.
        target_BE: Log weights that a switch leads to.

    Example:
        >>> import numpy as np
        >>> log_weight_BE = write_posterior(np.log([[0.9, 0.1]]), np.log([[0.4, 0.6]]))
        >>> [round(float(weight), 3) for weight in np.exp(log_weight_BE[0])]
        [0.885, 0.115]
    """
    return jnp.logaddexp(
        posterior_BE + math.log1p(-WRITING_RATE), math.log(WRITING_RATE) + target_BE
    )
