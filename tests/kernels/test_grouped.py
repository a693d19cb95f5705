"""Grouped matmul and SwiGLU: values and gradients, bit-identity, and work in proportion to rows."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from composable.kernels import (
    combine_rows,
    gather_rows,
    grouped_matmul,
    grouped_swiglu,
    make_dispatch,
    reference,
)
from composable.kernels.blocks import batch_blocks, loop_blocks

pytestmark = pytest.mark.slow

# Sums of tens of products in float32, in another order than the reference's; relative to the
# largest entry.
FLOAT32_ROUNDING = 2e-6
# bfloat16 keeps 8 bits, so an activation or a gradient is off by 2**-9 of itself, and a few meet.
BFLOAT16_ROUNDING = 2e-2

WIDTH, HIDDEN = 8, 12

SIZES = {
    # (tokens, choices, experts, block)
    "batch": (21, 2, 4, 4),
    "one expert, block past the batch": (3, 3, 1, 16),
    "one token": (1, 2, 4, 1),
}
# Where the choices go: (generator, experts, shape) -> expert_MJ. One past the end is no expert.
ROUTES = {
    "random": lambda rng, e, shape: rng.integers(0, e, shape),
    "random, some nowhere": lambda rng, e, shape: rng.integers(-1, e + 1, shape),
    "all to one": lambda rng, e, shape: np.full(shape, e - 1),
    "middle ones empty": lambda rng, e, shape: (e - 1) * rng.integers(0, 2, shape),
}


@pytest.fixture(params=[(s, r) for s in SIZES for r in ROUTES], ids="-".join)
def case(request):
    """(x_MD, weights_MJ, (w_gate_EDF, w_up_EDF, w_down_EFD), expert_MJ, E, block)."""
    size, route = request.param
    n_tokens, n_choices, n_experts, block = SIZES[size]
    expert_MJ = ROUTES[route](np.random.default_rng(1), n_experts, (n_tokens, n_choices))
    arrays = random_arrays(n_tokens, n_choices, n_experts)
    return (*arrays, expert_MJ.astype(np.int32), n_experts, block)


def random_arrays(n_tokens, n_choices, n_experts, width=WIDTH, hidden=HIDDEN):
    """Tokens, mixing weights and bodies, of unit scale. NumPy, so that making them is cheap."""
    rng = np.random.default_rng(0)
    x_MD = rng.normal(size=(n_tokens, width))
    weights_MJ = rng.uniform(size=(n_tokens, n_choices))
    weights = (
        rng.normal(size=(n_experts, width, hidden)) / width**0.5,
        rng.normal(size=(n_experts, width, hidden)) / width**0.5,
        rng.normal(size=(n_experts, hidden, width)) / hidden**0.5,
    )
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x_MD, weights_MJ, weights))


def random_experts(n_tokens, n_choices, n_experts, seed=0):
    """Distinct random experts for each token, as a router's top k gives."""
    scores_ME = np.random.default_rng(seed).normal(size=(n_tokens, n_experts))
    return np.argsort(scores_ME, axis=1)[:, :n_choices].astype(np.int32)


make_dispatch_jit = jax.jit(make_dispatch, static_argnums=(1, 2))


def run_slot(x_MD, weights_MJ, weights, expert_MJ, n_experts, block):
    dispatch = make_dispatch(expert_MJ, n_experts, block)
    y_PD = grouped_swiglu(gather_rows(x_MD, dispatch), *weights, dispatch)
    return combine_rows(y_PD, weights_MJ, dispatch)


def run_slot_by_reference(x_MD, weights_MJ, weights, expert_MJ, n_experts, block):
    dispatch = make_dispatch(expert_MJ, n_experts, block)
    y_PD = reference.grouped_swiglu(reference.gather_rows(x_MD, dispatch), *weights, dispatch)
    return reference.combine_rows(y_PD, weights_MJ, dispatch)


def run_slot_by_matmuls(x_MD, weights_MJ, weights, expert_MJ, n_experts, block):
    dispatch = make_dispatch(expert_MJ, n_experts, block)
    x_PD = gather_rows(x_MD, dispatch)
    gate_PF = grouped_matmul(x_PD, weights[0], dispatch)
    up_PF = grouped_matmul(x_PD, weights[1], dispatch)
    y_PD = grouped_matmul(jax.nn.silu(gate_PF) * up_PF, weights[2], dispatch)
    return combine_rows(y_PD, weights_MJ, dispatch)


