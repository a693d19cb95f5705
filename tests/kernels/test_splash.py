"""jax's splash attention, its operations run one by one here, against the portable attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.kernels import count_splash_flops, splash_attention, takes_splash
from composable.model.causal_attention import attend, causal_attention
from composable.parallel import make_mesh

# Sums of up to 384 products in float32, in another order, of values up to 5 and slopes up to 20.
REORDERED_SUMS = 1e-5
# Three blocks of positions, so that one is masked whole, one in part and one not at all.
TOKENS = 384


def normal(seed, n_heads, n_tokens):
    shape = (2, n_tokens, n_heads, 64)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("n_tokens", [TOKENS, 9 * 128], ids=["one kernel", "two kernels"])
def test_the_kernels_and_their_gradients_are_those_of_the_portable_path(n_tokens):
    q_BTNH, dy_BTNH = normal(0, 4, n_tokens), normal(3, 4, n_tokens)
    arrays = q_BTNH, normal(1, 2, n_tokens), normal(2, 2, n_tokens)  # two heads share a key head

    def run(fn):
        def call(*x):
            y_BTNH, pull = jax.vjp(fn, *x)
            return y_BTNH, *pull(dy_BTNH)

        return jax.jit(call)(*arrays)

    found = run(lambda *x: splash_attention(*x, interpret=True))
    for ours, expected in zip(found, run(causal_attention), strict=True):
        np.testing.assert_allclose(ours, expected, atol=REORDERED_SUMS)


@pytest.mark.parametrize(
    ("platform", "shape", "dtype", "expected"),
    [
        ("tpu", (1, 256, 4, 64), jnp.bfloat16, True),
        ("tpu", (1, 2048, 4, 128), jnp.bfloat16, True),
        ("tpu", (1, 200, 4, 64), jnp.bfloat16, False),
        ("tpu", (1, 64, 4, 64), jnp.bfloat16, False),
        ("tpu", (1, 256, 4, 48), jnp.bfloat16, False),
        ("tpu", (1, 256, 4, 64), jnp.float32, False),
        ("cuda", (1, 256, 4, 64), jnp.bfloat16, False),
        (None, (1, 256, 4, 64), jnp.bfloat16, False),
    ],
)
def test_what_the_kernel_takes(platform, shape, dtype, expected):
    assert takes_splash(platform, jax.ShapeDtypeStruct(shape, dtype)) is expected


def test_on_cpus_the_program_is_that_of_the_portable_path():
    q, k = (jax.ShapeDtypeStruct((1, 256, n, 64), jnp.bfloat16) for n in (4, 2))
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        found, expected = (
            str(jax.make_jaxpr(jax.grad(lambda *x, f=f: f(*x).sum().astype(float)))(q, k, k))
            for f in (attend, causal_attention)
        )
    assert found == expected


@pytest.mark.parametrize(
    ("n_tokens", "products"),
    [(TOKENS, {"fwd": 2, "dkv": 5}), (9 * 128, {"fwd": 2, "dkv": 4, "dq": 3})],
    ids=["gradients in one kernel", "a kernel for that of queries"],
)
def test_operations_are_those_of_the_blocks_that_are_not_masked_whole(n_tokens, products):
    x = jax.ShapeDtypeStruct((2, n_tokens, 4, 64), jnp.float32)

    def loss(*x):
        return splash_attention(*x, interpret=True).sum()

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x))
    assert {kind for kind in ("fwd", "dkv", "dq") if f"splash_mha_{kind}" in program} == {*products}
    n_blocks = n_tokens // 128
    n_pairs = 128 * 128 * n_blocks * (n_blocks + 1) // 2
    shapes = [(1, 3, 3), (2, 4, n_tokens, 64), (2, 2, n_tokens, 64)]
    for kind, number in products.items():
        found = count_splash_flops(f"jit(f)/splash_mha_{kind}_residuals", shapes)
        assert found == number * 2 * 2 * 4 * 64 * n_pairs
    assert count_splash_flops("grouped_swiglu", shapes) == 0
