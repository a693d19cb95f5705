import functools
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composable.kernels import (
    native,
    native_attention,
    native_attention_gradient,
    native_cached_attention,
    native_orthogonalize,
    native_scout_loss,
    native_swiglu,
)
from composable.model.causal_attention import causal_attention
from composable.model.layers import CACHE_BLOCK, _attend_by_blocks, changed_swiglu, swiglu
from composable.model.scout import Scout, class_log_probs
from composable.parallel import make_mesh
from composable.training.objectives import scout_loss
from composable.training.optimizers import MUON_COEFFICIENTS, _orthogonalize
from tests.support.traces import trace_apart

# Sums in another order, relative to the largest number, or to one.
REORDERED_SUMS = 5e-6
# Rows, positions, heads, key heads and width: below, at and above a tile of queries, uneven, and
# widths below and above what a product is wide.
ATTENTION = [(2, 1, 2, 1, 16), (1, 31, 3, 3, 32), (2, 32, 4, 2, 64), (1, 133, 4, 2, 128)]
# Tokens, width, hidden units and rank, of blocks of SwiGLU.
SWIGLU = [(1, 8, 16, 1), (32, 24, 64, 4), (75, 16, 80, 16), (130, 40, 208, 21)]
# Tokens, features, hidden units and classes: fewer than a vector, uneven, more than are done at a
# time, and in more than one piece.
SCOUTS = [(1, 3, 16, 5), (47, 24, 64, 257), (100, 33, 80, 64), (700, 32, 48, 130)]


@pytest.fixture(autouse=True)
def loaded():
    if not native.load_native().is_loaded:
        pytest.skip(native.load_native().reason)


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def assert_close(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=REORDERED_SUMS * max(1, np.abs(y).max()))


@pytest.mark.parametrize("sizes", ATTENTION, ids=str)
def test_attention_and_its_gradient_are_those_of_the_portable_path(sizes):
    batch, n_tokens, n_heads, n_kv, width = sizes
    queries, keys = (batch, n_tokens, n_heads, width), (batch, n_tokens, n_kv, width)
    q, k, v, dy = draw(queries, keys, keys, queries)
    # Scores far from zero: what a softmax subtracts matters.
    q = 3 * q
    y, log = jax.jit(native_attention)(q, k, v)
    expected, pull = jax.vjp(causal_attention, q, k, v)
    assert_close(y, expected)
    assert_close(jax.jit(native_attention_gradient)(q, k, v, y, log, dy), pull(dy))


@pytest.mark.parametrize("sizes", ATTENTION, ids=str)
@pytest.mark.parametrize("first", [0, 7, 250])
def test_attention_to_a_cache_is_that_of_the_portable_path(sizes, first):
    batch, n_tokens, n_heads, n_kv, width = sizes
    cached = (batch, n_kv, 3 * CACHE_BLOCK, width)
    q, k, v = draw((batch, n_tokens, n_heads, width), cached, cached)
    found = jax.jit(native_cached_attention)(3 * q, k, v, first)
    expected = jax.jit(_attend_by_blocks)(3 * q, k, v, first + jnp.arange(n_tokens))
    assert_close(found, expected)


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_what_a_cache_holds_beyond_the_queries_changes_no_bit(n_tokens):
    """Nor does its room, nor a padded token after these."""
    q, k, v = draw((1, n_tokens + 1, 4, 32), (1, 2, 200, 32), (1, 2, 200, 32))
    first, end = 20, 20 + n_tokens
    attend = jax.jit(native_cached_attention)
    found = attend(q[:, :-1], k, v, first)
    others = [x.at[:, :, end:].set(1e3) for x in (k, v)]
    np.testing.assert_array_equal(found, attend(q[:, :-1], *others, first))
    np.testing.assert_array_equal(found, attend(q[:, :-1], k[:, :, :end], v[:, :, :end], first))
    if n_tokens > 1:  # a single one is summed in another order
        np.testing.assert_array_equal(found, attend(q, k, v, first)[:, :-1])


