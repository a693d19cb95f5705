"""Causal grouped-query attention over whole sequences, and its gradient.

The gradient computes the scores again from queries and keys, which costs less than to keep them:
of a forward pass it needs the result and, of every query, the logarithm of its softmax's sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from composable.kernels import (
    native_attention,
    native_attention_gradient,
    splash_attention,
    takes_native,
    takes_splash,
)
from composable.parallel import platform_in_use, split_heads

# Queries are processed in blocks, each against the keys up to its own end: about half of the causal
# square is never computed. 128 was the fastest block on two CPU cores at 512 positions.
_QUERY_BLOCK: Final = 128
# Beyond this many positions, blocks have as many, since each is compiled.
_LONG_BLOCK: Final = 512
# Name of what the gradient needs of the forward pass, for policies that keep it
# (`jax.checkpoint_policies`).
ATTENTION: Final = "attention"


def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Return what `causal_attention` does, by the kernel for the devices of the mesh in use.

    Without a mesh it is not known which device a program is for.

    Args:
        q_BTNH: Queries.
        k_BTKH: Keys.
        v_BTKH: Values.

    Example:
        >>> x_BTNH = jnp.arange(4.0).reshape(1, 4, 1, 1)
        >>> attend(jnp.zeros((1, 4, 1, 1)), x_BTNH, x_BTNH).ravel().tolist()
        [0.0, 0.5, 1.0, 1.5]
    """
    if takes_splash(platform_in_use(), q_BTNH):
        return split_heads(partial(splash_attention, kept=ATTENTION), q_BTNH, k_BTKH, v_BTKH)
    if takes_native(platform_in_use(), q_BTNH.dtype, q_BTNH.shape[-1]):
        return split_heads(_differentiated_natively, q_BTNH, k_BTKH, v_BTKH)
    return causal_attention(q_BTNH, k_BTKH, v_BTKH)


@jax.custom_vjp
def causal_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Attend from every position to itself and all earlier ones.

    Args:
        q_BTNH: Queries; of the N heads, N / K in a row share a key head.
        k_BTKH: Keys.
        v_BTKH: Values.

    Returns:
        The weighted values, shape BTNH.

    References:
        Dao et al. 2022, arXiv:2205.14135, appendix B.4 (the gradient).

    Example:
        >>> x_BTNH = jnp.arange(4.0).reshape(1, 4, 1, 1)
        >>> causal_attention(jnp.zeros((1, 4, 1, 1)), x_BTNH, x_BTNH).ravel().tolist()
        [0.0, 0.5, 1.0, 1.5]
    """
    blocks = []
    for start, end in _query_blocks(q_BTNH.shape[1]):
        mask_TS = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        q, k, v = q_BTNH[:, start:end], k_BTKH[:, :end], v_BTKH[:, :end]
        blocks.append(jax.nn.dot_product_attention(q, k, v, mask=mask_TS[None, None]))
    return jnp.concatenate(blocks, axis=1)


def _query_blocks(n_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield the first position of every block of queries, and the one after its last."""
    block = _QUERY_BLOCK if n_tokens <= _LONG_BLOCK else _LONG_BLOCK
    for start in range(0, n_tokens, block):
        yield start, min(start + block, n_tokens)


