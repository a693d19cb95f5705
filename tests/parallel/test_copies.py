"""Muon on a mesh: the work of one device, shared out once, with the results of one device."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from composable.parallel import map_parameters
from composable.training.config import TrainConfig
from composable.training.optimizers import MUON_COEFFICIENTS, _orthogonalize, muon

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("copies_program.py")
# Sums within a product are taken in another order; two updates move a number by up to 0.03.
SAME = 1e-6
# The matrix that is alone in its shape, which every group of devices updates.
ALONE = 0.02
WIDTH, HIDDEN = 64, 256
# Two shapes, with eight matrices and with four.
N_MATRICES = 12
# Twice: a Gram matrix, five products of its size, and one with the matrix.
BY_HAND = N_MATRICES * 2 * (4 * WIDTH**2 * HIDDEN + 5 * 2 * WIDTH**3)


def run(*arguments):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = {
        **os.environ,
        "PYTHONPATH": str(PROGRAM.parents[2]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
    }
    command = [sys.executable, PROGRAM, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def require_shared(seen):
    """Require that no group of devices repeats another's work, and idles only without any."""
    for mesh, padded in [("four copies", 12), ("eight copies", 16)]:
        expected = BY_HAND / N_MATRICES * padded / 8
        assert seen[mesh]["flops"] == pytest.approx(expected, rel=ALONE), mesh
        assert seen[mesh]["exchanged"]["all-gather"] > 0, mesh


@pytest.fixture(scope="module")
def seen():
    return run()


def test_no_group_of_devices_repeats_what_another_does(seen):
    require_shared(seen)


@pytest.mark.parity
def test_no_group_of_chips_repeats_what_another_does():
    require_shared(run("v5e:2x4"))


def test_the_parameters_are_those_of_one_device(seen):
    for mesh, found in seen.items():
        assert found["difference"] < SAME, mesh


def test_without_a_mesh_it_is_a_plain_map():
    tree = {"w": nnx.Param(jnp.ones((2, 3)), dims="DF"), "plain": jnp.ones(2)}
    doubled = map_parameters(lambda x: 2 * x, tree)
    assert doubled["w"].get_metadata()["dims"] == "DF"
    assert [x.tolist() for x in (doubled["w"][...], doubled["plain"])] == [
        [[2.0] * 3] * 2,
        [2.0] * 2,
    ]


def make_gradients():
    """Return gradients of two wide matrices and a high one, far from orthogonal, and a vector."""
    rng = np.random.default_rng(0)
    scale = np.geomspace(1, 1e-2, 16)[:, None]
    wide, other, high = (rng.normal(size=(16, 48)) * scale for _ in range(3))
    tree = {"wide": wide, "other": other, "high": high.T, "scale": np.arange(3.0)}
    return jax.tree.map(jnp.float32, tree)


def test_on_one_device_it_is_the_muon_of_optax():
    """But for rounding, and with a state of the same structure."""
    cfg = TrainConfig(steps=8, batch_size=8, window=8, learning_rate=1e-2)
    gradients = make_gradients()
    params = jax.tree.map(jnp.cos, gradients)
    reference = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.contrib.muon(
            lambda step: jnp.ones_like(step, jnp.float32),
            ns_coeffs=MUON_COEFFICIENTS,
            preconditioning="schatten",
            weight_decay=cfg.weight_decay,
            consistent_rms=0.2,
        ),
        optax.stateless(lambda updates, _: updates),
    )
    found, expected = (
        two_updates(optimizer, params, gradients) for optimizer in (muon(cfg), reference)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, expected)


def two_updates(optimizer, params, gradients):
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = update(gradients, state, params, rate=1.0)
    return updates, state


@pytest.mark.parametrize("shape", [(384, 400), (400, 384)])
def test_a_large_matrix_is_updated_in_blocks_of_its_shorter_side(shape):
    """As a matrix of its own would be, but for the scale; natively and by the portable path."""
    optimizer = muon(TrainConfig(steps=8, batch_size=8, window=8, learning_rate=1e-2))
    gradient = jnp.float32(np.random.default_rng(0).normal(size=shape))
    axis = 0 if shape[0] < shape[1] else 1

    def update(gradient):
        params = jnp.zeros_like(gradient)
        return optimizer.update(gradient, optimizer.init(params), params, rate=1.0)[0]

    halves = [update(x) for x in jnp.split(gradient, 2, axis=axis)]
    expected = jnp.concatenate(halves, axis=axis) * 2**-0.25
    np.testing.assert_allclose(update(gradient), expected, rtol=1e-3, atol=1e-5)
    whole = _orthogonalize(gradient, jnp.asarray(MUON_COEFFICIENTS)) * 0.2 * np.sqrt(400)
    whole *= 2**-0.25
    np.testing.assert_allclose(-whole, expected, rtol=1e-2, atol=1e-3)


def test_singular_values_come_near_1():
    """Those of at least 0.003 of the bound, for gradients of any size."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 64)))[0] for n in (64, 96))
    values = np.geomspace(1, 5e-3, 64)
    optimizer = muon(TrainConfig(steps=8, batch_size=8, window=8, learning_rate=1e-2))
    for size in (1e-8, 1.0, 1e4):
        gradient = {"w": jnp.float32(size * (left * values) @ right.T)}
        params = optax.tree.zeros_like(gradient)
        update = optimizer.update(gradient, optimizer.init(params), params, rate=1.0)[0]["w"]
        found = np.diag(left.T @ np.asarray(update) @ right) / (-0.2 * np.sqrt(96))
        assert found.min() > 0.75 and found.max() < 1.25, size
