"""The loss of a scout's classes: equal to the plain one, and never all logits in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.training import class_loss as made
from composable.training.class_loss import class_loss

FLOAT32_ROUNDING = 1e-5


def plain(hidden_BTW, w_WC, classes_BT):
    log_prob_BTC = jax.nn.log_softmax(hidden_BTW @ w_WC)
    return -jnp.take_along_axis(log_prob_BTC, classes_BT[..., None], -1).mean()


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden_BTW, w_WC = (
        jnp.asarray((3 * rng.normal(size=shape)).astype(np.float32))
        for shape in ((2, 6, 8), (8, 40))
    )
    return hidden_BTW, w_WC, jnp.asarray(rng.integers(0, 4, (2, 6)))


@pytest.mark.parametrize("n_logits", [1, 2 * 2 * 40, 1 << 18], ids=["position", "two", "whole"])
def test_loss_and_gradient_are_the_plain_ones(monkeypatch, case, n_logits):
    """Classes repeat within a part, so their columns of the gradient are sums."""
    monkeypatch.setattr(made, "_LOGITS", n_logits)

    def scaled(loss):
        step = jax.value_and_grad(lambda *arguments: 3 * loss(*arguments), argnums=(0, 1))
        return jax.jit(step)(*case)

    (expected, slopes), (found, found_slopes) = scaled(plain), scaled(class_loss)
    assert float(found) == pytest.approx(float(expected), rel=FLOAT32_ROUNDING)
    alone = jax.jit(lambda *arguments: class_loss(*arguments))(*case)
    assert 3 * float(alone) == pytest.approx(float(expected), rel=FLOAT32_ROUNDING)
    for slope, found_slope in zip(slopes, found_slopes, strict=True):
        np.testing.assert_allclose(found_slope, slope, atol=FLOAT32_ROUNDING)


def test_large_logits_do_not_overflow(case):
    hidden_BTW, w_WC, classes_BT = case
    step = jax.jit(jax.value_and_grad(class_loss, argnums=(0, 1)))
    found, slopes = step(1e4 * hidden_BTW, w_WC, classes_BT)
    assert np.isfinite(float(found))
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_the_compiled_gradient_never_holds_the_logits_of_all_tokens(monkeypatch):
    n_rows, n_positions, width, n_classes = 4, 64, 8, 512
    monkeypatch.setattr(made, "_LOGITS", n_rows * n_positions * n_classes // 8)
    arguments = (
        jax.ShapeDtypeStruct((n_rows, n_positions, width), jnp.float32),
        jax.ShapeDtypeStruct((width, n_classes), jnp.float32),
        jax.ShapeDtypeStruct((n_rows, n_positions), jnp.int32),
    )

    def temporary_bytes(loss):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    all_logits = n_rows * n_positions * n_classes * 4
    assert temporary_bytes(plain) >= all_logits
    assert temporary_bytes(class_loss) < all_logits / 2
