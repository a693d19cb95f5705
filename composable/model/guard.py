"""Runtime guards: an expert's contribution counts as zero unless it is finite and in bounds.

A *contribution* is, in mix mode, the output of one body in one slot at one token, and in safe mode
the prediction of one path at one token. This file decides which contributions count, redistributes
the weight of those that do not, and keeps a tally: two integers per expert, carried with the
router's state and read at the end of a text. It does not change the router: the weights that a
model reports are the router weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from composable.errors import ContributionWarning
from composable.model.router import Choice


class Tally(NamedTuple):
    """Contributions of every expert of the bank since the start of its documents, int32."""

    made_E: jax.Array
    zeroed_E: jax.Array


class Contributions(NamedTuple):
    """How many contributions of one expert counted as zero, and how many it made.

    Example:
        >>> Contributions(zeroed=2, made=40)
        Contributions(zeroed=2, made=40)
    """

    zeroed: int
    made: int


def empty_tally(n_experts: int) -> Tally:
    """Return the tally at the start of a document."""
    return Tally(jnp.zeros(n_experts, jnp.int32), jnp.zeros(n_experts, jnp.int32))


def exceeds(y_PD: jax.Array, bound: float) -> jax.Array:
    """Return which rows are not finite, or have a root mean square over the bound.

    Args:
        y_PD: Outputs of bodies.
        bound: Largest root mean square, positive.

    Returns:
        Booleans, shape P.
    """
    power_P = jnp.mean(jnp.square(y_PD.astype(jnp.float32)), axis=-1)
    return ~(power_P <= bound**2)  # true for NaN and for a square that overflows


def redistribute(weight_MJ: jax.Array, zeroed_MJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Move the weight of contributions that count as zero to the token's other choices.

    It is shared in proportion to their weights, as by a softmax over the remaining choices.

    Args:
        weight_MJ: Weight of each choice, float32.
        zeroed_MJ: Which contributions count as zero in one slot.

    Returns:
        Weights, shape MJ, unchanged bit for bit where a token lost no contribution; and which
        tokens have no choice left, shape M: their weights are zero, and they need the backbone's
        own block.
    """
    lost_M1 = jnp.any(zeroed_MJ & (weight_MJ > 0), axis=-1, keepdims=True)
    kept_MJ = jnp.where(zeroed_MJ, 0, weight_MJ)
    kept_M1 = jnp.sum(kept_MJ, axis=-1, keepdims=True)
    # A device may flush subnormal numbers to zero, and the division would be 0 / 0.
    is_kept_M1 = kept_M1 >= jnp.finfo(weight_MJ.dtype).tiny
    shared_MJ = jnp.where(is_kept_M1, kept_MJ / jnp.where(is_kept_M1, kept_M1, 1), 0)
    return jnp.where(lost_M1, shared_MJ, weight_MJ), (lost_M1 & ~is_kept_M1)[:, 0]


def tally_rows(tally: Tally, zeroed: Sequence[jax.Array], choice: Choice) -> Tally:
    """Return the tally with the contributions of one pass in mix mode added.

    Args:
        tally: The tally so far.
        zeroed: For every slot, which contributions counted as zero, shape MJ.
        choice: Experts chosen at each token; a choice of weight zero makes no contribution.
    """
    expert_MJ = choice.expert_BTJ.reshape(zeroed[0].shape)
    made_MJ = (choice.weight_BTJ.reshape(expert_MJ.shape) > 0).astype(jnp.int32)
    zeroed_MJ = jnp.sum(jnp.stack(zeroed), axis=0, dtype=jnp.int32)
    return Tally(
        tally.made_E.at[expert_MJ].add(made_MJ * len(zeroed)),
        tally.zeroed_E.at[expert_MJ].add(made_MJ * zeroed_MJ),
    )


def tally_paths(tally: Tally, awake_BTE: jax.Array, is_finite_BTE: jax.Array) -> Tally:
    """Return the tally with the contributions of one pass in safe mode added.

    Args:
        tally: The tally so far.
        awake_BTE: Which paths predicted the next token.
        is_finite_BTE: Whether each path's logits were finite.
    """
    return Tally(
        tally.made_E + awake_BTE.sum(axis=(0, 1), dtype=jnp.int32),
        tally.zeroed_E + (awake_BTE & ~is_finite_BTE).sum(axis=(0, 1), dtype=jnp.int32),
    )


def read_tally(names: Sequence[str | None], tally: Tally) -> dict[str, Contributions]:
    """Return a tally by expert name; waits for the device.

    Args:
        names: Name of each bank entry, None if it is empty.
        tally: The tally.
    """
    pairs = np.stack([np.asarray(tally.zeroed_E), np.asarray(tally.made_E)], axis=1).tolist()
    return {
        name: Contributions(*pair)
        for name, pair in zip(names, pairs, strict=True)
        if name is not None
    }


def make_reporter(names: Sequence[str | None]) -> Callable[[Tally], None]:
    """Return a function that warns of experts with zeroed contributions, once for each expert.

    Args:
        names: Name of each bank entry, None if it is empty.
    """
    reported: set[str] = set()

    def report(tally: Tally) -> None:
        for name, (zeroed, made) in read_tally(names, tally).items():
            if zeroed and name not in reported:
                reported.add(name)
                warnings.warn(ContributionWarning(name, zeroed, made), stacklevel=2)

    return report
