"""SwiGLU of CPUs for training: native kernels do all that lies between its products.

XLA's CPU backend writes every elementwise result between two products to memory and reads it again,
on one core for some of them: a third of the time of a block and its gradient. The products are
XLA's here as well. Nothing is made twice for the gradient but the hidden units, in a core's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from composable.kernels.native import GATE, GATE_BACKWARD
from composable.kernels.quantized import Matrix, widen

_NAMES: Final = ("w_gate", "w_up", "w_down")
_Arrays = tuple[jax.Array, ...]


def native_swiglu(
    x_BTD: jax.Array,
    matrices: Mapping[str, Matrix],
    changes: Mapping[str, tuple[jax.Array, jax.Array]] | None = None,
    *,
    kept: str,
) -> jax.Array:
    """Return `(silu(x g) * (x u)) d`, with low-rank changes where there are any.

    Differentiable once, in reverse mode, in `x` and either the changes or, without any, the
    matrices.

    Args:
        x_BTD: Tokens; other shapes work as well.
        matrices: "w_gate", "w_up" and "w_down"; none is quantized.
        changes: Factors `a` and `b` of a change to each of them, `x w + (x a) b` for `x w`.
        kept: Name of what the gradient needs of the forward pass, for policies that keep it
            (`jax.checkpoint_policies`).

    Example:
        >>> ones = dict.fromkeys(("w_gate", "w_up", "w_down"), jnp.ones((1, 1)))
        >>> round(float(native_swiglu(jnp.ones((1, 1)), ones, kept="gated")[0, 0]), 2)
        0.73
    """
    weights = tuple(widen(matrices[name]) for name in _NAMES)
    if changes is None:
        return _swiglu(kept, x_BTD, *weights)
    return _changed_swiglu(kept, x_BTD, weights, *(x for name in _NAMES for x in changes[name]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(
    kept: str, x_BTD: jax.Array, w_gate_DF: jax.Array, w_up_DF: jax.Array, w_down_FD: jax.Array
) -> jax.Array:
    del kept
    return (jax.nn.silu(x_BTD @ w_gate_DF) * (x_BTD @ w_up_DF)) @ w_down_FD


def _forward(
    kept: str, x_BTD: jax.Array, w_gate_DF: jax.Array, w_up_DF: jax.Array, w_down_FD: jax.Array
) -> tuple[jax.Array, _Arrays]:
    x_MD = _as_matrix(x_BTD)
    no_change, no_factor = x_MD[:, :0], w_gate_DF[:0]
    gate_MF, up_MF, hidden_MF = _gate(
        kept, x_MD @ w_gate_DF, x_MD @ w_up_DF, no_change, no_change, no_factor, no_factor
    )
    y_BTD = (hidden_MF @ w_down_FD).reshape(x_BTD.shape)
    return y_BTD, (x_MD, gate_MF, up_MF, w_gate_DF, w_up_DF, w_down_FD)


def _backward(kept: str, residuals: _Arrays, dy_BTD: jax.Array) -> _Arrays:
    del kept
    x_MD, gate_MF, up_MF, w_gate_DF, w_up_DF, w_down_FD = residuals
    dy_MD, no_change, no_factor = _as_matrix(dy_BTD), x_MD[:, :0], w_down_FD[:, :0]
    found = _gate_backward(
        gate_MF, up_MF, dy_MD @ w_down_FD.T, no_change, no_change, no_change, no_factor
    )
    dx_MD = found.dgate_MF @ w_gate_DF.T + found.dup_MF @ w_up_DF.T
    dx_BTD, dw_down_FD = dx_MD.reshape(dy_BTD.shape), found.hidden_MF.T @ dy_MD
    return dx_BTD, x_MD.T @ found.dgate_MF, x_MD.T @ found.dup_MF, dw_down_FD


_swiglu.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _changed_swiglu(
    kept: str,
    x_BTD: jax.Array,
    weights: _Arrays,
    a_gate_DR: jax.Array,
    b_gate_RF: jax.Array,
    a_up_DR: jax.Array,
    b_up_RF: jax.Array,
    a_down_FR: jax.Array,
    b_down_RD: jax.Array,
) -> jax.Array:
    """Return the result; there is no gradient with respect to the weights."""
    del kept
    w_gate_DF, w_up_DF, w_down_FD = weights
    gate_BTF = x_BTD @ w_gate_DF + (x_BTD @ a_gate_DR) @ b_gate_RF
    up_BTF = x_BTD @ w_up_DF + (x_BTD @ a_up_DR) @ b_up_RF
    hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
    return hidden_BTF @ w_down_FD + (hidden_BTF @ a_down_FR) @ b_down_RD


def _changed_forward(
    kept: str,
    x_BTD: jax.Array,
    weights: _Arrays,
    a_gate_DR: jax.Array,
    b_gate_RF: jax.Array,
    a_up_DR: jax.Array,
    b_up_RF: jax.Array,
    a_down_FR: jax.Array,
    b_down_RD: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, _Arrays, _Arrays, _Arrays]]:
    w_gate_DF, w_up_DF, w_down_FD = weights
    x_MD = _as_matrix(x_BTD)
    # Of both changes of `x` side by side, as if they were one of twice the rank.
    a_DR = jnp.concatenate([a_gate_DR, a_up_DR], axis=1)
    change_gate_MR, change_up_MR = jnp.split(x_MD @ a_DR, 2, axis=1)
    gate_MF, up_MF, hidden_MF = _gate(
        kept,
        x_MD @ w_gate_DF,
        x_MD @ w_up_DF,
        change_gate_MR,
        change_up_MR,
        b_gate_RF,
        b_up_RF,
    )
    change_down_MR = hidden_MF @ a_down_FR
    y_MD = hidden_MF @ w_down_FD + change_down_MR @ b_down_RD
    factors = (a_DR, b_gate_RF, b_up_RF, a_down_FR, b_down_RD)
    between = (gate_MF, up_MF, change_gate_MR, change_up_MR, change_down_MR)
    return y_MD.reshape(x_BTD.shape), (x_MD, weights, factors, between)


def _changed_backward(
    kept: str, residuals: tuple[jax.Array, _Arrays, _Arrays, _Arrays], dy_BTD: jax.Array
) -> tuple[jax.Array | None, ...]:
    """Return the gradients, that of `x` after those of the factors.

    XLA's CPU backend would postpone the gradients of the factors of all layers to the end, and
    keep what they are made of. It drops barriers before it orders operations, so what makes it wait
    is a number that is computed from them, and is zero.
    """
    del kept
    x_MD, (w_gate_DF, w_up_DF, w_down_FD), factors, between = residuals
    a_DR, b_gate_RF, b_up_RF, a_down_FR, b_down_RD = factors
    gate_MF, up_MF, change_gate_MR, change_up_MR, change_down_MR = between
    dy_MD = _as_matrix(dy_BTD)
    db_down_RD = change_down_MR.T @ dy_MD
    found = _gate_backward(
        gate_MF,
        up_MF,
        dy_MD @ w_down_FD.T,
        change_gate_MR,
        change_up_MR,
        dy_MD @ b_down_RD.T,
        a_down_FR,
    )
    dgate_MF, dup_MF = found.dgate_MF, found.dup_MF
    dchange_MR = jnp.concatenate([dgate_MF @ b_gate_RF.T, dup_MF @ b_up_RF.T], axis=1)
    da_DR = x_MD.T @ dchange_MR
    zero = jnp.minimum(jnp.abs(da_DR[0, 0]) + jnp.abs(db_down_RD[0, 0]), 0)
    dx_MD = dgate_MF @ w_gate_DF.T + dup_MF @ w_up_DF.T + dchange_MR @ a_DR.T + zero
    da_gate_DR, da_up_DR = jnp.split(da_DR, 2, axis=1)
    gradients = (da_gate_DR, found.db_gate_RF, da_up_DR, found.db_up_RF, found.da_down_FR)
    return dx_MD.reshape(dy_BTD.shape), None, *gradients, db_down_RD


_changed_swiglu.defvjp(_changed_forward, _changed_backward)


def _as_matrix(x_BTD: jax.Array) -> jax.Array:
    return x_BTD.reshape(-1, x_BTD.shape[-1])


def _gate(
    kept: str,
    product_gate_MF: jax.Array,
    product_up_MF: jax.Array,
    change_gate_MR: jax.Array,
    change_up_MR: jax.Array,
    b_gate_RF: jax.Array,
    b_up_RF: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return gate, up and hidden units, of products with matrices and changes of rank R, or 0."""
    like_MF = jax.ShapeDtypeStruct(product_gate_MF.shape, jnp.float32)
    call = jax.ffi.ffi_call(GATE, (like_MF,) * 3, input_output_aliases={0: 0, 1: 1})
    gate_MF, up_MF, hidden_MF = call(
        product_gate_MF, product_up_MF, change_gate_MR, change_up_MR, b_gate_RF, b_up_RF
    )
    return checkpoint_name(gate_MF, kept), checkpoint_name(up_MF, kept), hidden_MF


