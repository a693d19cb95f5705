"""Products with matrices kept in fewer bytes, and of one row with ordinary ones.

Values, rows on their own, gradients, threads, and nothing inflated.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.kernels import native, quantized
from composable.kernels.quantized import (
    multiply,
    multiply_transposed,
    quantize,
    take_rows,
    widen,
)
from tests.support.traces import trace_apart

# Sums of a hundred terms in another order, relative to the largest output.
REORDERED_SUMS = 3e-6
# Rows, inputs and outputs: below, at and above what the kernel takes at a time, and uneven.
SHAPES = [(1, 100, 200), (5, 37, 19), (130, 40, 72)]
DTYPES = ["I8", "BF16"]


@pytest.fixture(params=["native", "portable"])
def path(request, monkeypatch):
    """Run products by the native kernel, if there is a compiler, and by the portable loop."""
    if request.param == "portable":
        monkeypatch.setattr(
            quantized, "load_native", lambda: native.NativeKernels(None, "not wanted")
        )
    elif not native.load_native().is_loaded:
        pytest.skip(native.load_native().reason)
    with trace_apart(request.param):
        yield request.param


def draw(rows, inputs, outputs, dtype, is_transposed):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    shape = (outputs, inputs) if is_transposed else (inputs, outputs)
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    if dtype == "F32":
        return x, w
    return x, _quantize(w, dtype, (1,) if is_transposed else (0,))


_quantize = jax.jit(quantize, static_argnums=(1, 2))


def product_of(is_transposed):
    return jax.jit(multiply_transposed if is_transposed else multiply)


@pytest.mark.parametrize("dtype", [*DTYPES, "F32"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_products_are_those_of_the_widened_matrix(path, dtype, is_transposed):
    for shape in SHAPES:
        x, w = draw(*shape, dtype, is_transposed)
        found = product_of(is_transposed)(x, w)
        wide = np.asarray(widen(w), np.float64)
        expected = np.asarray(x, np.float64) @ (wide.T if is_transposed else wide)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=REORDERED_SUMS * scale, err_msg=str(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_row_does_not_depend_on_the_others(dtype, is_transposed):
    """To the bit, also on how many there are; the sums of a product in XLA do."""
    if not native.load_native().is_loaded:
        pytest.skip(native.load_native().reason)
    for shape in SHAPES:
        x, w = draw(*shape, dtype, is_transposed)
        product = product_of(is_transposed)
        together = np.asarray(product(x, w))
        for row in {0, shape[0] // 2, shape[0] - 1}:
            alone = np.asarray(product(x[row : row + 1], w))
            np.testing.assert_array_equal(alone[0], together[row], err_msg=str(shape))


def test_pieces_on_several_threads_cover_every_output():
    """With a matrix large enough to be split, and more rows than a tile."""
    if not native.load_native().is_loaded:
        pytest.skip(native.load_native().reason)
    for rows, is_transposed in ((1, False), (1, True), (6, False), (6, True)):
        for dtype in ("I8", "F32"):
            x, w = draw(rows, 1024, 3000, dtype, is_transposed)
            product = product_of(is_transposed)
            # Again and again, as in decoding: threads that helped stay for a moment.
            for _ in range(20):
                found = np.asarray(product(x, w))
            wide = np.asarray(widen(w))
            expected = np.asarray(x) @ (wide.T if is_transposed else wide)
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_products_of_several_callers_do_not_mix():
    """Each program has its own pieces, whichever thread helps."""
    if not native.load_native().is_loaded:
        pytest.skip(native.load_native().reason)
    cases = [draw(1, 512, 1024, dtype, False) for dtype in ("F32", "I8", "BF16", "F32")]
    expected = [np.asarray(multiply(x, w)) for x, w in cases]

    def run(case):
        found = [np.asarray(multiply(*case)) for _ in range(100)]
        return np.unique(np.stack(found), axis=0)

    with ThreadPoolExecutor(len(cases)) as pool:
        for found, value in zip(pool.map(run, cases), expected, strict=True):
            np.testing.assert_array_equal(found, value[None])


@pytest.mark.parametrize("dtype", [*DTYPES, "F32"])
def test_few_rows_are_multiplied_together_as_each_alone(dtype):
    """To the bit, and all of an ordinary matrix's by the kernel where that is asked for."""
    if not native.load_native().is_loaded:
        pytest.skip(native.load_native().reason)
    x, w = draw(4, 123, 1000, dtype, False)
    for n_rows in (2, 3, 4):
        together = np.asarray(jax.jit(multiply, static_argnames="few")(x[:n_rows], w, few=4))
        alone = [np.asarray(jax.jit(multiply)(x[i : i + 1], w))[0] for i in range(n_rows)]
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_gradients_of_one_row_are_those_of_an_ordinary_product(path, is_transposed):
    x, w = draw(1, 20, 36, "F32", is_transposed)

    def loss(x, w, product):
        return jnp.sum(jnp.sin(product(x, w)))

    found = jax.grad(loss, argnums=(0, 1))(x, w, product_of(is_transposed))
    expected = jax.grad(loss, argnums=(0, 1))(x, w, lambda x, w: x @ (w.T if is_transposed else w))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_gradients_of_rows_are_those_of_the_widened_matrix(path):
    for is_transposed in (False, True):
        x, w = draw(3, 20, 36, "I8", is_transposed)
        wide = widen(w).T if is_transposed else widen(w)

        def loss(x, product):
            return jnp.sum(jnp.sin(product(x)))

        found = jax.grad(loss)(x, lambda x, t=is_transposed, w=w: product_of(t)(x, w))
        expected = jax.grad(loss)(x, lambda x, wide=wide: x @ wide)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_products_can_be_vmapped(path):
    x, w = draw(6, 20, 36, "I8", False)
    found = jax.vmap(lambda row: multiply(row[None], w)[0])(x)
    np.testing.assert_allclose(found, multiply(x, w), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_no_matrix_is_widened_in_memory(path, dtype, is_transposed):
    """Not in a scan over layers either, out of which XLA would hoist it, for all layers at once."""
    x, w = draw(32, 96, 96, dtype, is_transposed)
    stack = jax.tree.map(lambda array: jnp.stack([array] * 3), w)

    def run(x, stack):
        return jax.lax.scan(lambda x, w: (product_of(is_transposed)(x, w), None), x, stack)[0]

    text = jax.jit(run).lower(x, stack).compile().as_text()
    assert re.search(r"(s8|u16)\[(3,)?96,96\]", text)  # the matrices are there
    assert not re.search(r"f32\[(3,)?96,96\]", text)


def test_int8_has_one_scale_for_each_output():
    w = jnp.array([[1.0, 0.0, -3.0], [0.5, 0.0, 1.0]])
    found = quantize(w, "I8", inputs=(0,))
    assert found.scale.shape == (1, 3)
    np.testing.assert_allclose(widen(found), w, atol=np.asarray(found.scale).max() / 2)
    assert found.values[:, 1].tolist() == [0, 0]
    assert np.abs(np.asarray(found.values)).max(axis=0).tolist() == [127, 0, 127]


def test_rows_of_embeddings_are_widened():
    _, w = draw(1, 8, 20, "I8", True)
    np.testing.assert_array_equal(take_rows(w, jnp.array([[3, 5]])), widen(w)[None, [3, 5]])
