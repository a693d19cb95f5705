"""SwiGLU bodies that are low-rank changes of one body, beside full ones: `x w + (x a) b`.

Bodies are numbered for this: 0 is the shared body, then come its changes, then full bodies. In a
dispatch by these numbers the rows of the shared body and of its changes are one run of blocks, so
that they are one group of the product with its matrices. Only the factors differ by expert, and a
token that mixes two changes reads the shared matrices once.

References:
    Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import jax
import jax.numpy as jnp
from jax import Array

from composable.kernels.block_functions import Arrays, BlockOutputs
from composable.kernels.blocks import Accelerator, run_blocks
from composable.kernels.dispatch import Dispatch, gather_rows
from composable.kernels.grouped_matmul import grouped_matmul
from composable.kernels.quantized import Matrix, Quantized, multiply

# Matrix name -> factors.
Factors = Mapping[str, tuple[Array, Array]]
_NAMES: Final = ("w_gate", "w_up", "w_down")
# Rows of one token, in decoding, for which products read their matrix once, at the speed of memory.
_FEW: Final = 4


def grouped_changed_swiglu(
    x_PD: Array, matrices: Mapping[str, Matrix], changes: Factors, dispatch: Dispatch
) -> Array:
    """Apply to each row the body of its own expert: the shared one, a change of it, or a full one.

    Differentiable once in all arrays, in reverse mode, unless the matrices are quantized.

    Args:
        x_PD: Rows, from `gather_rows`.
        matrices: "w_gate", "w_up" and "w_down", stacked: the shared body's, then the full ones.
        changes: Their factors, stacked: an entry of the shared body, which is zero, then one for
            each change.
        dispatch: Blocks of rows by number of the body.

    Returns:
        y_PD, in the type of x_PD; rows of blocks not in use are zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from composable.kernels import gather_rows, make_dispatch
        >>> dispatch = make_dispatch(jnp.array([[0], [1]]), n_experts=2, block=1)
        >>> x_PD = gather_rows(jnp.array([[1.0], [1.0]]), dispatch)
        >>> ones, factor = jnp.ones((1, 1, 1)), jnp.array([[[0.0]], [[1.0]]])
        >>> names = ("w_gate", "w_up", "w_down")
        >>> changes = {name: (factor, factor) for name in names}
        >>> y_PD = grouped_changed_swiglu(x_PD, dict.fromkeys(names, ones), changes, dispatch)
        >>> [round(y, 2) for y in y_PD[:2, 0].tolist()]
        [0.73, 7.05]
    """
    # In one order, not in that of the mappings.
    stacks = [matrices[name] for name in _NAMES]
    factors = [factor for name in _NAMES for factor in changes[name]]
    run = _fused if stacks[0].shape[0] == 1 else _multiply_by_parts
    y_PD: Array = run(x_PD, (*factors, *stacks), dispatch)  # type: ignore[arg-type]  # or quantized
    return y_PD


@jax.custom_vjp
def _fused(x_PD: Array, weights: Arrays, dispatch: Dispatch) -> Array:
    """Run blocks through the whole body, where the shared body is the only full one."""
    factors, shared = weights[:6], tuple(stack[0] for stack in weights[6:])
    (y_PD,), _ = run_blocks(_run_body, (x_PD,), factors, dispatch, _stream_body, shared)
    return y_PD


def _forward(
    x_PD: Array, weights: Arrays, dispatch: Dispatch
) -> tuple[Array, tuple[Array, Arrays, Dispatch]]:
    return _fused(x_PD, weights, dispatch), (x_PD, weights, dispatch)


def _backward(
    residuals: tuple[Array, Arrays, Dispatch], dy_PD: Array
) -> tuple[Array, Arrays, None]:
    x_PD, weights, dispatch = residuals
    _, pull = jax.vjp(lambda x, w: _multiply_by_parts(x, w, dispatch), x_PD, weights)
    dx_PD, dweights = pull(dy_PD)
    return dx_PD, dweights, None


_fused.defvjp(_forward, _backward)


def _run_body(rows: Arrays, weights: Arrays) -> BlockOutputs:
    """One block: factors of gate, up and down, then the shared matrices."""
    (x_PD,), factors, (w_gate_DF, w_up_DF, w_down_FD) = rows, weights[:6], weights[6:]

    def run(left: Array, w: Matrix, a_DR: Array, b_RF: Array) -> Array:
        between = _product(left, a_DR).astype(left.dtype)
        return (_product(left, w) + _product(between, b_RF)).astype(left.dtype)

    gate_PF = run(x_PD, w_gate_DF, *factors[:2])
    hidden_PF = jax.nn.silu(gate_PF) * run(x_PD, w_up_DF, *factors[2:4])
    return (run(hidden_PF, w_down_FD, *factors[4:]),), ()


def _stream_body(
    chip: Accelerator, rows: Arrays, weights: Arrays, dispatch: Dispatch
) -> BlockOutputs:
    """Run on a chip with kernels, one for each product."""
    del chip  # `grouped_matmul` finds it.
    (x_PD,), stacks = rows, (matrix[None] for matrix in weights[6:])
    return (_multiply_by_parts(x_PD, (*weights[:6], *stacks), dispatch),), ()


def _multiply_by_parts(x_PD: Array, weights: Arrays, dispatch: Dispatch) -> Array:
    """Run the products one after the other, each for all rows."""
    n_full, n_changes = weights[6].shape[0], len(weights[0])
    n_others = dispatch.n_experts - n_full
    shared = dataclasses.replace(
        dispatch,
        expert_Y=jnp.maximum(dispatch.expert_Y - n_others, 0),
        end_block_E=dispatch.end_block_E[n_others:],
        end_row_E=dispatch.end_row_E[n_others:],
    )
    changed = dataclasses.replace(
        dispatch,
        expert_Y=jnp.minimum(dispatch.expert_Y, n_changes - 1),
        end_block_E=dispatch.end_block_E[:n_changes],
        end_row_E=dispatch.end_row_E[:n_changes],
    )

    def run(index: int, x: Array) -> Array:
        a, b = weights[2 * index : 2 * index + 2]
        change = grouped_matmul(grouped_matmul(x, a, changed), b, changed)
        return grouped_matmul(x, weights[6 + index], shared) + change

    return run(2, jax.nn.silu(run(0, x_PD)) * run(1, x_PD))


def _product(left: Array, right: Matrix) -> Array:
    if isinstance(right, Quantized):
        return multiply(left, right)
    return jnp.einsum("PD,DF->PF", left, right, preferred_element_type=jnp.float32)


def changed_swiglu_of_few(
    x_MD: Array,
    matrices: Mapping[str, Matrix],
    changes: Sequence[Factors],
    body_A: Array,
    n_changes: int,
    dispatch: Dispatch,
) -> Array:
    """Apply the shared body, or a change of it, to the rows of these, where few changes have rows.

    For changes that are known before the program runs, as in decoding. In blocks of one row,
    products with the shared matrices run once for all rows of a token, whatever their changes; in
    larger ones, once for each block in use. Not differentiable.

    Args:
        x_MD: Tokens.
        matrices: The shared body's "w_gate", "w_up" and "w_down".
        changes: Factors of some changes, among them all that have rows.
        body_A: Their numbers, each once; that of no body for one that stands for none.
        n_changes: Number of the last change.
        dispatch: Blocks of rows by number of the body.

    Returns:
        y_PD, in the type of x_MD; zero for rows of full bodies and of blocks not in use.

    Example:
        >>> import jax.numpy as jnp
        >>> from composable.kernels import make_dispatch
        >>> dispatch = make_dispatch(jnp.array([[0], [1]]), n_experts=2, block=1)
        >>> one = jnp.ones((1, 1))
        >>> names = ("w_gate", "w_up", "w_down")
        >>> y_PD = changed_swiglu_of_few(
        ...     jnp.ones((2, 1)), dict.fromkeys(names, one), [dict.fromkeys(names, (one, one))],
        ...     jnp.array([1]), 1, dispatch)
        >>> [round(y, 2) for y in y_PD[:2, 0].tolist()]
        [0.73, 7.05]
    """
    end_E, block = dispatch.end_block_E, dispatch.block
    # The rows of a token are as many as it mixes experts.
    few = functools.partial(multiply, few=_FEW)
    row_P = jnp.arange(dispatch.choice_P.shape[0])

    def is_in(begin: Array | int, end: Array | int) -> Array:
        """Return which rows are in a run of blocks."""
        return (row_P >= begin * block) & (row_P < end * block)

    begin_E = jnp.concatenate([jnp.zeros(1, end_E.dtype), end_E[:-1]])
    begin_A, end_A = (jnp.take(x, body_A, mode="fill", fill_value=0) for x in (begin_E, end_E))

    def add_changes(names: Sequence[str], ys: Sequence[Array], x: Array) -> Sequence[Array]:
        for i, factors in enumerate(changes):
            own_P = is_in(begin_A[i], end_A[i])

            def add(
                ys: Sequence[Array], factors: Factors = factors, own_P: Array = own_P
            ) -> Sequence[Array]:
                own_rows = jnp.where(own_P[:, None], x, 0)
                pairs = (factors[name] for name in names)
                return [y + few(few(own_rows, a), b) for y, (a, b) in zip(ys, pairs, strict=True)]

            ys = jax.lax.cond(begin_A[i] < end_A[i], add, lambda ys: ys, ys)
        return ys

    def run(x_MD: Array) -> Array:
        x_PD = gather_rows(x_MD, dispatch)
        both = [gather_rows(few(x_MD, matrices[name]), dispatch) for name in ("w_gate", "w_up")]
        gate_PF, up_PF = add_changes(("w_gate", "w_up"), both, x_PD)
        hidden_PF = jax.nn.silu(gate_PF) * up_PF
        (y_PD,) = add_changes(("w_down",), [few(hidden_PF, matrices["w_down"])], hidden_PF)
        return jnp.where(is_in(0, end_E[n_changes])[:, None], y_PD, 0)

    def skip(x_MD: Array) -> Array:
        return jnp.zeros((len(row_P), x_MD.shape[1]), x_MD.dtype)

    if block > 1:
        return _change_blocks(
            gather_rows(x_MD, dispatch), matrices, changes, body_A, n_changes, dispatch
        )
    y_PD: Array = jax.lax.cond(end_E[n_changes] > 0, run, skip, x_MD)
    return y_PD


def _change_blocks(
    x_PD: Array,
    matrices: Mapping[str, Matrix],
    changes: Sequence[Factors],
    body_A: Array,
    n_changes: int,
    dispatch: Dispatch,
) -> Array:
    """Do the work of `changed_swiglu_of_few` block by block."""
    block = dispatch.block
    is_own_YA = dispatch.expert_Y[:, None] == body_A
    # Which branch a block takes: 0 for the shared body, else its change's place, plus one.
    branch_Y = jnp.where(is_own_YA.any(axis=1), 1 + jnp.argmax(is_own_YA, axis=1), 0)

    def run_block(index: Array, y_PD: Array) -> Array:
        start = index * block

        def multiply_changed(names: Sequence[str], x: Array) -> Sequence[Array]:
            def change(factors: Factors) -> Callable[[Sequence[Array]], Sequence[Array]]:
                pairs = [factors[name] for name in names]
                return lambda ys: [y + x @ a @ b for y, (a, b) in zip(ys, pairs, strict=True)]

            branches = [lambda ys: ys, *(change(factors) for factors in changes)]
            ys = [multiply(x, matrices[name]) for name in names]
            changed: Sequence[Array] = jax.lax.switch(branch_Y[index], branches, ys)
            return changed

        x = jax.lax.dynamic_slice_in_dim(x_PD, start, block)
        gate, up = multiply_changed(("w_gate", "w_up"), x)
        (y,) = multiply_changed(("w_down",), jax.nn.silu(gate) * up)
        return jax.lax.dynamic_update_slice_in_dim(y_PD, y, start, axis=0)

    y_PD: Array = jnp.zeros((x_PD.shape[0], matrices["w_down"].shape[1]), x_PD.dtype)
    y_PD = jax.lax.fori_loop(0, dispatch.end_block_E[n_changes], run_block, y_PD)
    return y_PD
