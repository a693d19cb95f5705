"""Pooled trunk features, as closed-form gates and c-BTM read them."""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp

# Pooled features forget so much per token, as the router does.
POOLING: Final = 0.98


def pool(feature_BTD: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """Return discounted means of the features so far, and the state to go on from."""
    batch, n_tokens, width = feature_BTD.shape
    sum_BD, n = (jnp.zeros((batch, width)), jnp.float32(0)) if state is None else state

    def step(sum_BD: jax.Array, x_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        sum_BD = POOLING * sum_BD + (1 - POOLING) * x_BD
        return sum_BD, sum_BD

    last_BD, sums_TBD = jax.lax.scan(step, sum_BD, jnp.moveaxis(feature_BTD, 1, 0))
    weight_T = 1 - POOLING ** (n + jnp.arange(1, n_tokens + 1))
    return jnp.moveaxis(sums_TBD, 0, 1) / weight_T[None, :, None], (last_BD, n + n_tokens)


def features_at(backbone: Any, tokens_BT: Any, tap: int) -> Any:
    """Return features as scouts read them, but after any number of the backbone's own layers."""
    x_BTD = backbone.embed[...][tokens_BT]
    x_BTD, _ = backbone._run(range(tap), x_BTD, backbone.own_feed_forward, 0, None)
    return backbone.features(x_BTD)
