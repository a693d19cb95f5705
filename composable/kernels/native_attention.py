"""Causal attention of CPUs in the native kernel, whose scores stay in a core's cache.

The portable paths are `model.causal_attention`, and `model.layers` for positions in a cache; how
rows and heads are split over devices is the matter of `parallel`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from composable.kernels.native import ATTEND, ATTEND_BACKWARD, ATTEND_CACHED


def native_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attend from every position to itself and all earlier ones.

    Args:
        q_BTNH: Queries; of the N heads, N / K in a row share a key head.
        k_BTKH: Keys.
        v_BTKH: Values.

    Returns:
        The weighted values, shape BTNH, and the logarithm of each softmax's sum, shape BNT.

    Example:
        >>> q_BTNH, k_BTKH = jnp.zeros((1, 3, 4, 16)), jnp.zeros((1, 3, 2, 16))
        >>> y_BTNH, log_BNT = jax.eval_shape(native_attention, q_BTNH, k_BTKH, k_BTKH)
        >>> y_BTNH.shape, log_BNT.shape
        ((1, 3, 4, 16), (1, 4, 3))
    """
    batch, n_tokens, n_heads, _ = q_BTNH.shape
    results = (_like(q_BTNH), jax.ShapeDtypeStruct((batch, n_heads, n_tokens), jnp.float32))
    y_BTNH, log_BNT = jax.ffi.ffi_call(ATTEND, results)(q_BTNH, k_BTKH, v_BTKH)
    return y_BTNH, log_BNT


def native_attention_gradient(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    y_BTNH: jax.Array,
    log_BNT: jax.Array,
    dy_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients with respect to queries, keys and values.

    Args:
        q_BTNH: As for `native_attention`.
        k_BTKH: As for `native_attention`.
        v_BTKH: As for `native_attention`.
        y_BTNH: Its first result.
        log_BNT: Its second result.
        dy_BTNH: The gradient with respect to the first result.

    Example:
        >>> q_BTNH, k_BTKH = jnp.zeros((1, 3, 4, 16)), jnp.zeros((1, 3, 2, 16))
        >>> arrays = (q_BTNH, k_BTKH, k_BTKH, q_BTNH, jnp.zeros((1, 4, 3)), q_BTNH)
        >>> [x.shape for x in jax.eval_shape(native_attention_gradient, *arrays)]
        [(1, 3, 4, 16), (1, 3, 2, 16), (1, 3, 2, 16)]
    """
    call = jax.ffi.ffi_call(ATTEND_BACKWARD, (_like(q_BTNH),) * 3)
    dq_BTNH, dk_BTNH, dv_BTNH = call(q_BTNH, k_BTKH, v_BTKH, y_BTNH, log_BNT, dy_BTNH)
    n_kv, width = k_BTKH.shape[2:]
    dk, dv = (x.reshape(*x.shape[:2], n_kv, -1, width).sum(3) for x in (dk_BTNH, dv_BTNH))
    return dq_BTNH, dk, dv


def native_cached_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, first: jax.Array | int
) -> jax.Array:
    """Attend from some positions to themselves and all earlier ones in a cache; no gradient.

    Args:
        q_BTNH: Queries of T positions in a row; N / K heads in a row share a key head.
        k_BKSH: Keys, those of these positions included.
        v_BKSH: Values.
        first: Position of the first query; all T are below S.

    Returns:
        The weighted values, shape BTNH.

    Example:
        >>> q_BTNH, k_BKSH = jnp.zeros((1, 3, 4, 16)), jnp.zeros((1, 2, 9, 16))
        >>> jax.eval_shape(native_cached_attention, q_BTNH, k_BKSH, k_BKSH, 5).shape
        (1, 3, 4, 16)
    """
    call = jax.ffi.ffi_call(ATTEND_CACHED, _like(q_BTNH), vmap_method="sequential")
    y_BTNH: jax.Array = call(q_BTNH, k_BKSH, v_BKSH, jnp.asarray(first, jnp.int32))
    return y_BTNH


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
