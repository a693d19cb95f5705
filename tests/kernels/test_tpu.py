"""The kernel of TPUs: equal to the loop under interpretation, one read per matrix, isolation."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.kernels import (
    gather_rows,
    grouped_matmul,
    grouped_swiglu,
    make_dispatch,
    reference,
    tpu,
)
from composable.kernels.blocks import loop_blocks
from composable.kernels.grouped_swiglu import _stream_backward, _stream_body
from tests.support.kernel_transfers import (
    count_rows,
    count_transfers,
    counted_copies,
    interpreted_kernels,
    total_bytes,
)
from tests.support.traces import trace_apart

pytestmark = pytest.mark.slow

# Sums of hundreds of products in float32, in another order; relative to the largest entry.
FLOAT32_ROUNDING = 1e-5
# Bytes for the blocks of a kernel: all fits, or matrices are cut into tiles of 128 columns.
BUDGETS = {"whole": tpu._BLOCK_BYTES, "in pieces": 48 << 10}
WIDTH, HIDDEN, EXPERTS, BLOCK = 136, 300, 5, 8


@pytest.fixture(params=BUDGETS)
def pieces(request, monkeypatch):
    monkeypatch.setattr(tpu, "_BLOCK_BYTES", BUDGETS[request.param])
    return request.param


@pytest.fixture
def on_tpu(monkeypatch):
    """Run what a program compiled for a TPU runs, its kernels interpreted."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, **others: tpu(*args))
    with interpreted_kernels() as kernels, trace_apart(object()):
        yield
    assert kernels.called


# Compiled whole: run one by one, their operations would be a hundred programs.
dispatch_of = jax.jit(make_dispatch, static_argnums=(1, 2))
gather = jax.jit(gather_rows)


@functools.cache
def make_case():
    """Return rows, bodies and dispatch; expert 4 has no row, and some choices no expert."""
    rng = np.random.default_rng(0)
    expert_MJ = rng.integers(-1, EXPERTS - 1, (24, 2)).astype(np.int32)
    shapes = ((24, WIDTH), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN))
    x_MD, w_gate_EDF, w_up_EDF, w_down_EFD = (
        jnp.asarray((rng.normal(size=shape) / shape[-2] ** 0.5).astype(np.float32))
        for shape in (*shapes, (EXPERTS, HIDDEN, WIDTH))
    )
    dispatch = dispatch_of(expert_MJ, EXPERTS, BLOCK)
    return gather(x_MD, dispatch), (w_gate_EDF, w_up_EDF, w_down_EFD), dispatch


def value_and_gradients(fn, x_PD, weights, dispatch):
    def loss(x_PD, weights):
        y_P = fn(x_PD, *weights, dispatch)
        return jnp.sum(jnp.sin(y_P)), y_P

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x_PD, weights)


def assert_close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        tolerance = FLOAT32_ROUNDING * np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["grouped_swiglu", "grouped_matmul"])
def test_values_and_gradients_match_the_reference(pieces, on_tpu, name):
    x_PD, weights, dispatch = make_case()
    fn, expected = {
        "grouped_swiglu": (grouped_swiglu, reference.grouped_swiglu),
        "grouped_matmul": (grouped_matmul, reference.grouped_matmul),
    }[name]
    weights = weights if name == "grouped_swiglu" else weights[:1]
    assert_close(
        value_and_gradients(fn, x_PD, weights, dispatch),
        value_and_gradients(expected, x_PD, weights, dispatch),
    )


def test_a_batch_without_any_expert_is_zero(on_tpu):
    x_PD, weights, _ = make_case()
    dispatch = dispatch_of(np.full((24, 2), -1, np.int32), EXPERTS, BLOCK)
    (_, y_PD), gradients = value_and_gradients(grouped_swiglu, x_PD, weights, dispatch)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((y_PD, gradients)))


