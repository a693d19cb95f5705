"""Grouped SwiGLU: each row through the whole feed-forward body of its own expert, fused per block.

The three products of a block run back to back, so the hidden activations (F wide, several times
the model width) never leave the cache. Measured on CPU this beats three grouped matmuls by far;
`docs/results/kernels.md` has the numbers.

Under differentiation the forward pass also keeps gate and up (2 P F numbers in the type of x_PD),
which measured faster than computing them again; wrap the caller in `jax.checkpoint` to spend the
time instead of the memory. Whether the weights are differentiated is known when the gradient is
traced, and the backward pass is built for it: frozen experts get a pass without weight gradients.

A TPU takes the body in tiles of its hidden units, whose parts of the output it adds up on the chip,
so hidden activations stay there, of bodies of any size. Under differentiation it runs the same
fused functions as a CPU while one expert's matrices fit its memory (three of 2,048 by 1,024 in
bfloat16 do). Larger ones are run in pieces, one product or two at a time, each cut along the axis
that it does not sum over; the hidden activations then leave the chip, as they do on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

from composable.kernels.block_functions import (
    Arrays,
    BlockOutputs,
    Tiling,
    lies_by_columns,
    product,
)
from composable.kernels.blocks import Accelerator, run_blocks
from composable.kernels.dispatch import Dispatch
from composable.kernels.quantized import (
    Matrix,
    Quantized,
    are_few_rows,
    group_leaves,
    multiply,
    widen,
)


def grouped_swiglu(
    x_PD: Array, w_gate_EDF: Matrix, w_up_EDF: Matrix, w_down_EFD: Matrix, dispatch: Dispatch
) -> Array:
    """Apply to each row the gated feed-forward body of its own expert.

    Differentiable once, in x_PD and the weights, in reverse mode, unless they are quantized. Sums
    run in float32; the hidden activations are rounded to the type of x_PD before the last product.

    Args:
        x_PD: Rows, from `gather_rows`.
        w_gate_EDF: Gate matrix of each expert.
        w_up_EDF: Up matrix of each expert.
        w_down_EFD: Down matrix of each expert.
        dispatch: The expert of each block of rows.

    Returns:
        y_PD: (silu(x @ w_gate) * (x @ w_up)) @ w_down, in the type of x_PD; rows of blocks not in
            use are zero.

    References:
        Shazeer, 2020, arXiv:2002.05202, equation 6.

    Example:
        >>> import jax.numpy as jnp
        >>> from composable.kernels import gather_rows, make_dispatch
        >>> dispatch = make_dispatch(jnp.array([[1], [0]]), n_experts=2, block=1)
        >>> x_PD = gather_rows(jnp.array([[1.0], [2.0]]), dispatch)
        >>> w_E11 = jnp.ones((2, 1, 1))
        >>> y_PD = grouped_swiglu(x_PD, w_E11, w_E11, w_E11, dispatch)
        >>> [round(y, 2) for y in y_PD[:2, 0].tolist()]
        [3.52, 0.73]
    """
    chex.assert_rank([x_PD, w_gate_EDF, w_up_EDF, w_down_EFD], [2, 3, 3, 3])
    chex.assert_equal_shape([w_gate_EDF, w_up_EDF])
    width, hidden = w_gate_EDF.shape[1:]
    chex.assert_shape(x_PD, (dispatch.choice_P.shape[0], width))
    chex.assert_shape(w_gate_EDF, (dispatch.n_experts, width, hidden))
    chex.assert_shape(w_down_EFD, (dispatch.n_experts, hidden, width))
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    if isinstance(w_gate_EDF, Quantized):
        run, leaves = _run_quantized_body, tuple(jax.tree.leaves(weights))
        (y_PD,), _ = run_blocks(run, (x_PD,), leaves, dispatch, _stream_quantized_body)
    else:
        y_PD = _grouped_swiglu(x_PD, weights, dispatch)
    return y_PD


def swiglu_of_few(
    x_PD: Array, bodies: Sequence[Sequence[Matrix]], expert_A: Array, dispatch: Dispatch
) -> Array:
    """Apply to each row the body of its own expert, where few experts have rows.

    For experts that are known before the program runs, as in decoding. A product reads its matrix
    where it is, while `grouped_swiglu` slices it out of a stack first: XLA's CPU backend copies
    what it slices, which takes longer than multiplying it by one row. Not differentiable.

    Args:
        x_PD: Rows, from `gather_rows`.
        bodies: Matrices of some experts, among them all that have rows: gate, up and down. Those
            of experts without rows are not read.
        expert_A: Their experts, each once; E for a body that stands for none.
        dispatch: The expert of each block of rows.

    Returns:
        y_PD, as `grouped_swiglu`.

    Example:
        >>> import jax.numpy as jnp
        >>> from composable.kernels import gather_rows, make_dispatch
        >>> dispatch = make_dispatch(jnp.array([[1], [0]]), n_experts=9, block=1)
        >>> x_PD = gather_rows(jnp.array([[1.0], [2.0]]), dispatch)
        >>> bodies = [[jnp.ones((1, 1))] * 3, [jnp.ones((1, 1))] * 3]
        >>> y_PD = swiglu_of_few(x_PD, bodies, jnp.array([0, 1]), dispatch)
        >>> [round(y, 2) for y in y_PD[:2, 0].tolist()]
        [3.52, 0.73]
    """
    block = dispatch.block
    end_E = dispatch.end_block_E
    begin_E = jnp.concatenate([jnp.zeros(1, end_E.dtype), end_E[:-1]])
    begin_A, end_A = (jnp.take(x, expert_A, mode="fill", fill_value=0) for x in (begin_E, end_E))
    y_PD = jnp.zeros((x_PD.shape[0], bodies[0][-1].shape[1]), x_PD.dtype)
    for a, body in enumerate(bodies):

        def run_block(index: Array, y_PD: Array, body: Sequence[Matrix] = body) -> Array:
            rows_PD = jax.lax.dynamic_slice_in_dim(x_PD, index * block, block)
            ((new_PD,), _) = _run_body((rows_PD,), tuple(body))
            return jax.lax.dynamic_update_slice_in_dim(y_PD, new_PD, index * block, axis=0)

        y_PD = jax.lax.fori_loop(begin_A[a], end_A[a], run_block, y_PD)
    return y_PD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Residuals:
    """Values that the backward pass needs; x_PD is None if the weights are frozen."""

    x_PD: Array | None
    gate_PF: Array
    up_PF: Array
    weights: Arrays
    dispatch: Dispatch


@jax.custom_vjp
def _grouped_swiglu(x_PD: Array, weights: Arrays, dispatch: Dispatch) -> Array:
    (y_PD,), _ = run_blocks(_run_body, (x_PD,), weights, dispatch, _stream_body)
    return y_PD


def _forward(x_PD: Any, weights: Any, dispatch: Any) -> tuple[Array, _Residuals]:
    """Run the body; leaves come as (value, is it differentiated) because of `symbolic_zeros`."""
    are_trained = any(w.perturbed for w in weights)
    x_PD, weights, dispatch = jax.tree.map(lambda leaf: leaf.value, (x_PD, weights, dispatch))
    (y_PD, gate_PF, up_PF), _ = run_blocks(
        _run_body_and_keep, (x_PD,), weights, dispatch, _stream_body_and_keep
    )
    return y_PD, _Residuals(
        x_PD=x_PD if are_trained else None,
        gate_PF=gate_PF,
        up_PF=up_PF,
        weights=weights,
        dispatch=dispatch,
    )


def _backward(
    residuals: _Residuals, dy_PD: Any
) -> tuple[Array | None, tuple[Array | None, ...], None]:
    if isinstance(dy_PD, jax.custom_derivatives.SymbolicZero):
        return None, (None, None, None), None
    weights, dispatch = residuals.weights, residuals.dispatch
    rows = (dy_PD, residuals.gate_PF, residuals.up_PF)
    if residuals.x_PD is None:
        (dx_PD,), _ = run_blocks(_differentiate_rows, rows, weights, dispatch, _stream_backward)
        return dx_PD, (None, None, None), None
    (dx_PD,), sums = run_blocks(
        _differentiate_all, (*rows, residuals.x_PD), weights, dispatch, _stream_backward
    )
    return dx_PD, tuple(dw.astype(w.dtype) for dw, w in zip(sums, weights, strict=True)), None


_grouped_swiglu.defvjp(_forward, _backward, symbolic_zeros=True)


def _product(subscripts: str, left: Array, right: Matrix) -> Array:
    is_row = isinstance(left, Array) and are_few_rows(left, right)  # as in decoding
    if isinstance(right, Quantized) or is_row:
        return multiply(left, right)
    return product(subscripts, left, right)


def _run_quantized_body(rows: Arrays, leaves: Arrays) -> BlockOutputs:
    """One block forward, with the arrays of quantized matrices."""
    return _run_body(rows, group_leaves(leaves, 3))


def _run_body(rows: Arrays, weights: Sequence[Matrix]) -> BlockOutputs:
    """One block forward: 3 products."""
    (y_PD, _, _), _ = _run_body_and_keep(rows, weights)
    return (y_PD,), ()


def _run_body_and_keep(rows: Arrays, weights: Sequence[Matrix]) -> BlockOutputs:
    """One block forward, with the values that the backward pass needs."""
    (hidden_PF, gate_PF, up_PF), _ = _run_gate_and_up(rows, weights[:2])
    (y_PD,), _ = _run_down((hidden_PF,), weights[2:])
    return (y_PD, gate_PF, up_PF), ()


def _run_gate_and_up(rows: Arrays, weights: Sequence[Matrix]) -> BlockOutputs:
    """One block's hidden activations, with the values that the backward pass needs: 2 products."""
    (x_PD,), (w_gate_DF, w_up_DF) = rows, weights
    gate_PF = _product("PD,DF->PF", x_PD, w_gate_DF)
    up_PF = _product("PD,DF->PF", x_PD, w_up_DF)
    hidden_PF = jax.nn.silu(gate_PF) * up_PF
    return tuple(out.astype(x_PD.dtype) for out in (hidden_PF, gate_PF, up_PF)), ()