@functools.cache
def differentiate(run):
    """Value and gradients in tokens, mixing weights and bodies, of a sum without symmetry."""

    @functools.partial(jax.jit, static_argnums=(4, 5))
    def value_and_grads(x_MD, weights_MJ, weights, expert_MJ, n_experts, block):
        def loss(*differentiated):
            y_MD = run(*differentiated, expert_MJ, n_experts, block)
            signs = jnp.sin(jnp.arange(y_MD.size, dtype=jnp.float32)).reshape(y_MD.shape)
            return jnp.sum(signs * y_MD.astype(jnp.float32)), y_MD

        (_, y_MD), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
            x_MD, weights_MJ, weights
        )
        return y_MD, grads

    return value_and_grads


def assert_close(tree, expected, rounding):
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, expected)
    for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        leaf, wanted = np.asarray(leaf, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=rounding * np.abs(wanted).max())


def test_values_and_gradients_match_the_reference(case) -> None:
    expected = differentiate(run_slot_by_reference)(*case)
    assert_close(differentiate(run_slot)(*case), expected, 10 * FLOAT32_ROUNDING)


@pytest.mark.parametrize("route", ROUTES)
def test_matmul_values_and_gradients_match_the_reference(route: str) -> None:
    n_tokens, n_choices, n_experts, block = SIZES["batch"]
    expert_MJ = ROUTES[route](np.random.default_rng(2), n_experts, (n_tokens, n_choices))
    arrays = random_arrays(n_tokens, n_choices, n_experts)
    args = (*arrays, expert_MJ.astype(np.int32), n_experts, block)
    expected = differentiate(run_slot_by_reference)(*args)
    assert_close(differentiate(run_slot_by_matmuls)(*args), expected, 10 * FLOAT32_ROUNDING)


@pytest.mark.parametrize("weight_type", ["bfloat16", "float32"])
def test_short_types_match_the_reference_in_float32(weight_type: str) -> None:
    x_MD, weights_MJ, weights = random_arrays(64, 2, 3, width=64, hidden=96)
    x_MD, weights = x_MD.astype("bfloat16"), jax.tree.map(lambda w: w.astype(weight_type), weights)
    expert_MJ = random_experts(64, 2, 3)
    result = differentiate(run_slot)(x_MD, weights_MJ, weights, expert_MJ, 3, 8)
    chex.assert_trees_all_equal_dtypes(result, (x_MD, (x_MD, weights_MJ, weights)))
    arrays = jax.tree.map(lambda a: a.astype(jnp.float32), (x_MD, weights_MJ, weights))
    expected = differentiate(run_slot_by_reference)(*arrays, expert_MJ, 3, 8)
    result = jax.tree.map(lambda a: a.astype(jnp.float32), result)
    assert_close(result, expected, BFLOAT16_ROUNDING)


def test_every_leg_sums_in_float32() -> None:
    """A bfloat16 sum of ones would stop at 256, within a product or over the blocks of a group."""
    n, ones = 512, functools.partial(jnp.ones, dtype=jnp.bfloat16)
    dispatch = make_dispatch_jit(np.zeros((n, 1), np.int32), 1, 64)
    y_PF, pull = jax.vjp(
        lambda x_PD, w_EDF: grouped_matmul(x_PD, w_EDF, dispatch), ones((n, n)), ones((1, n, n))
    )
    for leg in (y_PF, *pull(ones((n, n)))):
        assert leg.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leg, n)


def test_gradients_match_finite_differences() -> None:
    x_MD, weights_MJ, weights = random_arrays(7, 2, 3)
    expert_MJ = random_experts(7, 2, 3)
    dispatch = make_dispatch_jit(expert_MJ, 3, 2)
    x_PD = gather_rows(x_MD, dispatch)

    @jax.jit
    def run(x_MD, weights_MJ, weights):
        return run_slot(x_MD, weights_MJ, weights, expert_MJ, 3, 2)

    # float32 differences: half the digits are left.
    tolerances = {"atol": 2e-2, "rtol": 2e-2, "eps": 1e-2}
    check_grads(run, (x_MD, weights_MJ, weights), order=1, modes=["rev"], **tolerances)
    multiply = jax.jit(lambda x_PD, w_EDF: grouped_matmul(x_PD, w_EDF, dispatch))
    check_grads(multiply, (x_PD, weights[0]), order=1, modes=["rev"], **tolerances)


