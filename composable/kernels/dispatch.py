"""Dispatch: which row of the grouped batch holds which token, decided once for all upper layers.

A router gives every token J choices of expert. This file sorts those M * J choices by expert, once,
and gives each expert a *group* of rows that starts on a block boundary, so that a kernel can take a
whole block with one expert's weights. Inside a group the rows keep the order of the tokens. What a
kernel computes for a row therefore depends on the token, on the expert's own weights and on the
expert's own rows before it, never on the index of its bank entry nor on how many experts there are.

It moves rows and builds index tables; it does not multiply matrices (`grouped_matmul.py`), choose
experts (`model/router.py`) or move rows between devices (`parallel/`).

Data flow:

    expert_MJ --make_dispatch--> Dispatch            once per forward pass
    x_MD --gather_rows--> x_PD --kernel--> y_PD --combine_rows--> y_MD       in every slot
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import Array

from composable.errors import ModelError

T = TypeVar("T")

# Rows of tables that are worth a second program with shorter ones.
_MANY_ROWS: Final = 1 << 12
# Pairs that are compared in less time than the steps of a search take to start.
_FEW_PAIRS: Final = 1 << 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatch:
    """Index tables of one routing decision. A pytree: pass it through jit, scan and remat.

    Blocks are numbered from 0; block b holds rows b * block to (b + 1) * block - 1. Blocks past
    `n_blocks_used` exist only because shapes are static, and so does every row of theirs.

    Attributes:
        choice_P: int32, the flat choice (token * J + j) that a row holds; M * J for padding.
        position_MJ: int32, the row that holds a choice; P for a choice of no expert.
        expert_Y: int32 of length P / block, the expert whose group the block belongs to.
            For blocks past `n_blocks_used` it is an arbitrary valid index.
        end_block_E: int32, one past the last block of each expert's group. An expert without
            tokens has an empty group.
        end_row_E: int32, one past the last row of each group that may hold a choice; in the last
            block of the group, if it has any.
        block: Rows per block; static.

    Example:
        >>> import jax.numpy as jnp
        >>> dispatch = make_dispatch(jnp.array([[1], [0], [1]]), n_experts=2, block=2)
        >>> dispatch.expert_Y[: int(dispatch.n_blocks_used)].tolist()
        [0, 1]
    """

    choice_P: Array
    position_MJ: Array
    expert_Y: Array
    end_block_E: Array
    end_row_E: Array
    block: int = dataclasses.field(metadata={"static": True})

    @property
    def token_P(self) -> Array:  # noqa: N802
        """int32, the source token of each row; M for padding."""
        return self.choice_P // self.position_MJ.shape[-1]

    @property
    def n_blocks_used(self) -> Array:
        """int32 scalar, the number of blocks that hold at least one choice; traced, not static."""
        return self.end_block_E[..., -1]

    @property
    def n_experts(self) -> int:
        """The number of experts E; static."""
        return self.end_block_E.shape[-1]


def count_blocks(n_choices: int, n_experts: int, block: int) -> int:
    """Return the least static number of blocks that holds any routing of that many choices.

    A group of n > 0 rows takes ceil(n / block) <= (n - 1) / block + 1 blocks; summed over at most
    min(E, n_choices) groups this gives the bound, and one routing attains it.

    Args:
        n_choices: Choices in the batch, M * J.
        n_experts: Number of experts E.
        block: Rows per block.

    Returns:
        The number of blocks, P / block.

    Example:
        >>> count_blocks(n_choices=10, n_experts=3, block=4)
        4
    """
    n_groups = min(n_experts, n_choices)
    return (n_choices - n_groups) // block + n_groups


def default_block(n_tokens: int, n_choices: int) -> int:
    """Return a good number of rows per block for CPU, by `benchmarks/grouped_matmul.py`.

    Small blocks waste no rows on padding, large ones waste no time between products; a sixteenth
    of the rows, and 64 at most, was best or close to it for 4 and for 16 experts.

    It does not depend on the number of experts, on purpose: matrix products of other sizes may
    round differently, and installing an expert must not change a bit of what the others compute.

    Args:
        n_tokens: Tokens in the flat batch, M.
        n_choices: Choices per token, J.

    Returns:
        A power of two from 1 (decoding a few sequences) to 64.

    Example:
        >>> default_block(n_tokens=2, n_choices=2), default_block(n_tokens=512, n_choices=2)
        (1, 64)
    """
    sixteenth = n_tokens * n_choices // 16
    return min(64, 1 << max(0, sixteenth.bit_length() - 1))


def make_dispatch(expert_MJ: Array, n_experts: int, block: int) -> Dispatch:
    """Sort choices by expert into groups of whole blocks.

    The sort is stable and is the only one: its inverse is a scatter of row numbers.

    Args:
        expert_MJ: Integers, the expert that each choice of each token names. A number outside
            0 .. n_experts - 1 means no expert: that choice takes no row, costs no work and adds
            nothing to its token (padding tokens, fewer installed experts than J).
        n_experts: Number of experts E in the bank; static.
        block: Rows per block; static. See `default_block`.

    Returns:
        The index tables, with P = count_blocks(M * J, n_experts, block) * block rows.

    Raises:
        ModelError: If there is no token, no choice, no expert, or no row in a block.

    Example:
        >>> import jax.numpy as jnp
        >>> dispatch = make_dispatch(jnp.array([[1], [0], [1]]), n_experts=2, block=2)
        >>> dispatch.expert_Y[: int(dispatch.n_blocks_used)].tolist()
        [0, 1]
    """
    _check_routing(expert_MJ, n_experts, block)
    n_tokens, n_choices = expert_MJ.shape
    n = n_tokens * n_choices
    expert_MJ = jnp.where((expert_MJ >= 0) & (expert_MJ < n_experts), expert_MJ, n_experts)
    flat_expert = expert_MJ.astype(jnp.int32).reshape(n)
    order = jnp.argsort(flat_expert, stable=True).astype(jnp.int32)
    sorted_expert = flat_expert[order]

    # Ends of the groups, in choices (in sorted order) and in blocks.
    end_E = count_up_to(sorted_expert, jnp.arange(n_experts, dtype=jnp.int32))
    begin_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
    blocks_E = -((begin_E - end_E) // block)  # ceil((end - begin) / block)
    end_block_E = jnp.cumsum(blocks_E, dtype=jnp.int32)
    begin_block_E = end_block_E - blocks_E

    n_blocks = count_blocks(n, n_experts, block)
    n_rows = n_blocks * block
    expert_Y = count_up_to(end_block_E, jnp.arange(n_blocks, dtype=jnp.int32))
    expert_Y = jnp.minimum(expert_Y, n_experts - 1)

    # Row p of expert e's group holds the sorted choice begin_E[e] + (p - first row of the group).
    shift_E = begin_E - begin_block_E * block
    expert_P = jnp.repeat(expert_Y, block, total_repeat_length=n_rows)
    sorted_P = jnp.arange(n_rows, dtype=jnp.int32) + shift_E[expert_P]
    choice_P = jnp.where(sorted_P < end_E[expert_P], order[jnp.minimum(sorted_P, n - 1)], n)

    # The same map the other way; `order` is a permutation, so a scatter inverts it.
    shift_of_sorted = shift_E[jnp.minimum(sorted_expert, n_experts - 1)]
    row = jnp.where(
        sorted_expert < n_experts, jnp.arange(n, dtype=jnp.int32) - shift_of_sorted, n_rows
    )
    position = jnp.zeros(n, jnp.int32).at[order].set(row, unique_indices=True)
    return Dispatch(
        choice_P=choice_P,
        position_MJ=position.reshape(n_tokens, n_choices),
        expert_Y=expert_Y,
        end_block_E=end_block_E,
        end_row_E=begin_block_E * block + end_E - begin_E,
        block=block,
    )


def count_up_to(sorted_P: Array, most_E: Array) -> Array:
    """Return how many numbers are at most each of some others, by the search for the platform.

    CPUs search by halves. Other platforms compare all pairs at once: their steps of a search are
    launched one after the other, and wait for each other. Where pairs are few, all compare. The
    counts are the same.

    Args:
        sorted_P: Integers in ascending order.
        most_E: Integers.

    Returns:
        int32, one for each of `most_E`.

    Example:
        >>> count_up_to(jnp.array([0, 0, 2]), jnp.array([0, 1, 2])).tolist()
        [2, 2, 3]
    """

    def compare(sorted_P: Array, most_E: Array) -> Array:
        return jnp.searchsorted(sorted_P, most_E, side="right", method="compare_all")

    def halve(sorted_P: Array, most_E: Array) -> Array:
        return jnp.searchsorted(sorted_P, most_E, side="right")

    if sorted_P.size * most_E.size <= _FEW_PAIRS:
        return compare(sorted_P, most_E).astype(jnp.int32)
    counts_E: Array = jax.lax.platform_dependent(
        *(sorted_P, most_E), cpu=halve, cuda=compare, default=compare
    )
    return counts_E.astype(jnp.int32)


def describe_dispatch(platform: str) -> str:
    """Return how a platform finds the rows of each expert, and why.

    Args:
        platform: As jax names it.

    Example:
        >>> describe_dispatch("cpu")
        'one sort, then a search by halves'
    """
    if platform == "cpu":
        return "one sort, then a search by halves"
    return "one sort, then all compared at once, since steps of a search wait for each other"


def group_blocks(expert_Y: Array, n_experts: int, block: int) -> Dispatch:
    """Sort whole blocks by expert, for rows that were grouped elsewhere.

    The tokens of the result are the rows of all blocks, each with one choice. Blocks of an expert
    keep their order, and rows their place in their block.

    Args:
        expert_Y: Expert of each block; a number outside 0 .. n_experts - 1 means none.
        n_experts: Number of experts E; static.
        block: Rows per block; static.

    Example:
        >>> import jax.numpy as jnp
        >>> dispatch = group_blocks(jnp.array([1, 2, 0]), n_experts=2, block=2)
        >>> dispatch.choice_P.tolist()  # the second block has no expert
        [4, 5, 0, 1, 6, 6]
    """
    by_block = make_dispatch(expert_Y[:, None], n_experts, 1)
    n_rows = expert_Y.shape[0] * block
    row = jnp.arange(block, dtype=jnp.int32)

    def rows_of(block_Y: Array) -> Array:
        return jnp.minimum(block_Y.reshape(-1, 1) * block + row, n_rows).reshape(-1)

    return dataclasses.replace(
        by_block,
        choice_P=rows_of(by_block.choice_P),
        position_MJ=rows_of(by_block.position_MJ)[:, None],
        end_row_E=by_block.end_row_E * block,
        block=block,
    )


def run_in_least_room(
    fn: Callable[[Dispatch, Array], T], dispatch: Dispatch, x_MD: Array, n_choices: int
) -> T:
    """Call a function with shorter tables, if the blocks in use leave most rows of a table empty.

    Tables have room for every choice, also where most choices are of no expert. What moves rows,
    and what a kernel writes, takes time for all of them. The shorter tables are another program
    for the same rows, chosen when it runs. CPUs have the whole tables alone: they compile for
    longer than the empty rows take.

    Args:
        fn: Function of a dispatch and the tokens. Its results do not have the dimension P.
        dispatch: The whole tables.
        x_MD: Tokens.
        n_choices: Choices that the shorter tables have room for, however they are routed.

    Returns:
        The result of the function.

    Example:
        >>> dispatch = make_dispatch(jnp.array([[1, -1], [0, -1]]), n_experts=2, block=1)
        >>> run_in_least_room(lambda d, x: gather_rows(x, d).sum(), dispatch, jnp.ones((2, 1)), 2)
        Array(2., dtype=float32)
    """
    n_blocks = count_blocks(n_choices, dispatch.n_experts, dispatch.block)
    if n_blocks >= len(dispatch.expert_Y) or dispatch.choice_P.size < _MANY_ROWS:
        return fn(dispatch, x_MD)
    # Blocks in use come first. A choice of no expert stays past the end.
    short = dataclasses.replace(
        dispatch,
        choice_P=dispatch.choice_P[: n_blocks * dispatch.block],
        expert_Y=dispatch.expert_Y[:n_blocks],
    )

    is_short = jax.lax.platform_dependent(
        dispatch.n_blocks_used,
        cpu=lambda n_used: jnp.zeros_like(n_used, bool),
        cuda=lambda n_used: n_used <= n_blocks,
        default=lambda n_used: n_used <= n_blocks,
    )
    result: T = jax.lax.cond(
        is_short, lambda x_MD: fn(short, x_MD), lambda x_MD: fn(dispatch, x_MD), x_MD
    )
    return result


def _check_routing(expert_MJ: Array, n_experts: int, block: int) -> None:
    """Raise an error unless there is a choice, an expert and a row per block."""
    chex.assert_rank(expert_MJ, 2)
    chex.assert_type(expert_MJ, int)
    if expert_MJ.size < 1:
        raise ModelError(f"expert_MJ has shape {expert_MJ.shape}; expected at least one choice")
    if n_experts < 1:
        raise ModelError(f"n_experts is {n_experts}; expected at least 1")
    if block < 1:
        raise ModelError(f"block is {block}; expected at least 1 row per block")


def gather_rows(x_MD: Array, dispatch: Dispatch) -> Array:
    """Copy tokens to their rows.

    The gradient gathers too: a token's gradient is the sum over its J rows, in choice order.

    Args:
        x_MD: Tokens.
        dispatch: Where they go.

    Returns:
        x_PD: Rows, in the type of x_MD; padding rows are zero.

    Example:
        >>> import jax.numpy as jnp
        >>> dispatch = make_dispatch(jnp.array([[1], [0], [1]]), n_experts=2, block=2)
        >>> gather_rows(jnp.array([[1.0], [2.0], [3.0]]), dispatch)[:4, 0].tolist()
        [2.0, 0.0, 1.0, 3.0]
    """
    chex.assert_rank(x_MD, 2)
    chex.assert_axis_dimension(x_MD, 0, dispatch.position_MJ.shape[0])
    return _gather_rows(x_MD, dispatch)


def combine_rows(y_PD: Array, weights_MJ: Array, dispatch: Dispatch) -> Array:
    """Add up the rows of each token's choices, weighted.

    The sum runs in choice order (j = 0 first) and in float32, so it does not depend on the
    bank entries of the experts.

    Args:
        y_PD: Rows. Padding rows are never read.
        weights_MJ: Weight of each choice.
        dispatch: The one that x_PD was gathered by.

    Returns:
        y_MD: Tokens, in the type of y_PD.

    Example:
        >>> import jax.numpy as jnp
        >>> dispatch = make_dispatch(jnp.array([[1], [0], [1]]), n_experts=2, block=2)
        >>> x_PD = gather_rows(jnp.array([[1.0], [2.0], [3.0]]), dispatch)
        >>> combine_rows(x_PD, jnp.full((3, 1), 0.5), dispatch)[:, 0].tolist()
        [0.5, 1.0, 1.5]
    """
    chex.assert_rank(y_PD, 2)
    chex.assert_axis_dimension(y_PD, 0, dispatch.choice_P.shape[0])
    chex.assert_shape(weights_MJ, dispatch.position_MJ.shape)
    return _combine_rows(y_PD, weights_MJ, dispatch)


def _take(array: Array, index: Array) -> Array:
    """Take along axis 0, zero where the index is past the end (indices are never negative)."""
    return jnp.take(array, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _gather_rows(x_MD: Array, dispatch: Dispatch) -> Array:
    return _take(x_MD, dispatch.token_P)


def _gather_rows_forward(x_MD: Array, dispatch: Dispatch) -> tuple[Array, Dispatch]:
    return _gather_rows(x_MD, dispatch), dispatch


def _gather_rows_backward(dispatch: Dispatch, dx_PD: Array) -> tuple[Array, None]:
    n_choices = dispatch.position_MJ.shape[1]
    dx_MD = sum(
        _take(dx_PD, dispatch.position_MJ[:, j]).astype(jnp.float32) for j in range(n_choices)
    )
    return jnp.asarray(dx_MD).astype(dx_PD.dtype), None


_gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@jax.custom_vjp
def _combine_rows(y_PD: Array, weights_MJ: Array, dispatch: Dispatch) -> Array:
    n_choices = dispatch.position_MJ.shape[1]
    y_MD = sum(
        weights_MJ[:, j, None].astype(jnp.float32)
        * _take(y_PD, dispatch.position_MJ[:, j]).astype(jnp.float32)
        for j in range(n_choices)
    )
    return jnp.asarray(y_MD).astype(y_PD.dtype)


def _combine_rows_forward(
    y_PD: Array, weights_MJ: Array, dispatch: Dispatch
) -> tuple[Array, tuple[Array, Array, Dispatch]]:
    return _combine_rows(y_PD, weights_MJ, dispatch), (y_PD, weights_MJ, dispatch)


def _combine_rows_backward(
    residuals: tuple[Array, Array, Dispatch], dy_MD: Array
) -> tuple[Array, Array, None]:
    y_PD, weights_MJ, dispatch = residuals
    weights_P = _take(weights_MJ.reshape(-1), dispatch.choice_P)
    dy_PD = weights_P[:, None].astype(jnp.float32) * _take(dy_MD, dispatch.token_P)
    n_choices = dispatch.position_MJ.shape[1]
    dweights_MJ = jnp.stack(
        [
            jnp.einsum(
                "MD,MD->M",
                dy_MD,
                _take(y_PD, dispatch.position_MJ[:, j]),
                preferred_element_type=jnp.float32,
            )
            for j in range(n_choices)
        ],
        axis=1,
    )
    return dy_PD.astype(y_PD.dtype), dweights_MJ.astype(weights_MJ.dtype), None


_combine_rows.defvjp(_combine_rows_forward, _combine_rows_backward)