def _run_hidden(rows: Arrays, weights: Arrays) -> BlockOutputs:
    """One block's hidden activations alone: 2 products."""
    (hidden_PF, _, _), _ = _run_gate_and_up(rows, weights)
    return (hidden_PF,), ()


def _run_hidden_tile(x_PD: Array, weights: Arrays) -> Array:
    """What some hidden units add to the output of some rows: 3 products."""
    (hidden_PF,), _ = _run_hidden((x_PD,), weights[:2])
    return product("PF,FD->PD", hidden_PF, weights[2])


def _run_hidden_tile_by_columns(x_PD: Array, weights: Arrays) -> Array:
    """The same, of a down matrix that is transposed."""
    (hidden_PF,), _ = _run_hidden((x_PD,), weights[:2])
    return product("PF,DF->PD", hidden_PF, weights[2])


def _run_down(rows: Arrays, weights: Sequence[Matrix]) -> BlockOutputs:
    """One block's output from its hidden activations: 1 product."""
    (hidden_PF,), (w_down_FD,) = rows, weights
    return (_product("PF,FD->PD", hidden_PF, w_down_FD).astype(hidden_PF.dtype),), ()


def _differentiate_rows(rows: Arrays, weights: Arrays) -> BlockOutputs:
    """One block backward, input gradient only: 3 products."""
    w_gate_DF, w_up_DF, w_down_FD = weights
    (_, dgate_PF, dup_PF), _ = _differentiate_hidden(rows, (w_down_FD,))
    return _differentiate_gate_and_up((dgate_PF, dup_PF), (w_gate_DF, w_up_DF))


