"""Guards: whose weight goes to whom when a contribution counts as zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.model.guard import exceeds, redistribute

# Weights of three choices; which of them count as zero; weights after; is no choice left?
TABLE = [
    ([0.5, 0.3, 0.2], "...", [0.5, 0.3, 0.2], False),
    ([0.5, 0.3, 0.2], "x..", [0.0, 0.6, 0.4], False),
    ([0.5, 0.3, 0.2], ".xx", [1.0, 0.0, 0.0], False),
    ([0.5, 0.3, 0.2], "xxx", [0.0, 0.0, 0.0], True),
    ([1.0, 0.0, 0.0], "x..", [0.0, 0.0, 0.0], True),
    ([1.0, 0.0, 0.0], ".xx", [1.0, 0.0, 0.0], False),
    ([1.0, 1e-30, 0.0], "x..", [0.0, 1.0, 0.0], False),
    ([1.0, 1e-44, 0.0], "x..", [0.0, 0.0, 0.0], True),
]
WEIGHTS_MJ = np.array([row[0] for row in TABLE], np.float32)
ZEROED_MJ = np.array([[mark == "x" for mark in row[1]] for row in TABLE])


def test_weight_of_what_counts_as_zero_goes_to_the_other_choices():
    found_MJ, dropped_M = redistribute(jnp.asarray(WEIGHTS_MJ), jnp.asarray(ZEROED_MJ))
    np.testing.assert_allclose(found_MJ, [row[2] for row in TABLE], rtol=1e-6)
    np.testing.assert_array_equal(dropped_M, [row[3] for row in TABLE])


@pytest.mark.bits
def test_tokens_without_a_zeroed_contribution_keep_every_bit():
    """Weights of a softmax seldom sum to one exactly: nothing may be divided by their sum."""
    weight_MJ = jax.nn.softmax(jax.random.normal(jax.random.key(0), (64, 3)), axis=-1)
    assert (np.asarray(weight_MJ).sum(-1) != 1).any()
    zeroed_MJ = np.zeros((64, 3), bool)
    zeroed_MJ[::2, 1] = True
    found_MJ, _ = redistribute(weight_MJ, jnp.asarray(zeroed_MJ))
    np.testing.assert_array_equal(found_MJ[1::2], weight_MJ[1::2])
    assert (np.asarray(found_MJ)[::2, 1] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.1, 3e38])
def test_what_is_over_the_bound_or_not_finite_exceeds_it(value):
    y_PD = jnp.array([[1.0, 1.0], [value, value]])
    np.testing.assert_array_equal(exceeds(y_PD, 1.0), [False, True])
