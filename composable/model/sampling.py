"""Drawing the next token from its scores: temperature, the usual limits, the repetition penalty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from composable.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for drawing the next token; those of transformers, with the same meaning.

    They apply in the order of transformers: repetition penalty, temperature, top k, top p, min p.
    At temperature 0 only the repetition penalty has an effect. Scores are logits in mix mode, and
    log-probabilities, which are never positive, in safe mode.

    Args:
        temperature: Softmax temperature, at least 0 and finite; 0 selects the likeliest token.
        top_k: Draw only from this many likeliest tokens, and from those that tie with the last of
            them; at least 0, where 0 is no limit.
        top_p: Draw only from the likeliest tokens whose probabilities add up to this, in (0, 1].
        min_p: Draw only from tokens that are at least this many times as probable as the likeliest,
            in [0, 1]; 0 is no limit.
        repetition_penalty: Positive scores of tokens of the prompt or the continuation so far are
            divided by this, and negative ones multiplied; positive and finite. Values over 1 make
            repetitions less likely, 1 changes nothing.
        seed: Seed of the draws.

    Raises:
        ModelError: For a value out of its range; `where` names the setting.

    Example:
        >>> Sampling(temperature=0.8, top_k=50, min_p=0.05, repetition_penalty=1.1).top_p
        1.0
        >>> Sampling(top_p=1.5)
        Traceback (most recent call last):
        composable.errors.ModelError: top_p: 1.5 is not in (0, 1]

    References:
        Fan et al. 2018, arXiv:1805.04833 (top k); Holtzman et al. 2020, arXiv:1904.09751 (top p);
        Nguyen et al. 2024, arXiv:2407.01082 (min p); Keskar et al. 2019, arXiv:1909.05858, section
        4.1 (repetition penalty; the paper divides negative scores too, which favours repetitions).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise ModelError(f"{self.temperature} is negative or not finite", where="temperature")
        if not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise ModelError(f"{self.top_k} is not a whole number of at least 0", where="top_k")
        if not 0 < self.top_p <= 1:
            raise ModelError(f"{self.top_p} is not in (0, 1]", where="top_p")
        if not 0 <= self.min_p <= 1:
            raise ModelError(f"{self.min_p} is not in [0, 1]", where="min_p")
        if not 0 < self.repetition_penalty < np.inf:
            raise ModelError(
                f"{self.repetition_penalty} is not positive and finite", where="repetition_penalty"
            )


class Draw(NamedTuple):
    """Inputs of a draw, on the device."""

    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    is_banned_V: jax.Array


def make_draw(sampling: Sampling, is_banned_V: np.ndarray) -> Draw:
    """Return the settings as arrays: a new value compiles no new program."""
    numbers = (
        np.float32(sampling.temperature),
        np.int32(min(sampling.top_k, len(is_banned_V))),
        np.float32(sampling.top_p),
        np.float32(sampling.min_p),
        np.float32(sampling.repetition_penalty),
        is_banned_V,
    )
    # Put there as they are, which needs no program; `jnp.float32` would.
    return Draw(jax.random.key(sampling.seed), *jax.device_put(numbers, may_alias=False))


def draw_token(draw: Draw, seen_V: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Draw a token; the conditions skip what the settings do not need."""
    logits_V = jnp.where(draw.is_banned_V, -jnp.inf, logits_V)
    penalty = draw.repetition_penalty
    logits_V = _apply_if(penalty != 1, partial(penalize_seen, penalty, seen_V), logits_V)

    def sample(logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(draw.key, restrict_logits(draw, logits_V)).astype(jnp.int32)

    def take_likeliest(logits_V: jax.Array) -> jax.Array:
        # The first of the largest by two reductions: XLA runs `argmax` on CPUs one number after the
        # other.
        index_V = jnp.arange(logits_V.size, dtype=jnp.int32)
        is_less_V = logits_V < logits_V.max()
        return jnp.where(is_less_V, logits_V.size - 1, index_V).min()

    index: jax.Array = jax.lax.cond(draw.temperature > 0, sample, take_likeliest, logits_V)
    return index


def restrict_logits(draw: Draw, logits_V: jax.Array) -> jax.Array:
    """Apply temperature, top k, top p and min p, in this order; excluded tokens become -inf."""
    logits_V = logits_V / jnp.maximum(draw.temperature, 1e-6)
    logits_V = _apply_if(draw.top_k > 0, partial(_keep_top_k, draw.top_k), logits_V)
    logits_V = _apply_if(draw.top_p < 1, partial(_keep_top_p, draw.top_p), logits_V)
    return _apply_if(draw.min_p > 0, partial(_keep_probable, draw.min_p), logits_V)


def _apply_if(
    condition: jax.Array, change: Callable[[jax.Array], jax.Array], logits_V: jax.Array
) -> jax.Array:
    """Return changed logits if a condition holds; otherwise the change is not computed."""
    changed_V: jax.Array = jax.lax.cond(condition, change, lambda x_V: x_V, logits_V)
    return changed_V


def penalize_seen(penalty: jax.Array, seen_V: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Make tokens that were seen less likely: divide positive logits, multiply negative ones."""
    penalized_V = jnp.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
    return jnp.where(seen_V, penalized_V, logits_V)


def _keep_top_k(top_k: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Keep the `top_k` likeliest tokens, and those that tie with the last of them."""
    return jnp.where(logits_V >= kth_largest(top_k, logits_V), logits_V, -jnp.inf)


def kth_largest(k: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Return the k-th largest logit, for k from 1 to the size of the vocabulary.

    Bisects its 32 bits, since `jax.lax.top_k` needs a static k, and a sort takes many times longer
    on a CPU.
    """
    sign = jnp.uint32(1 << 31)
    bits_V = jax.lax.bitcast_convert_type(logits_V, jnp.uint32)
    # Floats have the order of these integers: negative ones have all bits flipped, others the sign.
    rank_V = jnp.where(bits_V < sign, bits_V | sign, ~bits_V)

    def set_bit(i: jax.Array, rank: jax.Array) -> jax.Array:
        raised = rank | (sign >> i.astype(jnp.uint32))
        return jnp.where((rank_V >= raised).sum() >= k, raised, rank)

    rank = jax.lax.fori_loop(0, 32, set_bit, jnp.uint32(0))
    return jax.lax.bitcast_convert_type(jnp.where(rank < sign, ~rank, rank ^ sign), jnp.float32)


def _keep_top_p(top_p: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Keep the fewest likeliest tokens whose probabilities add up to `top_p`.

    Of tokens that tie at the edge, the ones with the smallest ids are kept; transformers leaves
    that to its sort, which is not stable.
    """
    order_V = jnp.argsort(-logits_V)
    probability_V = jax.nn.softmax(logits_V[order_V])
    # A token is kept if the sum before it is below `top_p`, so the likeliest always is.
    is_kept_V = jnp.cumsum(probability_V) - probability_V < top_p
    return logits_V.at[order_V].set(jnp.where(is_kept_V, logits_V[order_V], -jnp.inf))


def _keep_probable(min_p: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Keep tokens at least `min_p` times as probable as the likeliest."""
    # The normaliser cancels in the ratio p / p_max, which is exactly 1 for the likeliest.
    return jnp.where(jnp.exp(logits_V - logits_V.max()) >= min_p, logits_V, -jnp.inf)
