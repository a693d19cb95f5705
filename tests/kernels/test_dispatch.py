"""Dispatch: hand-written tables, the invariants of any table, and moving rows there and back."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composable.errors import ModelError
from composable.kernels import (
    Dispatch,
    combine_rows,
    count_blocks,
    count_up_to,
    default_block,
    gather_rows,
    make_dispatch,
    reference,
    run_in_least_room,
)

pytestmark = pytest.mark.slow

# Sums of up to 3 products in float32, in another order than the reference's.
FLOAT32_ROUNDING = 1e-5


def dispatch_of(expert_MJ, n_experts: int, block: int) -> Dispatch:
    make = jax.jit(make_dispatch, static_argnums=(1, 2))
    return make(np.asarray(expert_MJ, np.int32), n_experts, block)


def test_table_of_two_choices() -> None:
    dispatch = dispatch_of([[2, 0], [0, 1], [2, 0], [0, 2]], n_experts=3, block=2)
    # Choices are numbered 0 to 7 along the tokens; 8 is padding. At most (8 - 3) // 2 + 3 blocks.
    np.testing.assert_array_equal(dispatch.choice_P, [1, 2, 5, 6, 3, 8, 0, 4, 7, 8])
    np.testing.assert_array_equal(dispatch.token_P, [0, 1, 2, 3, 1, 4, 0, 2, 3, 4])
    np.testing.assert_array_equal(dispatch.position_MJ, [[6, 0], [1, 4], [7, 2], [3, 8]])
    np.testing.assert_array_equal(dispatch.expert_Y, [0, 0, 1, 2, 2])
    np.testing.assert_array_equal(dispatch.end_block_E, [2, 3, 5])
    assert dispatch.n_blocks_used == 5
    assert dispatch.n_experts == 3


def test_table_of_all_tokens_to_one_expert() -> None:
    dispatch = dispatch_of([[1], [1], [1]], n_experts=4, block=2)
    np.testing.assert_array_equal(dispatch.choice_P[:4], [0, 1, 2, 3])
    np.testing.assert_array_equal(dispatch.choice_P[4:], 3)
    np.testing.assert_array_equal(dispatch.position_MJ, [[0], [1], [2]])
    np.testing.assert_array_equal(dispatch.end_block_E, [0, 2, 2, 2])
    assert dispatch.n_blocks_used == 2


def test_table_of_one_token() -> None:
    dispatch = dispatch_of([[3, 0]], n_experts=4, block=1)
    np.testing.assert_array_equal(dispatch.choice_P, [1, 0])
    np.testing.assert_array_equal(dispatch.position_MJ, [[1, 0]])
    np.testing.assert_array_equal(dispatch.expert_Y, [0, 3])


def test_choices_of_no_expert_take_no_row() -> None:
    dispatch = dispatch_of([[0, -1], [2, 1], [-7, 3]], n_experts=2, block=2)
    n_rows = dispatch.choice_P.shape[0]
    np.testing.assert_array_equal(dispatch.position_MJ, [[0, n_rows], [n_rows, 2], [n_rows] * 2])
    assert dispatch.n_blocks_used == 2
    y_MD = jax.jit(combine_rows)(np.ones((n_rows, 1)), np.ones((3, 2)), dispatch)
    np.testing.assert_array_equal(y_MD, [[1], [1], [0]])


# (tokens, choices, experts, block); few, so that few shapes are compiled.
SIZES = [(1, 2, 3, 1), (5, 1, 1, 4), (9, 3, 4, 2), (12, 2, 6, 3), (7, 2, 2, 32)]


@st.composite
def routings(draw) -> tuple[np.ndarray, int, int]:
    """Any experts for one of the sizes, among them numbers that no expert has."""
    n_tokens, n_choices, n_experts, block = draw(st.sampled_from(SIZES))
    n = n_tokens * n_choices
    flat = draw(st.lists(st.integers(-1, n_experts), min_size=n, max_size=n))
    return np.reshape(np.asarray(flat, np.int32), (n_tokens, n_choices)), n_experts, block


@given(routings())
@settings(max_examples=50, deadline=None)
def test_tables_hold_every_choice_once_in_order(routing: tuple[np.ndarray, int, int]) -> None:
    expert_MJ, n_experts, block = routing
    dispatch = dispatch_of(expert_MJ, n_experts, block)
    # In NumPy: every indexing of a jax array by another shape compiles a program.
    dispatch = jax.tree.map(np.asarray, dispatch)
    choice_P = dispatch.choice_P
    flat_expert, n = expert_MJ.reshape(-1), expert_MJ.size
    expert_P = np.repeat(dispatch.expert_Y, block)

    is_routed = (flat_expert >= 0) & (flat_expert < n_experts)
    held = choice_P[choice_P < n]
    assert sorted(held) == list(np.flatnonzero(is_routed))
    np.testing.assert_array_equal(expert_P[choice_P < n], flat_expert[held])
    # The two tables are inverse to each other.
    position = dispatch.position_MJ.reshape(-1)
    np.testing.assert_array_equal(choice_P[position[is_routed]], np.flatnonzero(is_routed))
    assert (position[~is_routed] == choice_P.size).all()
    # Groups: token order, from a block boundary on, in no more blocks than needed.
    blocks_of_experts = 0
    for expert in range(n_experts):
        own = np.flatnonzero((choice_P < n) & (expert_P == expert))
        assert (np.diff(choice_P[own]) > 0).all()
        if own.size:
            assert own[0] % block == 0
            np.testing.assert_array_equal(own, own[0] + np.arange(own.size))
        blocks_of_experts += -(-own.size // block)
        assert dispatch.end_block_E[expert] == blocks_of_experts
        if own.size:
            assert dispatch.end_row_E[expert] == own[-1] + 1
    assert dispatch.n_blocks_used == blocks_of_experts


def test_block_bound_is_enough_and_attained() -> None:
    for n_choices, n_experts, block in itertools.product(range(1, 7), range(1, 4), range(1, 5)):
        worst = max(
            sum(-(-routing.count(expert) // block) for expert in range(n_experts))
            for routing in itertools.product(range(n_experts), repeat=n_choices)
        )
        assert count_blocks(n_choices, n_experts, block) == worst


def test_default_block_grows_with_the_batch() -> None:
    blocks = [default_block(n_tokens, 2) for n_tokens in (1, 4, 16, 64, 256, 1024, 1 << 20)]
    assert blocks[0] == 1
    assert blocks == sorted(blocks)
    assert all(block & (block - 1) == 0 for block in blocks)


@pytest.mark.parametrize(
    ("shape", "n_experts", "block", "message"),
    [
        ((0, 2), 1, 1, "at least one choice"),
        ((3, 2), 0, 1, "n_experts is 0"),
        ((3, 2), 1, 0, "block is 0"),
    ],
)
def test_impossible_tables_are_refused(
    shape: tuple[int, int], n_experts: int, block: int, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        make_dispatch(jnp.zeros(shape, jnp.int32), n_experts, block)


@pytest.mark.parametrize(
    ("n_choices", "dtype"), [(1, jnp.float32), (3, jnp.float32), (2, jnp.bfloat16)]
)
def test_rows_there_and_back_match_the_reference(n_choices: int, dtype) -> None:
    rng = np.random.default_rng(n_choices)
    # Experts -1 and 5 do not exist.
    dispatch = dispatch_of(rng.integers(-1, 6, (11, n_choices)), 5, 4)
    x_MD = jnp.asarray(rng.normal(size=(11, 6)), dtype)
    weights_MJ = jnp.asarray(rng.normal(size=(11, n_choices)), jnp.float32)
    scale_PD = jnp.asarray(rng.normal(size=(dispatch.choice_P.shape[0], 6)), dtype)

    def there_and_back(gather, combine, x_MD, weights_MJ):
        y_MD = combine(gather(x_MD, dispatch) * scale_PD, weights_MJ, dispatch)
        signs = jnp.sin(jnp.arange(y_MD.size, dtype=jnp.float32)).reshape(y_MD.shape)
        return jnp.sum(signs * y_MD.astype(jnp.float32)), y_MD

    def value_and_grads(gather, combine):
        fn = functools.partial(there_and_back, gather, combine)
        return jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))(x_MD, weights_MJ)

    (_, y_MD), grads = value_and_grads(gather_rows, combine_rows)
    (_, y_ref_MD), grads_ref = value_and_grads(reference.gather_rows, reference.combine_rows)
    assert y_MD.dtype == dtype
    chex.assert_trees_all_equal_dtypes(grads, grads_ref)
    # bfloat16 keeps 8 bits of each of the few numbers added up.
    tolerance = FLOAT32_ROUNDING if dtype == jnp.float32 else 5e-2
    chex.assert_trees_all_close((y_MD, grads), (y_ref_MD, grads_ref), atol=tolerance, rtol=0)


def test_no_gradient_scatters() -> None:
    dispatch = dispatch_of([[0, 1], [1, 2], [0, 2]], 3, 2)

    def loss(x_MD, weights_MJ):
        return jnp.sum(combine_rows(gather_rows(x_MD, dispatch), weights_MJ, dispatch) ** 2)

    gradient = jax.grad(loss, argnums=(0, 1))
    text = jax.jit(gradient).lower(jnp.ones((3, 4)), jnp.ones((3, 2))).as_text()
    assert "stablehlo.gather" in text
    assert "scatter" not in text


def test_dispatch_sorts_once() -> None:
    make = functools.partial(make_dispatch, n_experts=5, block=4)
    text = jax.jit(make).lower(jnp.zeros((16, 2), jnp.int32)).as_text()
    assert text.count('"stablehlo.sort"') == 1


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_counts_are_those_of_a_search_on_every_platform(platform, monkeypatch):
    """Those that a CPU searches for, and others compare in one step."""
    rng = np.random.default_rng(0)
    sorted_P, most_E = np.sort(rng.integers(0, 90, 4000, np.int32)), np.arange(100, dtype=np.int32)
    lowered = jax.jit(count_up_to).trace(sorted_P, most_E).lower(lowering_platforms=(platform,))
    assert ("stablehlo.while" in lowered.as_text()) == (platform == "cpu")
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *args, default, **others: others.get(platform, default)(*args),
    )
    expected = np.searchsorted(sorted_P, most_E, side="right")
    np.testing.assert_array_equal(count_up_to(sorted_P, most_E), expected)


@pytest.mark.bits
@pytest.mark.parametrize("n_each", [1, 3])
def test_shorter_tables_change_no_bit(n_each, monkeypatch):
    """Off a CPU, tokens of one choice fit the shorter tables, tokens of three do not."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args))
    rng = np.random.default_rng(0)
    expert_MJ = rng.integers(0, 5, (1500, 3)).astype(np.int32)
    expert_MJ[:, n_each:] = 5
    dispatch = dispatch_of(expert_MJ, 5, 16)
    x_MD, weights_MJ = jnp.asarray(rng.normal(size=(1500, 4))), jnp.ones((1500, 3))
    seen = []

    def run(dispatch, x_MD):
        seen.append(dispatch.choice_P.size)
        x_PD = gather_rows(x_MD, dispatch)
        return combine_rows(x_PD, weights_MJ, dispatch), jnp.float32(x_PD.shape[0])

    y_MD, n_rows = jax.jit(run_in_least_room, static_argnums=(0, 3))(run, dispatch, x_MD, 1800)
    assert seen[0] < 2000 < seen[1]
    assert n_rows == seen[n_each > 1]
    np.testing.assert_array_equal(y_MD, run(dispatch, x_MD)[0])


def test_combining_never_reads_padding() -> None:
    dispatch = dispatch_of([[0, 1], [1, 2], [0, 2]], 3, 2)
    is_padding_P = np.asarray(dispatch.token_P) == 3
    assert is_padding_P.any()
    y_PD = np.where(is_padding_P[:, None], np.nan, 1.0)

    def total(y_PD, weights_MJ):
        return jnp.sum(combine_rows(y_PD, weights_MJ, dispatch))

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(y_PD, np.ones((3, 2)))
    assert value == 6
    chex.assert_tree_all_finite(grads)