def _differentiate_all(rows: Arrays, weights: Arrays) -> BlockOutputs:
    """One block backward, input and weight gradients: 6 products."""
    dy_PD, gate_PF, up_PF, x_PD = rows
    w_gate_DF, w_up_DF, w_down_FD = weights
    hidden, _ = _differentiate_hidden((dy_PD, gate_PF, up_PF), (w_down_FD,))
    hidden_PF, dgate_PF, dup_PF = hidden
    outs, _ = _differentiate_gate_and_up((dgate_PF, dup_PF), (w_gate_DF, w_up_DF))
    _, (dw_gate_DF, dw_up_DF) = _sum_gate_and_up((x_PD, dgate_PF, dup_PF), ())
    _, (dw_down_FD,) = _sum_down((hidden_PF, dy_PD), ())
    return outs, (dw_gate_DF, dw_up_DF, dw_down_FD)


def _differentiate_hidden(rows: Arrays, weights: Arrays) -> BlockOutputs:
    """One block's hidden activations again, and the gradients of gate and up: 1 product."""
    (dy_PD, gate_PF, up_PF), (w_down_FD,) = rows, weights
    # First, so that a GPU's program does not hold gate and up in its registers meanwhile.
    dhidden_PF = product("PD,FD->PF", dy_PD, w_down_FD)
    gate_PF, up_PF = gate_PF.astype(jnp.float32), up_PF.astype(jnp.float32)
    sigmoid_PF = jax.nn.sigmoid(gate_PF)
    silu_PF = gate_PF * sigmoid_PF
    # silu'(g) = s + g s (1 - s) = s + silu(g) (1 - s), with s = sigmoid(g).
    dgate_PF = dhidden_PF * up_PF * (sigmoid_PF + silu_PF * (1 - sigmoid_PF))
    dup_PF = dhidden_PF * silu_PF
    return tuple(out.astype(dy_PD.dtype) for out in (silu_PF * up_PF, dgate_PF, dup_PF)), ()


