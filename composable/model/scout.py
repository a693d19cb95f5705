"""Scouts: small predictors on the trunk's features, whose likelihoods route tokens to experts.

A scout reads the normalised trunk features at position t-1 and predicts the class of token t. The
library applies the softmax, so the probabilities of every scout sum to one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from composable.model.initial import draw


class Scout(nnx.Module):
    """A perceptron with one hidden layer: features D to hidden W to classes C.

    Args:
        d_model: Width D of the trunk's features.
        width: Hidden width W.
        n_classes: Classes C.
        rngs: Source of the initial weights; None where only shapes are needed.
    """

    def __init__(self, d_model: int, width: int, n_classes: int, *, rngs: nnx.Rngs | None) -> None:
        self.w_in = nnx.Param(draw(rngs, (d_model, width), d_model**-0.5), dims="DW")
        self.b_in = nnx.Param(jnp.zeros(width), dims="W")
        # Near-uniform at first: no tokens are routed to an untrained scout's expert.
        self.w_out = nnx.Param(draw(rngs, (width, n_classes), 0.1) * width**-0.5, dims="WC")
        self.b_out = nnx.Param(jnp.zeros(n_classes), dims="C")

    def __call__(self, feature_BTD: jax.Array) -> jax.Array:
        """Return log-probabilities over the next token's class, shape BTC, float32."""
        return class_log_probs(
            feature_BTD, self.w_in[...], self.b_in[...], self.w_out[...], self.b_out[...]
        )

    @property
    def width(self) -> int:
        """The hidden width W."""
        return int(self.b_in[...].shape[0])

    def hidden(self, feature_BTD: jax.Array) -> jax.Array:
        """Return the hidden units, shape BTW, float32."""
        return _hidden(feature_BTD, self.w_in[...], self.b_in[...])


def class_log_probs(
    feature_BTD: jax.Array,
    w_in_DW: jax.Array,
    b_in_W: jax.Array,
    w_out_WC: jax.Array,
    b_out_C: jax.Array,
) -> jax.Array:
    """Return a scout's normalised log-probabilities, shape BTC, always in float32."""
    hidden_BTW = _hidden(feature_BTD, w_in_DW, b_in_W)
    return jax.nn.log_softmax(hidden_BTW @ w_out_WC.astype(jnp.float32) + b_out_C, axis=-1)


def _hidden(feature_BTD: jax.Array, w_in_DW: jax.Array, b_in_W: jax.Array) -> jax.Array:
    return jax.nn.gelu(feature_BTD.astype(jnp.float32) @ w_in_DW.astype(jnp.float32) + b_in_W)
