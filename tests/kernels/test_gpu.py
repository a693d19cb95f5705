"""The kernels of GPUs, interpreted: equal to the reference, isolation, no copy of weights."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.kernels import (
    count_blocks,
    gather_rows,
    gpu,
    grouped_changed_swiglu,
    grouped_matmul,
    grouped_swiglu,
    make_dispatch,
    reference,
)
from composable.kernels.block_functions import product
from composable.kernels.blocks import loop_blocks
from composable.kernels.grouped_matmul import _stream_multiply, _stream_outer_product
from tests.support.gpu_work import Counted
from tests.support.kernel_transfers import interpreted_kernels
from tests.support.traces import trace_apart

pytestmark = pytest.mark.slow

# Relative to the largest entry: sums of hundreds of products in another order; in bfloat16, results
# and hidden activations are rounded to 8 bits.
ROUNDING = {"float32": 1e-5, "bfloat16": 2e-2}
# Tiles, chunks and spans that are filled and such that are not.
WIDTH, HIDDEN, EXPERTS, BLOCK, TOKENS = 72, 176, 5, 16, 48


@pytest.fixture
def on_gpu(monkeypatch):
    """Run what a program compiled for CUDA runs, its kernels interpreted."""

    def run(*args, default, cuda=None, **others):
        return (cuda or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", run)
    with interpreted_kernels() as kernels, trace_apart(object()):
        yield kernels
    assert kernels.called


def choose_experts(seed=0):
    """Return the choices: none of expert 4, some of no expert."""
    return np.random.default_rng(seed).integers(-1, EXPERTS - 1, (TOKENS, 2)).astype(np.int32)


# Compiled whole: run one by one, their operations would be a hundred programs.
dispatch_of = jax.jit(make_dispatch, static_argnums=(1, 2))
gather = jax.jit(gather_rows)
swiglu_by_reference = jax.jit(reference.grouped_swiglu)


@functools.cache
def make_case(dtype="float32", block=BLOCK):
    """Return rows, bodies and dispatch."""
    rng = np.random.default_rng(0)
    shapes = [(TOKENS, WIDTH), *[(EXPERTS, WIDTH, HIDDEN)] * 2, (EXPERTS, HIDDEN, WIDTH)]
    x_MD, *weights = (
        jnp.asarray((rng.normal(size=shape) / shape[-2] ** 0.5).astype(dtype)) for shape in shapes
    )
    dispatch = dispatch_of(choose_experts(), EXPERTS, block)
    return gather(x_MD, dispatch), tuple(weights), dispatch


def value_and_gradients(fn, x_PD, weights, dispatch):
    def loss(x_PD, weights):
        y_P = fn(x_PD, *weights, dispatch)
        return jnp.sum(jnp.sin(y_P.astype(jnp.float32))), y_P

    (_, y_P), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        x_PD, weights
    )
    return y_P, gradients


def assert_close(found, expected, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", ["grouped_swiglu", "grouped_matmul"])
def test_values_and_gradients_match_the_reference(on_gpu, name, dtype):
    x_PD, weights, dispatch = make_case(dtype)
    assert int(dispatch.n_blocks_used) < dispatch.expert_Y.shape[0], "no block to skip"
    fn, expected = {
        "grouped_swiglu": (grouped_swiglu, reference.grouped_swiglu),
        "grouped_matmul": (grouped_matmul, reference.grouped_matmul),
    }[name]
    weights = weights if name == "grouped_swiglu" else weights[:1]
    found = value_and_gradients(fn, x_PD, weights, dispatch)
    assert_close(found, value_and_gradients(expected, x_PD, weights, dispatch), ROUNDING[dtype])


@pytest.mark.parametrize("block", [1, 3, 64])
def test_blocks_of_any_size(on_gpu, block):
    x_PD, weights, dispatch = make_case(block=block)
    found = jax.jit(grouped_swiglu)(x_PD, *weights, dispatch)
    assert_close(found, swiglu_by_reference(x_PD, *weights, dispatch), ROUNDING["float32"])


def test_changes_of_a_shared_body(on_gpu):
    """Its products read the shared matrices and the factors by other tables of the same blocks."""
    rng = np.random.default_rng(1)
    _, weights, _ = make_case()
    names, rank = ("w_gate", "w_up", "w_down"), 4
    shared = {name: np.asarray(w)[:1] for name, w in zip(names, weights, strict=True)}
    changes = {
        name: tuple(
            (rng.normal(size=shape) * (np.arange(4) > 0)[:, None, None]).astype(np.float32)
            for shape in ((4, w.shape[1], rank), (4, rank, w.shape[2]))
        )
        for name, w in shared.items()
    }
    dispatch = dispatch_of(choose_experts(), 4, BLOCK)
    x_PD = gather(rng.normal(size=(TOKENS, WIDTH)).astype(np.float32), dispatch)
    found = jax.jit(grouped_changed_swiglu)(x_PD, shared, changes, dispatch)
    merged = (shared[name] + a @ b for name, (a, b) in changes.items())
    expected = swiglu_by_reference(x_PD, *merged, dispatch)
    assert_close(found, expected, ROUNDING["float32"])


def test_a_batch_without_any_expert_is_zero(on_gpu):
    x_PD, weights, _ = make_case()
    dispatch = dispatch_of(np.full((TOKENS, 2), -1, np.int32), EXPERTS, BLOCK)
    found = value_and_gradients(grouped_swiglu, x_PD, weights, dispatch)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found))


@pytest.mark.bits
def test_the_entry_of_an_expert_and_what_others_hold_change_no_bit(on_gpu):
    """Entries move, the other entries of a larger bank hold NaN, as do rows of no block in use."""
    x_PD, weights, dispatch = make_case()
    y_PD = jax.jit(grouped_swiglu)(x_PD, *weights, dispatch)
    moved_E, expert_MJ = np.array([6, 2, 7, 0, 5]), choose_experts()
    bank = tuple(jnp.full((9, *w.shape[1:]), jnp.nan).at[moved_E].set(w) for w in weights)
    moved = dispatch_of(np.where(expert_MJ < 0, -1, moved_E[expert_MJ]), 9, BLOCK)
    x_MD = jnp.take(x_PD, dispatch.position_MJ.min(axis=1), axis=0, mode="fill", fill_value=0)
    x_moved_PD = gather(x_MD, moved).at[int(moved.n_blocks_used) * BLOCK :].set(jnp.nan)
    y_moved_PD = jax.jit(grouped_swiglu)(x_moved_PD, *bank, moved)

    def by_token(y_PD, dispatch):
        return jnp.take(y_PD, dispatch.position_MJ, axis=0, mode="fill", fill_value=0)

    np.testing.assert_array_equal(by_token(y_moved_PD, moved), by_token(y_PD, dispatch))


@pytest.mark.bits
def test_a_row_does_not_depend_on_the_rows_of_others(on_gpu):
    x_PD, weights, dispatch = make_case()
    mine_P = np.isin(np.asarray(dispatch.token_P), [3, 17])
    others_PD = jnp.where(mine_P[:, None], x_PD, 100 * x_PD[::-1])
    y_PD, y_others_PD = (jax.jit(grouped_swiglu)(x, *weights, dispatch) for x in (x_PD, others_PD))
    np.testing.assert_array_equal(y_PD[mine_P], y_others_PD[mine_P])
    assert not np.array_equal(y_PD, y_others_PD)


def test_vmap_runs_one_member_after_the_other(on_gpu):
    x_PD, weights, dispatch = make_case()
    both = jnp.stack([x_PD, 2 * x_PD])
    found = jax.vmap(lambda x_PD: grouped_matmul(x_PD, weights[0], dispatch))(both)
    expected = jnp.stack([grouped_matmul(x_PD, weights[0], dispatch) for x_PD in both])
    chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_the_kernel_equals_the_loop():
    """A function of products and of rows themselves, and one of sums."""
    x_PD, weights, dispatch = make_case()
    z_PF = jnp.ones((len(x_PD), HIDDEN)).at[::2].set(3.0)

    def multiply(rows, weights):
        (x_PD, z_PF), (w_DF,) = rows, weights
        y_PF = product("PD,DF->PF", x_PD, w_DF)
        return (y_PF * z_PF.astype(jnp.float32), y_PF), ()

    def add_up(rows, weights):
        x_PD, z_PF = rows
        return (), (product("PD,PF->DF", x_PD, z_PF),)

    for fn, own in ((multiply, weights[:1]), (add_up, ())):

        def run(by, fn=fn, own=own):
            return jax.jit(lambda *rows: by(fn, rows, own, dispatch))(x_PD, z_PF)

        with interpreted_kernels():
            found = run(gpu.stream_blocks)
        assert_close(found, run(loop_blocks), ROUNDING["float32"])


# Tokens, experts, rows per block, and the share of choices that are of no expert.
ROUTINGS = [(200, 7, 4, 0.1), (200, 7, 16, 0.9), (64, 1, 2, 0.5), (6, 40, 1, 0.0), (9, 3, 1, 1.0)]


def route(n_tokens, n_experts, block, share):
    rng = np.random.default_rng(2)
    expert_MJ = rng.integers(0, n_experts, (n_tokens, 2)).astype(np.int32)
    expert_MJ[rng.random(expert_MJ.shape) < share] = -1
    return dispatch_of(expert_MJ, n_experts, block)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_spans_hold_every_row_once_and_one_expert_each(routing):
    dispatch = route(*routing)
    spans, block = gpu.make_spans(dispatch), dispatch.block
    n_used = int(dispatch.n_blocks_used) * block
    expert_P = np.repeat(np.asarray(dispatch.expert_Y), block)
    expert_P[n_used:] = dispatch.n_experts
    found_P = np.full_like(expert_P, -1)
    for expert, begin, end in zip(spans.expert_Z, spans.begin_Z, spans.end_Z, strict=True):
        assert end - begin <= spans.size
        assert (found_P[int(begin) : int(end)] == -1).all()
        found_P[int(begin) : int(end)] = expert
    np.testing.assert_array_equal(found_P, expert_P)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_programs_of_one_tile_of_weights_follow_each_other(routing):
    """Up to the number of spans that take turns; and each tile of each span is computed once."""
    dispatch = route(*routing)
    n_tiles, spans = 3, gpu.make_spans(dispatch)
    programs = jnp.arange(len(spans.expert_Z) * n_tiles)
    find = functools.partial(gpu.find_span_and_tile, n_tiles=n_tiles)
    found = jax.vmap(lambda p: find(p, turn_Z=spans.turn_Z, turns_Z=spans.turns_Z))(programs)
    span, tile = map(np.asarray, found)
    assert len({*zip(span.tolist(), tile.tolist(), strict=True)}) == len(programs)
    expert = np.asarray(spans.expert_Z)[span]
    reads = 1 + ((expert[1:] != expert[:-1]) | (tile[1:] != tile[:-1])).sum()
    in_use, counts = np.unique(np.asarray(spans.expert_Z), return_counts=True)
    turns = -(-counts // gpu._TILES_IN_TURN)
    turns[in_use == dispatch.n_experts] = counts[in_use == dispatch.n_experts]
    assert reads == turns.sum() * n_tiles


def test_a_program_for_cuda_holds_kernels_and_no_copy_of_weights():
    """Lowered, which needs no CUDA compiler: that part is `test_gpu_compiler.py`."""
    x_PD, weights, dispatch = make_case()
    traced = jax.jit(jax.grad(lambda x, w: grouped_swiglu(x, *w, dispatch).sum(), argnums=(0, 1)))
    text = traced.trace(x_PD, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 6  # forward without the output, 2; backward, 4
    n_blocks = dispatch.expert_Y.shape[0]
    assert n_blocks == count_blocks(2 * TOKENS, EXPERTS, BLOCK)
    assert f"x{WIDTH}x{HIDDEN}xf32>" in text
    assert f"tensor<{n_blocks}x{WIDTH}x{HIDDEN}xf32>" not in text


@pytest.mark.parametrize(("n_down", "n_across"), [(40, 3), (5, 70), (1, 1)])
def test_programs_of_sums_compute_each_tile_once_in_squares(n_down, n_across):
    programs = jnp.arange(2 * n_down * n_across, dtype=jnp.int32)
    order = gpu.find_expert_and_tiles(programs, n_down, n_across)
    found = list(zip(*(np.asarray(part).tolist() for part in order), strict=True))
    assert sorted(found) == list(np.ndindex(2, n_down, n_across))
    side = min(n_down, gpu._TILES_IN_TURN)
    first = found[: side * min(n_across, 8)]
    assert len({down for _, down, _ in first}) == side
    assert len({across for _, _, across in first}) == min(n_across, 8)


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("experts", [8, 64])
def test_products_are_within_a_tenth_of_those_of_the_routed_rows(experts, choices):
    """The rows of an expert are padded to 16, not to a block, also where they are summed over."""
    n_tokens, width = 8192, 128
    rng = np.random.default_rng(0)
    expert_MJ = np.argsort(rng.random((n_tokens, experts)), axis=1)[:, :choices].astype(np.int32)
    dispatch = dispatch_of(expert_MJ, experts, 64)
    x_PD = jax.ShapeDtypeStruct((dispatch.choice_P.size, width), jnp.bfloat16)
    w_EDF = jax.ShapeDtypeStruct((experts, width, width), jnp.bfloat16)
    chip = Counted(cores=132, cache=25 << 20)
    _stream_multiply(chip, (x_PD,), (w_EDF,), dispatch)
    _stream_outer_product(chip, (x_PD, x_PD), (), dispatch)
    routed = 2 * 2 * n_tokens * choices * width * width
    assert 1 <= chip.flops / routed < 1.1
