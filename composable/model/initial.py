"""Initial numbers of parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def draw(rngs: nnx.Rngs | None, shape: tuple[int, ...], scale: float) -> jax.Array:
    """Return numbers of a normal distribution, in float32.

    Args:
        rngs: Where they come from. Without it they are zeros, for a module of which only shapes are
            needed: drawing takes jax several times longer to trace than all the rest of a model.
        shape: Their shape.
        scale: Their standard deviation.

    Example:
        >>> draw(None, (2,), 1.0).tolist()
        [0.0, 0.0]
    """
    if rngs is None:
        return jnp.zeros(shape)
    return jax.random.normal(rngs.params(), shape) * scale
