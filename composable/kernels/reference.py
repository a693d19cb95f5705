"""The obvious versions: one-hot masks and every expert on every row. Ground truth for tests.

Same signatures as `dispatch.py` and `grouped_matmul.py`, plain `jax.numpy`, differentiated by JAX
itself. Work and memory grow with the number of experts; nothing here is meant to be fast.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from composable.kernels.dispatch import Dispatch


def gather_rows(x_MD: Array, dispatch: Dispatch) -> Array:
    """Copy tokens to their rows by a one-hot matrix.

    Args:
        x_MD: Tokens.
        dispatch: Where they go.

    Returns:
        x_PD: Rows; padding rows are zero.
    """
    mask_PM = jax.nn.one_hot(dispatch.token_P, x_MD.shape[0], dtype=x_MD.dtype)
    return jnp.einsum("PM,MD->PD", mask_PM, x_MD)


def combine_rows(y_PD: Array, weights_MJ: Array, dispatch: Dispatch) -> Array:
    """Add up the weighted rows of each token's choices by a one-hot matrix.

    Args:
        y_PD: Rows.
        weights_MJ: Weight of each choice.
        dispatch: The one that the rows were gathered by.

    Returns:
        y_MD: Tokens, in the type of y_PD.
    """
    mask_MJP = jax.nn.one_hot(dispatch.position_MJ, y_PD.shape[0], dtype=jnp.float32)
    y_MD = jnp.einsum(
        "MJ,MJP,PD->MD", weights_MJ.astype(jnp.float32), mask_MJP, y_PD.astype(jnp.float32)
    )
    return y_MD.astype(y_PD.dtype)


def grouped_matmul(x_PD: Array, w_EDF: Array, dispatch: Dispatch) -> Array:
    """Multiply every row by every expert's matrix and keep, by mask, its own expert's product.

    Args:
        x_PD: Rows.
        w_EDF: One matrix per expert.
        dispatch: The expert of each row.

    Returns:
        y_PF: Products, in the type of x_PD; rows of unused blocks are zero.
    """
    y_PEF = jnp.einsum("PD,EDF->PEF", x_PD.astype(jnp.float32), w_EDF.astype(jnp.float32))
    return jnp.einsum("PE,PEF->PF", _expert_mask(dispatch), y_PEF).astype(x_PD.dtype)


def grouped_swiglu(
    x_PD: Array, w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array, dispatch: Dispatch
) -> Array:
    """Apply each row's own gated feed-forward body, by three masked products.

    Args:
        x_PD: Rows.
        w_gate_EDF: Gate matrix of each expert.
        w_up_EDF: Up matrix of each expert.
        w_down_EFD: Down matrix of each expert.
        dispatch: The expert of each row.

    Returns:
        y_PD: (silu(x @ w_gate) * (x @ w_up)) @ w_down, in the type of x_PD; rows of unused blocks
            are zero.
    """
    x32_PD = x_PD.astype(jnp.float32)
    gate_PF = grouped_matmul(x32_PD, w_gate_EDF, dispatch)
    up_PF = grouped_matmul(x32_PD, w_up_EDF, dispatch)
    y_PD = grouped_matmul(jax.nn.silu(gate_PF) * up_PF, w_down_EFD, dispatch)
    return y_PD.astype(x_PD.dtype)


def _expert_mask(dispatch: Dispatch) -> Array:
    """1 where a row's block belongs to the expert and is in use."""
    n_blocks = dispatch.expert_Y.shape[0]
    expert_P = jnp.repeat(
        dispatch.expert_Y, dispatch.block, total_repeat_length=n_blocks * dispatch.block
    )
    used_P = jnp.arange(n_blocks * dispatch.block) < dispatch.n_blocks_used * dispatch.block
    return jax.nn.one_hot(expert_P, dispatch.n_experts, dtype=jnp.float32) * used_P[:, None]