class _Gradients(NamedTuple):
    """What `_gate_backward` returns; the hidden units are empty where there are changes."""

    dgate_MF: jax.Array
    dup_MF: jax.Array
    hidden_MF: jax.Array
    db_gate_RF: jax.Array
    db_up_RF: jax.Array
    da_down_FR: jax.Array


def _gate_backward(
    gate_MF: jax.Array,
    up_MF: jax.Array,
    dhidden_MF: jax.Array,
    change_gate_MR: jax.Array,
    change_up_MR: jax.Array,
    dchange_down_MR: jax.Array,
    a_down_FR: jax.Array,
) -> _Gradients:
    """Return the gradients of gate and up, and those of the factors that are as wide.

    The gradient of the hidden units still lacks what comes through the change of "w_down". Without
    changes, of rank 0, the hidden units are needed for the gradient of that matrix.
    """
    (n_tokens, width), rank = gate_MF.shape, a_down_FR.shape[1]
    shapes = [(n_tokens, width)] * 2 + [(0 if rank else n_tokens, width)]
    shapes += [(rank, width)] * 2 + [(width, rank)]
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    call = jax.ffi.ffi_call(GATE_BACKWARD, results, input_output_aliases={2: 0})
    arrays = (gate_MF, up_MF, dhidden_MF, change_gate_MR, change_up_MR, dchange_down_MR, a_down_FR)
    return _Gradients(*call(*arrays))
