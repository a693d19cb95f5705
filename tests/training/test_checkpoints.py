import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composable.errors import TrainingError
from composable.training.checkpoints import Checkpoints
from composable.training.config import TrainConfig

pytestmark = pytest.mark.slow

CFG = TrainConfig(steps=3, batch_size=1, window=1, learning_rate=1.0)


def state_of(seed):
    """Return a tree of flax variables and a plain one, as training holds them."""
    rng = np.random.default_rng(seed)
    trained = nnx.State({"w": nnx.Param(jnp.asarray(rng.normal(size=(2, 3)), jnp.float32))})
    return trained, {"count": jnp.int32(seed), "mu": jnp.asarray(rng.normal(size=3), jnp.float32)}


def save(directory, *steps, cfg=CFG):
    checkpoints = Checkpoints(directory, cfg)
    for step in steps:
        checkpoints.save(step, *state_of(step), {"position": step})
    checkpoints.close()


def restore(directory, cfg=CFG):
    checkpoints = Checkpoints(directory, cfg)
    try:
        return checkpoints.restore(*state_of(99))
    finally:
        checkpoints.close()


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "new") is None


def test_the_newest_checkpoint_comes_back_to_the_bit(tmp_path):
    save(tmp_path, 1, 2, 3)
    step, trained, opt_state, data_state = restore(tmp_path)
    assert (step, data_state) == (3, {"position": 3})
    expected = state_of(3)
    assert jax.tree.structure((trained, opt_state)) == jax.tree.structure(expected)
    for found, leaf in zip(
        jax.tree.leaves((trained, opt_state)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(found, leaf)
        assert found.dtype == leaf.dtype


def test_only_the_newest_two_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TrainingError, match="another learning_rate, seed") as caught:
        restore(tmp_path, dataclasses.replace(CFG, learning_rate=2.0, seed=5))
    assert caught.value.where == str(tmp_path)