def _forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the result, and what the gradient needs."""
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    ys, logs = [], []
    for start, end in _query_blocks(q_BTNH.shape[1]):
        q_BKGTH = _by_key_head(q_BTNH[:, start:end], k_BTKH.shape[2])
        k, v = k_BKSH[:, :, :end], v_BKSH[:, :, :end]
        score_BKGTS = _multiply("BKGTH,BKSH->BKGTS", q_BKGTH, k) * _scale(q_BTNH)
        is_before_TS = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        score_BKGTS = jnp.where(is_before_TS, score_BKGTS, -jnp.inf)
        largest_BKGT1 = score_BKGTS.max(-1, keepdims=True)
        e_BKGTS = jnp.exp(score_BKGTS - largest_BKGT1)
        total_BKGT1 = e_BKGTS.sum(-1, keepdims=True)
        y_BKGTH = _multiply("BKGTS,BKSH->BKGTH", e_BKGTS.astype(v.dtype), v) / total_BKGT1
        ys.append(_by_position(y_BKGTH).astype(q_BTNH.dtype))
        logs.append((largest_BKGT1 + jnp.log(total_BKGT1))[..., 0])
    y_BTNH = checkpoint_name(jnp.concatenate(ys, axis=1), ATTENTION)
    log_BKGT = checkpoint_name(jnp.concatenate(logs, axis=3), ATTENTION)
    return y_BTNH, (q_BTNH, k_BTKH, v_BTKH, y_BTNH, log_BKGT)


def _backward(
    kept: tuple[jax.Array, ...], dy_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients with respect to queries, keys and values.

    With probabilities `p = exp(score - log)`, the gradient of a score is `p (dp - sum(p dp))`,
    where `dp = dy v`; the sum over the keys is that of `dy y` over the width of a head.

    Scores have the keys before the queries here: only so are most products ones of two matrices
    without a transposed copy of either, which XLA's CPU backend makes slowly.
    """
    q_BTNH, k_BTKH, v_BTKH, y_BTNH, log_BKGT = kept
    n_kv, scale = k_BTKH.shape[2], _scale(q_BTNH)
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    k_BKHS = k_BTKH.transpose(0, 2, 3, 1)
    mean_BTN1 = (dy_BTNH.astype(jnp.float32) * y_BTNH.astype(jnp.float32)).sum(-1, keepdims=True)
    mean_BKGT = _by_key_head(mean_BTN1, n_kv)[..., 0]
    dqs = []
    dk_BKSH, dv_BKSH = (jnp.zeros_like(x_BKSH, jnp.float32) for x_BKSH in (k_BKSH, v_BKSH))
    for start, end in _query_blocks(q_BTNH.shape[1]):
        q_BKGTH, dy_BKGTH = (_by_key_head(x[:, start:end], n_kv) for x in (q_BTNH, dy_BTNH))
        k, v = k_BKSH[:, :, :end], v_BKSH[:, :, :end]
        log, mean = (x[:, :, None, :, start:end] for x in (log_BKGT, mean_BKGT))
        score_BKSGT = _multiply("BKSH,BKGTH->BKSGT", k, q_BKGTH) * scale
        is_before_S1T = jnp.arange(end)[:, None, None] <= jnp.arange(start, end)
        p_BKSGT = jnp.exp(jnp.where(is_before_S1T, score_BKSGT - log, -jnp.inf))
        dp_BKSGT = _multiply("BKSH,BKGTH->BKSGT", v, dy_BKGTH)
        dscore_BKSGT = (p_BKSGT * (dp_BKSGT - mean)).astype(q_BTNH.dtype)
        dv = _multiply("BKSGT,BKGTH->BKSH", p_BKSGT.astype(q_BTNH.dtype), dy_BKGTH)
        dk = _multiply("BKSGT,BKGTH->BKSH", dscore_BKSGT, q_BKGTH)
        dk_BKSH, dv_BKSH = dk_BKSH.at[:, :, :end].add(dk), dv_BKSH.at[:, :, :end].add(dv)
        dq_BKHGT = _multiply("BKHS,BKSGT->BKHGT", k_BKHS[..., :end], dscore_BKSGT)
        dqs.append(_by_position(dq_BKHGT.transpose(0, 1, 3, 4, 2)))
    gradients = (
        jnp.concatenate(dqs, axis=1) * scale,
        dk_BKSH.swapaxes(1, 2) * scale,
        dv_BKSH.swapaxes(1, 2),
    )
    dq, dk, dv = (x.astype(q_BTNH.dtype) for x in gradients)
    return dq, dk, dv


causal_attention.defvjp(_forward, _backward)


@jax.custom_vjp
def _differentiated_natively(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Return `causal_attention`, to the bit; by the native kernel where a gradient follows."""
    return causal_attention(q_BTNH, k_BTKH, v_BTKH)


def _forward_natively(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y_BTNH, log_BNT = (
        checkpoint_name(x, ATTENTION) for x in native_attention(q_BTNH, k_BTKH, v_BTKH)
    )
    return y_BTNH, (q_BTNH, k_BTKH, v_BTKH, y_BTNH, log_BNT)


def _backward_natively(
    kept: tuple[jax.Array, ...], dy_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BTNH, k_BTKH, v_BTKH, y_BTNH, log_BNT = kept
    return native_attention_gradient(q_BTNH, k_BTKH, v_BTKH, y_BTNH, log_BNT, dy_BTNH)


_differentiated_natively.defvjp(_forward_natively, _backward_natively)


def _scale(q_BTNH: jax.Array) -> float:
    return float(q_BTNH.shape[-1] ** -0.5)


def _by_key_head(x_BTNH: jax.Array, n_kv: int) -> jax.Array:
    """Return queries by key head K and place G among those that share it, shape BKGTH."""
    batch, n_tokens, n_heads, width = x_BTNH.shape
    return x_BTNH.reshape(batch, n_tokens, n_kv, n_heads // n_kv, width).transpose(0, 2, 3, 1, 4)


def _by_position(x_BKGTH: jax.Array) -> jax.Array:
    """Return what `_by_key_head` was given."""
    batch, n_kv, n_group, n_tokens, width = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, n_tokens, n_kv * n_group, width)


def _multiply(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    x: jax.Array = jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)
    return x