@pytest.mark.bits
@pytest.mark.parametrize("is_trained", [False, True])
def test_the_entry_of_an_expert_and_what_others_hold_change_no_bit(on_tpu, is_trained):
    """Entries move, and the other entries of a larger bank hold NaN."""
    x_PD, weights, dispatch = make_case()

    def run(x_PD, weights, dispatch):
        if is_trained:
            return value_and_gradients(grouped_swiglu, x_PD, weights, dispatch)[0][1]
        return jax.jit(lambda x_PD: grouped_swiglu(x_PD, *weights, dispatch))(x_PD)

    y_PD = run(x_PD, weights, dispatch)
    expert_MJ = np.random.default_rng(0).integers(-1, EXPERTS - 1, (24, 2))
    moved_E = np.array([6, 2, 7, 0, 5])
    bank = tuple(jnp.full((9, *w.shape[1:]), jnp.nan).at[moved_E].set(w) for w in weights)
    moved = dispatch_of(np.where(expert_MJ < 0, -1, moved_E[expert_MJ]), 9, BLOCK)
    x_MD = jnp.take(x_PD, dispatch.position_MJ.min(axis=1), axis=0, mode="fill", fill_value=0)
    y_moved_PD = run(gather(x_MD, moved), bank, moved)

    def by_token(y_PD, dispatch):
        return jnp.take(y_PD, dispatch.position_MJ, axis=0, mode="fill", fill_value=0)

    np.testing.assert_array_equal(by_token(y_moved_PD, moved), by_token(y_PD, dispatch))


def run_body(x_PD, weights, dispatch):
    """Run the forward pass of a body as a TPU does."""
    ((y_PD,), _) = _stream_body(tpu, (x_PD,), weights, dispatch)
    return y_PD


def make_bank(width):
    """Return random bodies."""
    rng = np.random.default_rng(1)
    shapes = ((EXPERTS, width, HIDDEN), (EXPERTS, width, HIDDEN), (EXPERTS, HIDDEN, width))
    return tuple(
        jnp.asarray(rng.normal(size=shape) / shape[1] ** 0.5, jnp.float32) for shape in shapes
    )


# Bytes for the blocks of a kernel: one tile and one chunk of rows, or tiles of 128 hidden units, of
# which the last is not full, beside all rows of an expert or one block.
MEMORIES = {"whole": 4 << 20, "tiles": 2 << 20, "tiles and chunks": 432 << 10}


@pytest.mark.parametrize("width", [128, WIDTH])  # the down matrix as it is, and transposed
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("block", [1, 4, 8, 16, 64])
def test_sums_over_tiles_match_the_reference(monkeypatch, memory, block, width):
    """Padding aside, which nobody reads, also where every group's last rows are few."""
    monkeypatch.setattr(tpu, "_BLOCK_BYTES", MEMORIES[memory])
    rng = np.random.default_rng(0)
    expert_MJ = rng.choice([-1, 0, 1, 3], (150, 1), p=[0.1, 0.1, 0.1, 0.7]).astype(np.int32)
    dispatch = dispatch_of(expert_MJ, EXPERTS, block)
    x_PD = gather(jnp.asarray(rng.normal(size=(150, width)), jnp.float32), dispatch)
    weights = make_bank(width)
    with interpreted_kernels() as kernels, counted_copies() as copies, trace_apart(object()):
        y_PD = jax.jit(run_body)(x_PD, weights, dispatch)
    assert kernels.call_count == 1
    assert_close(y_PD, reference.grouped_swiglu(x_PD, *weights, dispatch))
    ((x, *matrices, y),) = count_transfers(run_body, x_PD, weights, dispatch)
    assert copies == {(block, width): x.copies + y.copies}
    tiles_of_experts = matrices[0].copies / 3  # that have rows
    assert (tiles_of_experts == 1) == (memory == "whole")
    assert (tiles_of_experts > 3) == (memory == "tiles and chunks")


@pytest.mark.parametrize("memory", ["whole", "tiles"])
def test_each_matrix_in_use_is_read_once(monkeypatch, memory):
    monkeypatch.setattr(tpu, "_BLOCK_BYTES", MEMORIES[memory])
    x_PD, weights, dispatch = make_case()
    ((x, *matrices, y),) = count_transfers(run_body, x_PD, weights, dispatch)
    n_experts_used, n_blocks = 4, dispatch.expert_Y.shape[0]
    assert int(dispatch.n_blocks_used) < n_blocks, "no block to skip"
    for transfer in matrices:
        assert transfer.bytes == n_experts_used * weights[0][0].nbytes
        assert transfer.copies == n_experts_used * {"whole": 1, "tiles": 3}[memory]
    assert x.copies == int(dispatch.n_blocks_used)
    assert y.copies == n_blocks
    assert y.bytes == x_PD.nbytes


