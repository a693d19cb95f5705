"""Guards: whose weight goes to whom when a contribution counts as zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.kernels import make_dispatch
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


def rows_of(zeroed_MJ, dispatch):
    """Return marks of choices as marks of rows; padding rows, which are never read, are marked."""
    zeroed_P = np.ones(dispatch.choice_P.shape, bool)
    zeroed_P[np.asarray(dispatch.position_MJ)] = zeroed_MJ
    return jnp.asarray(zeroed_P)


@pytest.mark.parametrize("block", [1, 4])
def test_weight_of_what_counts_as_zero_goes_to_the_other_choices(block):
    rng = np.random.default_rng(0)
    expert_MJ = np.array([rng.permutation(5)[:3] for _ in TABLE])
    dispatch = make_dispatch(jnp.asarray(expert_MJ), 5, block)
    found_MJ, dropped_M = redistribute(
        jnp.asarray(WEIGHTS_MJ), rows_of(ZEROED_MJ, dispatch), dispatch
    )
    np.testing.assert_allclose(found_MJ, [row[2] for row in TABLE], rtol=1e-6)
    np.testing.assert_array_equal(dropped_M, [row[3] for row in TABLE])


@pytest.mark.bits
def test_tokens_without_a_zeroed_contribution_keep_every_bit():
    """Weights of a softmax seldom sum to one exactly: nothing may be divided by their sum."""
    weight_MJ = jax.nn.softmax(jax.random.normal(jax.random.key(0), (64, 3)), axis=-1)
    assert (np.asarray(weight_MJ).sum(-1) != 1).any()
    dispatch = make_dispatch(jnp.tile(jnp.arange(3), (64, 1)), 3, 8)
    zeroed_MJ = np.zeros((64, 3), bool)
    zeroed_MJ[::2, 1] = True
    found_MJ, _ = redistribute(weight_MJ, rows_of(zeroed_MJ, dispatch), dispatch)
    np.testing.assert_array_equal(found_MJ[1::2], weight_MJ[1::2])
    assert (np.asarray(found_MJ)[::2, 1] == 0).all()


def test_a_choice_of_no_expert_is_not_a_broken_one():
    dispatch = make_dispatch(jnp.array([[0, 3], [3, 1]]), 2, 2)
    weight_MJ = jnp.array([[0.5, 0.5], [0.5, 0.5]])
    zeroed_P = jnp.zeros(dispatch.choice_P.shape, bool)
    found_MJ, dropped_M = redistribute(weight_MJ, zeroed_P, dispatch)
    np.testing.assert_array_equal(found_MJ, weight_MJ)
    assert not dropped_M.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.1, 3e38])
def test_what_is_over_the_bound_or_not_finite_exceeds_it(value):
    y_PD = jnp.array([[1.0, 1.0], [value, value]])
    np.testing.assert_array_equal(exceeds(y_PD, 1.0), [False, True])