def _differentiate_gate_and_up(rows: Arrays, weights: Arrays) -> BlockOutputs:
    """One block's input gradient from those of gate and up: 2 products."""
    (dgate_PF, dup_PF), (w_gate_DF, w_up_DF) = rows, weights
    dx_PD = product("PF,DF->PD", dgate_PF, w_gate_DF) + product("PF,DF->PD", dup_PF, w_up_DF)
    return (dx_PD.astype(dgate_PF.dtype),), ()


def _sum_gate_and_up(rows: Arrays, weights: Arrays) -> BlockOutputs:
    """One block's part in the gradients of the gate and up matrices: 2 products."""
    x_PD, dgate_PF, dup_PF = rows
    return (), (product("PD,PF->DF", x_PD, dgate_PF), product("PD,PF->DF", x_PD, dup_PF))


def _sum_down(rows: Arrays, weights: Arrays) -> BlockOutputs:
    """One block's part in the gradient of the down matrix: 1 product."""
    hidden_PF, dy_PD = rows
    return (), (product("PF,PD->FD", hidden_PF, dy_PD),)


def _stream_quantized_body(
    chip: Accelerator, rows: Arrays, leaves: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    """Forward on a chip with kernels, of matrices that are widened in memory."""
    return _stream_body(chip, rows, tuple(map(widen, group_leaves(leaves, 3))), dispatch)


def _stream_body(
    chip: Accelerator, rows: Arrays, weights: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    """Forward on a chip with kernels."""
    if chip.sum_tiles:
        (x_PD,), (w_gate_EDF, w_up_EDF, w_down_EFD) = rows, weights
        fn, axes = _run_hidden_tile, (1, 1, 0)
        if lies_by_columns(w_down_EFD):
            # Taken as it lies, it is not copied before the kernel.
            weights = w_gate_EDF, w_up_EDF, w_down_EFD.swapaxes(1, 2)
            fn, axes = _run_hidden_tile_by_columns, (1, 1, 1)
        return (chip.sum_tiles(fn, x_PD, weights, dispatch, axes),), ()
    tiling = Tiling(rows=(None,), weights=(1, 1), outs=(1,))
    hidden, _ = chip.stream_blocks(_run_hidden, rows, weights[:2], dispatch, tiling)
    return _stream_down(chip, hidden, weights[2:], dispatch)


def _stream_body_and_keep(
    chip: Accelerator, rows: Arrays, weights: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    """Forward on such a chip, with the values that the backward pass needs."""
    if chip.fits_on_chip(_run_body_and_keep, rows, weights, dispatch.block):
        return chip.stream_blocks(_run_body_and_keep, rows, weights, dispatch)
    tiling = Tiling(rows=(None,), weights=(1, 1), outs=(1, 1, 1))
    hidden, _ = chip.stream_blocks(_run_gate_and_up, rows, weights[:2], dispatch, tiling)
    hidden_PF, gate_PF, up_PF = hidden
    (y_PD,), _ = _stream_down(chip, (hidden_PF,), weights[2:], dispatch)
    return (y_PD, gate_PF, up_PF), ()


def _stream_down(
    chip: Accelerator, rows: Arrays, weights: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    """The output from the hidden activations, on such a chip."""
    tiling = Tiling(rows=(None,), weights=(1,), outs=(1,))
    return chip.stream_blocks(_run_down, rows, weights, dispatch, tiling)


def _stream_backward(
    chip: Accelerator, rows: Arrays, weights: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    """Backward on such a chip, with weight gradients if the rows have x_PD."""
    dy_PD, gate_PF, up_PF, *x = rows
    fused = _differentiate_all if x else _differentiate_rows
    if chip.fits_on_chip(fused, rows, weights, dispatch.block):
        return chip.stream_blocks(fused, rows, weights, dispatch)
    tiling = Tiling(rows=(None, 1, 1), weights=(0,), outs=(1, 1, 1))
    hidden, _ = chip.stream_blocks(
        _differentiate_hidden, (dy_PD, gate_PF, up_PF), weights[2:], dispatch, tiling
    )
    hidden_PF, dgate_PF, dup_PF = hidden
    tiling = Tiling(rows=(None, None), weights=(0, 0), outs=(1,))
    outs, _ = chip.stream_blocks(
        _differentiate_gate_and_up, (dgate_PF, dup_PF), weights[:2], dispatch, tiling
    )
    if not x:
        return outs, ()
    tiling = Tiling(rows=(None, 1, 1), sums=(1, 1))
    _, by_gate_and_up = chip.stream_blocks(
        _sum_gate_and_up, (*x, dgate_PF, dup_PF), (), dispatch, tiling
    )
    tiling = Tiling(rows=(1, None), sums=(0,))
    _, by_down = chip.stream_blocks(_sum_down, (hidden_PF, dy_PD), (), dispatch, tiling)
    return outs, (*by_gate_and_up, *by_down)
