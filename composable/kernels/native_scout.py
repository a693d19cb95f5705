"""The loss of a scout of CPUs in a native kernel, with its gradient.

Hidden units, logits and softmax of a few tokens stay in a core's cache over all products that they
are in. The portable path is `training.class_loss`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from composable.kernels.native import SCOUT_LOSS

_Gradient = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def native_scout_loss(
    feature_MD: jax.Array,
    w_in_DW: jax.Array,
    b_in_W: jax.Array,
    w_out_WC: jax.Array,
    b_out_C: jax.Array,
    classes_M: jax.Array,
) -> jax.Array:
    """Return the mean cross entropy of the logits `gelu(x w_in + b_in) w_out + b_out`, in nats.

    Differentiable once, in reverse mode, in the weights; the features have no gradient. Without
    one, this takes as long as with it.

    Args:
        feature_MD: Features of tokens; float16 is made float32.
        w_in_DW: Weights of the hidden units; W is a multiple of 16.
        b_in_W: Their biases.
        w_out_WC: Weights of the classes.
        b_out_C: Their biases.
        classes_M: Class of each token, from 0 to C - 1.

    Example:
        >>> x_MD, w_in_DW, w_out_WC = jnp.ones((5, 4)), jnp.ones((4, 16)), jnp.ones((16, 7))
        >>> arrays = (x_MD, w_in_DW, jnp.ones(16), w_out_WC, jnp.ones(7), jnp.zeros(5, int))
        >>> gradient = jax.grad(native_scout_loss, argnums=(1, 2, 3, 4))
        >>> [x.shape for x in jax.eval_shape(gradient, *arrays)]
        [(4, 16), (16,), (16, 7), (7,)]
    """
    return _forward(feature_MD, w_in_DW, b_in_W, w_out_WC, b_out_C, classes_M)[0]


def _forward(*arrays: Any) -> tuple[jax.Array, _Gradient]:
    """Return the loss of the arguments of `native_scout_loss`, and its gradient in the weights."""
    feature_MD, *weights, classes_M = arrays
    weights = [x.astype(jnp.float32) for x in weights]
    like = [classes_M.shape, *(x.shape for x in weights)]
    call = jax.ffi.ffi_call(SCOUT_LOSS, [jax.ShapeDtypeStruct(x, jnp.float32) for x in like])
    nats_M, *sums = call(feature_MD.astype(jnp.float32), *weights, classes_M.astype(jnp.int32))
    dw_in_DW, db_in_W, dw_out_WC, db_out_C = (x / nats_M.size for x in sums)
    return nats_M.mean(), (dw_in_DW, db_in_W, dw_out_WC, db_out_C)


def _backward(gradient: _Gradient, given: Any) -> tuple[jax.Array | None, ...]:
    return None, *(given * x for x in gradient), None


native_scout_loss.defvjp(_forward, _backward)
