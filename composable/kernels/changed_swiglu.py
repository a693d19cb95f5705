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
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from composable.kernels.dispatch import Dispatch, gather_rows
from composable.kernels.grouped_matmul import grouped_matmul

# Matrix name -> factors.
Factors = Mapping[str, tuple[Array, Array]]


def grouped_changed_swiglu(
    x_PD: Array, matrices: Mapping[str, Array], changes: Factors, dispatch: Dispatch
) -> Array:
    """Apply to each row the body of its own expert: the shared one, a change of it, or a full one.

    Differentiable once in all arrays, in reverse mode.

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
    shared = _regroup(dispatch, dispatch.n_experts - matrices["w_gate"].shape[0])
    n_changes = changes["w_gate"][0].shape[0]
    changed = dataclasses.replace(
        dispatch,
        expert_Y=jnp.minimum(dispatch.expert_Y, n_changes - 1),
        end_block_E=dispatch.end_block_E[:n_changes],
    )

    def multiply(name: str, rows: Array) -> Array:
        a, b = changes[name]
        change = grouped_matmul(grouped_matmul(rows, a, changed), b, changed)
        return grouped_matmul(rows, matrices[name], shared) + change

    hidden_PF = jax.nn.silu(multiply("w_gate", x_PD)) * multiply("w_up", x_PD)
    return multiply("w_down", hidden_PF)


def changed_swiglu_of_few(
    x_MD: Array,
    matrices: Mapping[str, Array],
    changes: Sequence[Factors],
    body_A: Array,
    n_changes: int,
    dispatch: Dispatch,
) -> Array:
    """Apply the shared body, or a change of it, to the rows of these, where few changes have rows.

    For changes that are known before the program runs, as in decoding. Products with the shared
    matrices run once for all rows, whatever their changes. Not differentiable.

    Args:
        x_MD: Tokens.
        matrices: The shared body's "w_gate", "w_up" and "w_down".
        changes: Factors of some changes, among them all that have rows.
        body_A: Their numbers, each once; that of no body for one that stands for none.
        n_changes: Number of the last change.
        dispatch: Blocks of rows by number of the body.

    Returns:
        y_PD, in the type of x_MD; zero for rows of full bodies and of blocks not in use.
    """
    end_E, block = dispatch.end_block_E, dispatch.block
    row_P = jnp.arange(dispatch.choice_P.shape[0])

    def is_in(begin: Array | int, end: Array) -> Array:
        """Return which rows are in a run of blocks."""
        return (row_P >= begin * block) & (row_P < end * block)

    begin_E = jnp.concatenate([jnp.zeros(1, end_E.dtype), end_E[:-1]])
    begin_A, end_A = (jnp.take(x, body_A, mode="fill", fill_value=0) for x in (begin_E, end_E))

    def add_changes(names: Sequence[str], ys: Sequence[Array], rows: Array) -> Sequence[Array]:
        for i, factors in enumerate(changes):
            own_P = is_in(begin_A[i], end_A[i])

            def add(
                ys: Sequence[Array], factors: Factors = factors, own_P: Array = own_P
            ) -> Sequence[Array]:
                own_rows = jnp.where(own_P[:, None], rows, 0)
                pairs = (factors[name] for name in names)
                return [y + own_rows @ a @ b for y, (a, b) in zip(ys, pairs, strict=True)]

            ys = jax.lax.cond(begin_A[i] < end_A[i], add, lambda ys: ys, ys)
        return ys

    def run(x_MD: Array) -> Array:
        x_PD = gather_rows(x_MD, dispatch)
        both = [gather_rows(x_MD @ matrices[name], dispatch) for name in ("w_gate", "w_up")]
        gate_PF, up_PF = add_changes(("w_gate", "w_up"), both, x_PD)
        hidden_PF = jax.nn.silu(gate_PF) * up_PF
        (y_PD,) = add_changes(("w_down",), [hidden_PF @ matrices["w_down"]], hidden_PF)
        return jnp.where(is_in(0, end_E[n_changes])[:, None], y_PD, 0)

    def skip(x_MD: Array) -> Array:
        return jnp.zeros((len(row_P), x_MD.shape[1]), x_MD.dtype)

    y_PD: Array = jax.lax.cond(end_E[n_changes] > 0, run, skip, x_MD)
    return y_PD


def _regroup(dispatch: Dispatch, n: int) -> Dispatch:
    """Return a dispatch in which the first `n` bodies are in one group with the next."""
    return dataclasses.replace(
        dispatch,
        expert_Y=jnp.maximum(dispatch.expert_Y - n, 0),
        end_block_E=dispatch.end_block_E[n:],
    )
