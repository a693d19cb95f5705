"""Low-rank changes of one body, by groups and by few, against dense products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.kernels import (
    changed_swiglu_of_few,
    gather_rows,
    grouped_changed_swiglu,
    make_dispatch,
)

D, F, R, N_CHANGES = 6, 10, 2, 3
SIZES = {"w_gate": (D, F), "w_up": (D, F), "w_down": (F, D)}
# Compiled whole: run one by one, its operations would be a hundred programs.
dispatch_of = jax.jit(make_dispatch, static_argnums=(1, 2))
run_few = jax.jit(changed_swiglu_of_few, static_argnums=4)
# Sums in another order; outputs are of order 1.
REORDERED_SUMS = 1e-5


def draw(n_full):
    """Return stacked matrices, of the shared body and full ones, and factors."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) * shape[-2] ** -0.5).astype(np.float32)

    matrices = {name: normal(n_full + 1, *size) for name, size in SIZES.items()}
    changes = {}
    for name, (rows, columns) in SIZES.items():
        a, b = normal(N_CHANGES + 1, rows, R), normal(N_CHANGES + 1, R, columns)
        a[0] = b[0] = 0
        changes[name] = a, b
    return matrices, changes


def run_dense(x_MD, matrices, changes, body_M):
    """Return each token's output by its own body."""
    full_M = jnp.maximum(0, body_M - N_CHANGES)
    change_M = jnp.where(body_M <= N_CHANGES, body_M, 0)
    own = {name: stack[full_M] for name, stack in matrices.items()}
    own = {name: own[name] + a[change_M] @ b[change_M] for name, (a, b) in changes.items()}

    def multiply(rows, name):
        return jnp.einsum("md,mdf->mf", rows, own[name])

    return multiply(jax.nn.silu(multiply(x_MD, "w_gate")) * multiply(x_MD, "w_up"), "w_down")


@pytest.mark.parametrize("n_full", [0, 2])
def test_values_and_gradients_are_those_of_dense_products(n_full):
    matrices, changes = draw(n_full)
    n_bodies = N_CHANGES + n_full + 1
    body_M = np.arange(12) * 5 % n_bodies
    assert len(np.unique(body_M)) == n_bodies
    x_MD = jnp.asarray(np.random.default_rng(1).normal(size=(12, D)), jnp.float32)
    dispatch = dispatch_of(body_M[:, None], n_bodies, 2)

    def run_grouped(x_MD, matrices, changes):
        y_PD = grouped_changed_swiglu(gather_rows(x_MD, dispatch), matrices, changes, dispatch)
        return y_PD[dispatch.position_MJ[:, 0]]

    def run(call, *rest):
        def loss(*arrays):
            y_MD = call(*arrays, *rest)
            return jnp.sum(jnp.sin(y_MD)), y_MD

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
            x_MD, matrices, changes
        )

    (_, found_MD), found = run(run_grouped)
    (_, expected_MD), expected = run(run_dense, body_M)
    np.testing.assert_allclose(found_MD, expected_MD, atol=REORDERED_SUMS)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=REORDERED_SUMS)


@pytest.mark.parametrize("bodies", [[0], [2], [2, 3], [4], [0, 1, 5]])
def test_few_changes_are_those_of_dense_products(bodies):
    """Rows of full bodies, of which 4 and 5 are numbers, are zero."""
    matrices, changes = draw(n_full=2)
    body_M = np.resize(bodies, 5)
    x_MD = jnp.asarray(np.random.default_rng(1).normal(size=(5, D)), jnp.float32)
    dispatch = dispatch_of(body_M[:, None], N_CHANGES + 3, 1)
    used = [body for body in bodies if 0 < body <= N_CHANGES]
    body_A = jnp.asarray([*used, N_CHANGES + 3])  # the last stands for none
    few = [{name: (a[body], b[body]) for name, (a, b) in changes.items()} for body in [*used, 1]]
    own = {name: stack[0] for name, stack in matrices.items()}
    y_PD = run_few(x_MD, own, few, body_A, N_CHANGES, dispatch)
    expected_MD = jax.jit(run_dense)(x_MD, matrices, changes, body_M)
    expected_MD = np.where((body_M <= N_CHANGES)[:, None], expected_MD, 0)
    found_MD = y_PD[dispatch.position_MJ[:, 0]]
    np.testing.assert_allclose(found_MD, expected_MD, atol=REORDERED_SUMS)
