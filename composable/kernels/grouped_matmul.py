"""Grouped matmul: each row times the matrix of its own expert, and the gradients of that.

The gradient has three legs, each a function of its own so that each can be given another kernel
where one is better: `multiply_rows` (forward), `multiply_rows_transposed` (input gradient) and
`sum_outer_products` (weight gradient). All of them run on `blocks.run_blocks`. Where one matrix is
too large for a chip's memory it is cut along the axis that the leg does not sum over.

The compiler drops a leg whose result is not used: frozen experts (weights that are not
differentiated) pay for no weight gradient under jit.
"""

from __future__ import annotations

import chex
import jax
from jax import Array

from composable.kernels.block_functions import Arrays, BlockOutputs, Tiling, product
from composable.kernels.blocks import Accelerator, run_blocks
from composable.kernels.dispatch import Dispatch
from composable.kernels.quantized import Matrix, Quantized, group_leaves, multiply, widen


def grouped_matmul(x_PD: Array, w_EDF: Matrix, dispatch: Dispatch) -> Array:
    """Multiply each row by the matrix of its own expert.

    Differentiable once, in x_PD and w_EDF, in reverse mode, unless w_EDF is quantized. Sums run in
    float32 whatever the types.

    Args:
        x_PD: Rows, from `gather_rows`.
        w_EDF: One matrix per expert.
        dispatch: The expert of each block of rows.

    Returns:
        y_PF: Products, in the type of x_PD; rows of blocks not in use are zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from composable.kernels import gather_rows, make_dispatch
        >>> dispatch = make_dispatch(jnp.array([[1], [0]]), n_experts=2, block=1)
        >>> x_PD = gather_rows(jnp.array([[1.0], [2.0]]), dispatch)
        >>> grouped_matmul(x_PD, jnp.array([[[10.0]], [[100.0]]]), dispatch)[:2, 0].tolist()
        [20.0, 100.0]
    """
    chex.assert_rank([x_PD, w_EDF], [2, 3])
    chex.assert_shape(w_EDF, (dispatch.n_experts, x_PD.shape[1], None))
    chex.assert_axis_dimension(x_PD, 0, dispatch.choice_P.shape[0])
    if isinstance(w_EDF, Quantized):
        run, leaves = _multiply_quantized, tuple(jax.tree.leaves(w_EDF))
        (y_PF,), _ = run_blocks(run, (x_PD,), leaves, dispatch, _stream_quantized)
    else:
        y_PF = _grouped_matmul(x_PD, w_EDF, dispatch)
    return y_PF


def multiply_rows(x_PD: Array, w_EDF: Array, dispatch: Dispatch) -> Array:
    """Compute the forward leg, y = x w.

    Args:
        x_PD: Rows.
        w_EDF: One matrix per expert.
        dispatch: The expert of each block of rows.

    Returns:
        y_PF, in the type of x_PD.
    """
    (y_PF,), _ = run_blocks(_multiply, (x_PD,), (w_EDF,), dispatch, _stream_multiply)
    return y_PF


def multiply_rows_transposed(dy_PF: Array, w_EDF: Array, dispatch: Dispatch) -> Array:
    """Compute the input-gradient leg, dx = dy w^T.

    Args:
        dy_PF: Gradient of the rows that the forward leg returned.
        w_EDF: One matrix per expert.
        dispatch: The expert of each block of rows.

    Returns:
        dx_PD, in the type of dy_PF.
    """
    (dx_PD,), _ = run_blocks(
        _multiply_transposed, (dy_PF,), (w_EDF,), dispatch, _stream_multiply_transposed
    )
    return dx_PD


def sum_outer_products(x_PD: Array, dy_PF: Array, dispatch: Dispatch) -> Array:
    """Compute the weight-gradient leg, dw = x^T dy over the rows of each expert.

    Args:
        x_PD: Rows.
        dy_PF: Gradient of the rows that the forward leg returned.
        dispatch: The expert of each block of rows.

    Returns:
        dw_EDF, in float32; zero for experts without rows.
    """
    _, (dw_EDF,) = run_blocks(_outer_product, (x_PD, dy_PF), (), dispatch, _stream_outer_product)
    return dw_EDF


def _multiply(rows: Arrays, weights: Arrays) -> BlockOutputs:
    (x_PD,), (w_DF,) = rows, weights
    y_PF = product("PD,DF->PF", x_PD, w_DF)
    return (y_PF.astype(x_PD.dtype),), ()


def _multiply_quantized(rows: Arrays, leaves: Arrays) -> BlockOutputs:
    (x_PD,), (w,) = rows, group_leaves(leaves, 1)
    return (multiply(x_PD, w),), ()


def _stream_quantized(
    chip: Accelerator, rows: Arrays, leaves: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    """Run on an accelerator, with a matrix that is widened in memory."""
    return _stream_multiply(chip, rows, tuple(map(widen, group_leaves(leaves, 1))), dispatch)


def _multiply_transposed(rows: Arrays, weights: Arrays) -> BlockOutputs:
    (dy_PF,), (w_DF,) = rows, weights
    dx_PD = product("PF,DF->PD", dy_PF, w_DF)
    return (dx_PD.astype(dy_PF.dtype),), ()


def _outer_product(rows: Arrays, weights: Arrays) -> BlockOutputs:
    x_PD, dy_PF = rows
    dw_DF = product("PD,PF->DF", x_PD, dy_PF)
    return (), (dw_DF,)


def _stream_multiply(
    chip: Accelerator, rows: Arrays, weights: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    tiling = Tiling(rows=(None,), weights=(1,), outs=(1,))
    return chip.stream_blocks(_multiply, rows, weights, dispatch, tiling)


def _stream_multiply_transposed(
    chip: Accelerator, rows: Arrays, weights: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    tiling = Tiling(rows=(None,), weights=(0,), outs=(1,))
    return chip.stream_blocks(_multiply_transposed, rows, weights, dispatch, tiling)


def _stream_outer_product(
    chip: Accelerator, rows: Arrays, weights: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    tiling = Tiling(rows=(None, 1), sums=(1,))
    return chip.stream_blocks(_outer_product, rows, weights, dispatch, tiling)


@jax.custom_vjp
def _grouped_matmul(x_PD: Array, w_EDF: Array, dispatch: Dispatch) -> Array:
    return multiply_rows(x_PD, w_EDF, dispatch)


def _forward(
    x_PD: Array, w_EDF: Array, dispatch: Dispatch
) -> tuple[Array, tuple[Array, Array, Dispatch]]:
    return _grouped_matmul(x_PD, w_EDF, dispatch), (x_PD, w_EDF, dispatch)


def _backward(residuals: tuple[Array, Array, Dispatch], dy_PF: Array) -> tuple[Array, Array, None]:
    x_PD, w_EDF, dispatch = residuals
    dx_PD = multiply_rows_transposed(dy_PF, w_EDF, dispatch)
    dw_EDF = sum_outer_products(x_PD, dy_PF, dispatch).astype(w_EDF.dtype)
    return dx_PD, dw_EDF, None


_grouped_matmul.defvjp(_forward, _backward)