def test_positions_beyond_a_cache_are_refused():
    q, k = draw((1, 2, 4, 32), (1, 2, 9, 32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="not in the cache"):
        jax.block_until_ready(jax.jit(native_cached_attention)(q, k, k, 8))


@pytest.mark.parametrize("sizes", SWIGLU, ids=str)
@pytest.mark.parametrize("is_low_rank", [True, False])
def test_a_block_and_its_gradient_are_those_of_its_definition(sizes, is_low_rank):
    n_tokens, d, f, rank = sizes
    shapes = {"w_gate": (d, f), "w_up": (d, f), "w_down": (f, d)}
    x, dy, *weights = draw((n_tokens, d), (n_tokens, d), *shapes.values())
    matrices = dict(zip(shapes, weights, strict=True))
    changes = {
        name: tuple(draw((rows, rank), (rank, columns))) for name, (rows, columns) in shapes.items()
    }
    if is_low_rank:
        found, pull = jax.vjp(lambda x, c: native_swiglu(x, matrices, c, kept=""), x, changes)
        expected, pull_plain = jax.vjp(lambda x, c: changed_swiglu(x, matrices, c), x, changes)
    else:
        found, pull = jax.vjp(partial(native_swiglu, kept=""), x, matrices)
        expected, pull_plain = jax.vjp(lambda x, m: swiglu(x, *map(m.get, shapes)), x, matrices)
    assert_close(found, expected)
    assert_close(pull(dy), pull_plain(dy))


def draw_scout(n_tokens, d, width, n_classes):
    """Return features, weights and classes of tokens, some of which repeat."""
    arrays = draw((n_tokens, d), (d, width), (width,), (width, n_classes), (n_classes,))
    return *arrays, jnp.arange(n_tokens) ** 2 % n_classes


@pytest.mark.parametrize("sizes", SCOUTS, ids=str)
@pytest.mark.parametrize("shift", [0.0, -200.0, 200.0])
def test_the_loss_of_a_scout_and_its_gradient_are_those_of_its_definition(sizes, shift):
    """Wherever logits lie: those that only fill a vector are no classes."""
    x, *weights, classes = draw_scout(*sizes)
    weights[-1] += shift

    def plain(w_in, b_in, w_out, b_out):
        log_prob = class_log_probs(x, w_in, b_in, w_out, b_out)
        return -jnp.take_along_axis(log_prob, classes[:, None], axis=1).mean()

    expected = jax.value_and_grad(plain, argnums=(0, 1, 2, 3))(*weights)
    step = jax.value_and_grad(native_scout_loss, argnums=(1, 2, 3, 4))
    found = jax.jit(step)(x, *weights, classes)
    tolerance = 1e-4 if shift else REORDERED_SUMS  # logits near 200 have fewer digits
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("number", [-1, 7])
def test_a_class_that_is_none_is_refused(number):
    *arrays, _ = draw_scout(3, 2, 16, 7)
    with pytest.raises(jax.errors.JaxRuntimeError, match="class is not among"):
        jax.block_until_ready(jax.jit(native_scout_loss)(*arrays, jnp.array([0, number, 6])))


def test_gates_far_from_zero_stay_finite():
    f = 16
    ones = {"w_gate": jnp.eye(f), "w_up": jnp.eye(f), "w_down": jnp.eye(f)}
    x = jnp.linspace(-300.0, 300.0, 2 * f).reshape(2, f)
    found = jax.grad(lambda x: native_swiglu(x, ones, kept="").sum())(x)
    assert_close(found, jax.grad(lambda x: (jax.nn.silu(x) * x).sum())(x))


def test_matrices_are_orthogonalized_as_by_the_portable_path():
    """Wide, tall, square, of one row, of low rank, tiny and zero, all in one call."""
    wide, tall, square, row, left, right, tiny = draw(
        (70, 200), (131, 48), (64, 64), (1, 9), (40, 3), (3, 90), (7, 5)
    )
    low_rank = left @ right
    matrices = [wide, tall, square, row, low_rank, 1e-12 * tiny, jnp.zeros((6, 8))]
    coefficients = jnp.asarray(MUON_COEFFICIENTS)
    found = jax.jit(native_orthogonalize, static_argnums=2)(matrices, coefficients, (1,) * 7)
    for x, y in zip(matrices, found, strict=True):
        expected = _orthogonalize(x, coefficients)
        # Polynomials of a Gram matrix that is made once or twice differ by what is lost in it: most
        # where all but three directions are rounding, which differs between processors, too.
        tolerance = 5e-3 if x is low_rank else 2e-3
        largest = max(1e-6, np.abs(expected).max())
        np.testing.assert_allclose(y, expected, atol=tolerance * largest)
    assert native_orthogonalize([], coefficients, []) == []


def test_each_block_of_a_matrix_is_orthogonalized_by_itself():
    wide, tall = draw((96, 150), (130, 64))
    coefficients = jnp.asarray(MUON_COEFFICIENTS)
    rows, columns = jnp.split(wide, 3), jnp.split(tall, 2, axis=1)
    found = native_orthogonalize([wide, tall], coefficients, [3, 2])
    parts = native_orthogonalize([*rows, *columns], coefficients, [1] * 5)
    np.testing.assert_array_equal(found[0], jnp.concatenate(parts[:3]))
    np.testing.assert_array_equal(found[1], jnp.concatenate(parts[3:], axis=1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="not whole blocks"):
        jax.block_until_ready(native_orthogonalize([wide], coefficients, [5]))


def gradient_of_block(*, dtype=jnp.float32, f=32):
    """Return the traced gradient of a block, for the devices of the mesh in use."""
    x, w_gate, w_down = (x.astype(dtype) for x in draw((4, 8), (8, f), (f, 8)))
    with trace_apart(object()):
        lowered = jax.jit(jax.grad(lambda x: swiglu(x, w_gate, w_gate, w_down).sum())).lower(x)
    return lowered.as_text()


def test_only_a_single_cpu_trains_blocks_by_the_kernel():
    assert "composable_gate" not in gradient_of_block()
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        assert "composable_gate" in gradient_of_block()
        assert "composable_gate" not in gradient_of_block(dtype=jnp.bfloat16)
        assert "composable_gate" not in gradient_of_block(f=24)


def test_only_a_single_cpu_trains_scouts_by_the_kernel():
    """With the loss and gradient of the portable path."""
    x, classes = draw((2, 30, 8))[0], jnp.arange(60).reshape(2, 30) % 9
    step = jax.value_and_grad(scout_loss)

    def run(width):
        scout = Scout(8, width, 9, rngs=nnx.Rngs(0))
        with trace_apart(object()):
            lowered = jax.jit(step).lower(scout, x, classes)
        return native.SCOUT_LOSS in lowered.as_text(), lowered.compile()(scout, x, classes)

    is_native, expected = run(width=32)
    assert not is_native
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        is_native, found = run(width=32)
        assert is_native
        assert not run(width=24)[0]
    assert_close(found, expected)


@pytest.fixture
def fresh(monkeypatch):
    """Return `load_native` as a process that has not called it has it."""
    for variable in ("CXX", native.KERNELS_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    return native._find_native.__wrapped__


def test_a_process_that_may_not_compile_uses_what_another_compiled(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(native.KERNELS_VARIABLE, str(native.load_native().library))
    assert fresh().library == native.load_native().library
    other = tmp_path / "other.so"
    other.write_text("not a library")
    monkeypatch.setenv(native.KERNELS_VARIABLE, str(other))
    assert not fresh().is_loaded
    assert str(other) in fresh().reason


def test_threads_that_ask_together_compile_once(monkeypatch):
    found = []

    def find():
        time.sleep(0.1)
        found.append(None)
        return native.NativeKernels(None, "of this test")

    monkeypatch.setattr(native, "_find_native", functools.cache(find))
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: native.load_native(), range(4)))) == 1
    assert len(found) == 1


def test_without_a_compiler_the_portable_path_is_used(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fresh() == native.NativeKernels(None, "no C++ compiler (c++, g++, clang++)")
    monkeypatch.setenv(native.KERNELS_VARIABLE, "portable")
    assert fresh() == native.NativeKernels(None, "COMPOSABLE_KERNELS=portable")


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    fails = "{ echo 'error: no' >&2; exit 3; }"
    broken.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 1 || {fails}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    kernel = fresh()
    assert not kernel.is_loaded
    assert kernel.reason == f"{broken} made no library: error: no"


def test_a_library_is_compiled_once_for_a_compiler_and_a_processor(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    compiler.chmod(0o755)
    made = native._compile(str(compiler), "version 1")
    assert all(f"{source.stem}.o" in made.read_text() for source in native._SOURCES)
    other = native._compile(str(compiler), "version 2")
    with monkeypatch.context() as patch:
        patch.setattr(native, "_describe_processor", lambda: ["another"])
        assert len({made, other, native._compile(str(compiler), "version 1")}) == 3
    compiler.unlink()
    assert native._compile(str(compiler), "version 1") == made