def test_vmap_over_tokens_equals_a_loop() -> None:
    n_sequences, n_tokens = 3, 9
    x_MD, weights_MJ, weights = random_arrays(n_sequences * n_tokens, 2, 4)
    x_BTD = x_MD.reshape(n_sequences, n_tokens, WIDTH)
    weights_BTJ = weights_MJ.reshape(n_sequences, n_tokens, 2)
    # Sequences that use different numbers of blocks.
    expert_BTJ = random_experts(n_sequences * n_tokens, 2, 4).reshape(weights_BTJ.shape)
    expert_BTJ[1] = 0

    @jax.jit
    def one(x_TD, weights_TJ, expert_TJ):
        return run_slot(x_TD, weights_TJ, weights, expert_TJ, 4, 4)

    y_BTD = jax.jit(jax.vmap(one))(x_BTD, weights_BTJ, expert_BTJ)
    for index in range(n_sequences):
        y_TD = one(x_BTD[index], weights_BTJ[index], expert_BTJ[index])
        assert_close(y_BTD[index], y_TD, FLOAT32_ROUNDING)


def test_gradient_of_a_vmap_sums_over_shared_weights() -> None:
    x_MD, weights_MJ, weights = random_arrays(12, 2, 4)
    expert_MJ = random_experts(12, 2, 4)

    def loss(weights, batched):
        run = functools.partial(run_slot, n_experts=4, block=2)
        if batched:
            run = jax.vmap(run, in_axes=(0, 0, None, 0))
        shape = (3, 4, -1) if batched else (12, -1)
        arrays = [a.reshape(shape) for a in (x_MD, weights_MJ, expert_MJ)]
        return jnp.sum(run(arrays[0], arrays[1], weights, arrays[2]) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert_close(gradient(weights, True), gradient(weights, False), 10 * FLOAT32_ROUNDING)


def test_rematerialised_and_scanned_slots_have_the_same_gradient() -> None:
    x_MD, weights_MJ, weights = random_arrays(12, 2, 4)
    expert_MJ = random_experts(12, 2, 4)
    weights_of_slots = jax.tree.map(lambda w: jnp.stack([w, -w]), weights)

    def slot(x_MD, weights):
        return x_MD + run_slot(x_MD, weights_MJ, weights, expert_MJ, 4, 2), None

    def unrolled(weights_of_slots):
        y_MD = x_MD
        for index in range(2):
            own = jax.tree.map(lambda w, index=index: w[index], weights_of_slots)
            y_MD, _ = slot(y_MD, own)
        return jnp.sum(y_MD**2)

    def scanned(weights_of_slots):
        return jnp.sum(jax.lax.scan(jax.checkpoint(slot), x_MD, weights_of_slots)[0] ** 2)

    assert_close(
        jax.jit(jax.grad(scanned))(weights_of_slots),
        jax.jit(jax.grad(unrolled))(weights_of_slots),
        10 * FLOAT32_ROUNDING,
    )


# Which slot an expert sits in, and what else is installed, changes no bit.

# (tokens, choices, experts, width, hidden, block)
BATCH = (70, 2, 4, 192, 480, 16)
ONE_TOKEN = (1, 2, 3, 192, 480, 1)


def bit_case(n_tokens, n_choices, n_experts, width, hidden, block):
    arrays = random_arrays(n_tokens, n_choices, n_experts, width, hidden)
    return (*arrays, random_experts(n_tokens, n_choices, n_experts), n_experts, block)


def install(weights, slot_E, n_slots):
    """Put bodies into slots of a larger bank; all other slots hold NaN."""

    def put(w):
        bank = np.full((n_slots, *w.shape[1:]), np.nan, np.float32)
        bank[slot_E] = w
        return bank

    return jax.tree.map(put, weights)


@pytest.mark.parametrize(
    ("run", "sizes"),
    [(run_slot, BATCH), (run_slot, ONE_TOKEN), (run_slot_by_matmuls, BATCH)],
)
@pytest.mark.bits
def test_slot_order_and_dead_slots_change_no_bit(run, sizes) -> None:
    x_MD, weights_MJ, weights, expert_MJ, n_experts, block = bit_case(*sizes)
    run = jax.jit(run, static_argnums=(4, 5))
    y_MD = run(x_MD, weights_MJ, weights, expert_MJ, n_experts, block)
    for seed, n_slots in enumerate((n_experts, n_experts, 2 * n_experts + 3)):
        slot_E = np.random.default_rng(seed).permutation(n_slots)[:n_experts]
        bank = install(weights, slot_E, n_slots)
        y_moved_MD = run(x_MD, weights_MJ, bank, slot_E[expert_MJ], n_slots, block)
        np.testing.assert_array_equal(y_moved_MD, y_MD)


@pytest.mark.bits
def test_slot_order_and_dead_slots_change_no_bit_of_a_gradient() -> None:
    x_MD, weights_MJ, weights, expert_MJ, n_experts, block = bit_case(33, 3, 5, 16, 40, 4)
    evaluate = differentiate(run_slot)
    _, grads = evaluate(x_MD, weights_MJ, weights, expert_MJ, n_experts, block)
    slot_E = np.random.default_rng(8).permutation(9)[:n_experts]
    bank = install(weights, slot_E, 9)
    _, moved = evaluate(x_MD, weights_MJ, bank, slot_E[expert_MJ], 9, block)
    chex.assert_trees_all_equal(moved[:2], grads[:2])
    chex.assert_trees_all_equal(jax.tree.map(lambda w: w[slot_E], moved[2]), grads[2])


@pytest.mark.bits
def test_other_experts_tokens_change_no_bit() -> None:
    """A token's result stays when other tokens leave for a newly installed expert.

    Its rows then move up in their groups. That a product's row does not depend on the rows beside
    it is a property of the CPU's matrix product at a fixed block size, not a theorem: hence a test.
    """
    x_MD, weights_MJ, weights, expert_MJ, n_experts, block = bit_case(*BATCH)
    run = jax.jit(run_slot, static_argnums=(4, 5))
    y_MD = run(x_MD, weights_MJ, weights, expert_MJ, n_experts, block)
    leaves_M = np.random.default_rng(7).uniform(size=x_MD.shape[0]) < 0.4
    moved_MJ = expert_MJ.copy()
    moved_MJ[leaves_M, 0] = n_experts
    grown = jax.tree.map(lambda w: jnp.concatenate([w, -w[:1]]), weights)
    y_grown_MD = run(x_MD, weights_MJ, grown, moved_MJ, n_experts + 1, block)
    np.testing.assert_array_equal(y_grown_MD[~leaves_M], y_MD[~leaves_M])
    assert (y_grown_MD[leaves_M] != y_MD[leaves_M]).any(axis=1).all()


# Work in proportion to the rows that are really routed.


def count_block_runs(expert_MJ, n_experts, block, by=loop_blocks) -> int:
    """Return how often the function is run: for every block, or for every chunk of blocks."""
    runs = []
    dispatch = make_dispatch_jit(expert_MJ, n_experts, block)
    rows = jnp.ones((dispatch.choice_P.shape[0], WIDTH))

    def fn(rows, weights):
        jax.debug.callback(lambda: runs.append(1))
        return (rows[0] @ weights[0],), ()

    run = jax.jit(lambda rows, w_EDF, dispatch: by(fn, (rows,), (w_EDF,), dispatch))
    run(rows, jnp.ones((n_experts, WIDTH, HIDDEN)), dispatch)
    jax.effects_barrier()
    return len(runs)


@pytest.mark.parametrize("n_experts", [2, 32])
def test_blocks_run_follow_the_routing_not_the_number_of_experts(n_experts: int) -> None:
    expert_MJ = np.tile([[0, n_experts - 1]], (20, 1))
    assert count_block_runs(expert_MJ, n_experts, 8) == 6
    expert_MJ[5:] = -1
    assert count_block_runs(expert_MJ, n_experts, 8) == 2


def test_chunks_of_blocks_that_hold_nothing_are_not_run() -> None:
    expert_MJ = np.full((128, 4), -1)
    expert_MJ[:, 0] = np.arange(128) % 2  # one choice in four has an expert
    # 65 blocks of 8 rows, of which 16 are in use, in 8 chunks of 9.
    assert count_block_runs(expert_MJ, 2, 8, batch_blocks) == 2
    assert count_block_runs(np.tile([0, 1, 0, 1], (128, 1)), 2, 8, batch_blocks) == 8


def lower(fn, *args):
    """Trace `fn`. The floating point operations of the result count the body of a loop once."""
    return jax.jit(fn).lower(*args)


def flops_when_compiled(lowered) -> float:
    """As above, of what is left after the compiler has removed unused values."""
    return lowered.compile().cost_analysis()["flops"]


def test_work_per_block_does_not_grow_with_experts() -> None:
    def flops_of(swiglu, n_experts: int) -> float:
        _, _, weights = random_arrays(1, 1, n_experts)
        dispatch = make_dispatch_jit(np.zeros((64, 2), np.int32), n_experts, 8)
        x_PD = jnp.zeros((dispatch.choice_P.shape[0], WIDTH))
        return lower(swiglu, x_PD, *weights, dispatch).cost_analysis()["flops"]

    assert flops_of(grouped_swiglu, 32) == flops_of(grouped_swiglu, 2)
    assert flops_of(reference.grouped_swiglu, 32) > 16 * flops_of(reference.grouped_swiglu, 2)


@pytest.mark.parametrize(
    ("run", "products", "products_frozen"),
    [(run_slot, 9, 6), (run_slot_by_matmuls, 9, 6)],
)
def test_frozen_experts_cost_no_weight_gradient(run, products, products_frozen) -> None:
    width, hidden, block = 64, 96, 8
    x_MD, weights_MJ, weights = random_arrays(16, 2, 2, width, hidden)
    expert_MJ = jnp.zeros((16, 2), jnp.int32)

    def loss(x_MD, weights):
        return jnp.sum(jnp.sin(run(x_MD, weights_MJ, weights, expert_MJ, 2, block)))

    one_product = 2 * block * width * hidden
    everything = lower(jax.grad(loss, argnums=(0, 1)), x_MD, weights)
    frozen = lower(jax.grad(loss), x_MD, weights)
    # Elementwise work comes on top: less than two products' worth at this width.
    assert products <= flops_when_compiled(everything) / one_product < products + 2
    assert products_frozen <= flops_when_compiled(frozen) / one_product < products_frozen + 2


def test_routing_changes_compile_nothing() -> None:
    x_MD, weights_MJ, weights = random_arrays(16, 2, 4)
    traced = chex.assert_max_traces(
        lambda expert_MJ: run_slot(x_MD, weights_MJ, weights, expert_MJ, 4, 4), n=1
    )
    run = jax.jit(traced)
    for seed in range(4):
        run(random_experts(16, 2, 4, seed))
    run(jnp.zeros((16, 2), jnp.int32))


def test_batched_blocks_equal_the_loop(monkeypatch) -> None:
    """The path of other platforms, run here: one block at a time, ragged chunks, all at once."""
    x_MD, _, weights = random_arrays(21, 2, 4)
    # 14 blocks, of which one is not in use; some rows are padding; no row is expert 2's.
    expert_MJ = ROUTES["random, some nowhere"](np.random.default_rng(1), 4, (21, 2))
    expert_MJ[expert_MJ == 2] = 1
    dispatch = make_dispatch_jit(expert_MJ, 4, 4)
    x_PD = gather_rows(x_MD, dispatch)

    def fn(rows, weights):
        (x_PD,), (w_DF,) = rows, weights
        y_PF = x_PD @ w_DF
        return (y_PF, x_PD + 1), (jnp.einsum("pd,pf->df", x_PD, y_PF), jnp.sum(x_PD))

    def run(by):
        return jax.jit(lambda x_PD: by(fn, (x_PD,), weights[:1], dispatch))(x_PD)

    expected = run(loop_blocks)
    assert (np.asarray(expected[0][1]) != 0).any()
    for gathered_bytes in (1, 4000, 1 << 28):
        monkeypatch.setattr("composable.kernels.blocks._GATHERED_BYTES", gathered_bytes)
        assert_close(run(batch_blocks), expected, 10 * FLOAT32_ROUNDING)


def test_mismatched_shapes_are_refused() -> None:
    dispatch = make_dispatch_jit(np.zeros((3, 2), np.int32), 2, 2)
    x_PD = jnp.ones((dispatch.choice_P.shape[0], 4))
    with pytest.raises(AssertionError):
        grouped_matmul(x_PD, jnp.ones((3, 4, 5)), dispatch)
    with pytest.raises(AssertionError):
        grouped_matmul(x_PD[1:], jnp.ones((2, 4, 5)), dispatch)
    with pytest.raises(AssertionError):
        grouped_swiglu(x_PD, *[jnp.ones((2, 4, 5))] * 3, dispatch)