@pytest.mark.parametrize("n_choices", [1, 2])
@pytest.mark.parametrize("n_experts", [8, 64])
def test_a_body_too_large_for_the_chip_moves_its_matrices_and_rows_alone(n_experts, n_choices):
    """Three matrices of 2,048 by 8,192 for each expert, and 8,192 tokens."""
    n_tokens, width, hidden = 8192, 2048, 8192
    rng = np.random.default_rng(0)
    expert_MJ = np.argsort(rng.random((n_tokens, n_experts)), axis=1)[:, :n_choices]
    dispatch = dispatch_of(expert_MJ.astype(np.int32), n_experts, 64)
    x_PD = jnp.zeros((dispatch.choice_P.size, width), jnp.bfloat16)
    sizes = ((width, hidden), (width, hidden), (hidden, width))
    bank = tuple(jax.ShapeDtypeStruct((n_experts, *size), jnp.bfloat16) for size in sizes)
    n_routed = n_tokens * n_choices
    needed = 2 * (n_experts * 3 * width * hidden + 2 * n_routed * width)
    assert total_bytes(count_transfers(run_body, x_PD, bank, dispatch)) < 1.2 * needed
    assert count_rows(run_body, x_PD, bank, dispatch) < 1.1 * n_routed


def test_rows_are_shared_out_with_little_padding():
    heights = (256, 128, 64, 32, 16)
    for n_rows in (0, 1, 16, 17, 64, 65, 128, 129, 192, 193, 255, 256, 257, 700):
        shares = [(height, int(n)) for height, n in tpu.share_out(n_rows, heights)]
        multiplied = sum(height * n for height, n in shares)
        last = min((height for height, n in shares if n), default=0)
        assert n_rows <= multiplied < n_rows + max(16, last // 2)
        assert dict(shares)[256] == n_rows // 256
        assert multiplied <= -(-n_rows // 256) * 256


def test_in_pieces_each_matrix_is_still_read_once_and_written_once(monkeypatch):
    monkeypatch.setattr(tpu, "_BLOCK_BYTES", BUDGETS["in pieces"])
    x_PD, weights, dispatch = make_case()
    hidden_PF = jnp.zeros((x_PD.shape[0], HIDDEN))
    rows = (x_PD, hidden_PF, hidden_PF, x_PD)
    kernels = count_transfers(_stream_backward, tpu, rows, weights, dispatch)
    of_matrices = [t for kernel in kernels for t in kernel if t.shape[0] == EXPERTS]
    assert len(kernels) == 4
    assert len(of_matrices) == 6  # three are read, three gradients are written
    for transfer in of_matrices:
        assert transfer.bytes == weights[0][0].nbytes * 4
        assert transfer.copies > 4, "not cut"


def test_a_program_for_tpus_holds_kernels_and_no_copy_of_weights():
    """Lowered for a TPU, which needs no TPU compiler: that part is tests/interop/test_tpu.py."""
    x_PD, weights, dispatch = make_case()
    traced = jax.jit(jax.grad(lambda x, w: grouped_swiglu(x, *w, dispatch).sum(), argnums=(0, 1)))
    text = traced.trace(x_PD, weights).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2  # forward and backward
    assert "stablehlo.while" not in text
    n_blocks = dispatch.expert_Y.shape[0]
    assert f"tensor<{n_blocks}x{WIDTH}x{HIDDEN}xf32>" not in text


def test_the_declared_cost_is_that_of_the_blocks():
    x_PD, weights, dispatch = make_case()
    traced = jax.jit(grouped_swiglu).trace(x_PD, *weights, dispatch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    declared = int(re.search(r"flops\\22: *(\d+)", text)[1])
    products = 3 * 2 * x_PD.shape[0] * WIDTH * HIDDEN
    assert products <= declared < 1.02 * products  # the rest is elementwise


def test_vmap_runs_one_member_after_the_other(on_tpu):
    x_PD, weights, dispatch = make_case()
    both = jnp.stack([x_PD, 2 * x_PD])
    found = jax.vmap(lambda x_PD: grouped_swiglu(x_PD, *weights, dispatch))(both)
    expected = jnp.stack([grouped_swiglu(x_PD, *weights, dispatch) for x_PD in both])
    chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_the_kernel_equals_the_loop():
    x_PD, weights, dispatch = make_case()

    def fn(rows, weights):
        (x_PD,), (w_DF,) = rows, weights
        y_PF = x_PD @ w_DF
        return (y_PF, x_PD + 1), (jnp.einsum("pd,pf->df", x_PD, y_PF),)

    def run(by):
        return jax.jit(lambda x_PD: by(fn, (x_PD,), weights[:1], dispatch))(x_PD)

    with interpreted_kernels():
        found = run(tpu.stream_blocks)
    assert_close(found, run(loop_blocks))
