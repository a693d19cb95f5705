"""Scouts that read alone: how long is decided on rows that they did not see."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from composable.model.scout import Scout
from composable.training.scouts import Features, count_scout_steps, train_scout
from tests.support.compiling import counted_compiling

ROWS, WINDOW, WIDTH, CLASSES = 20, 16, 8, 12


def make_features(is_lawful, seed=0, n_rows=ROWS):
    """Return rows whose classes hang on the features, or on nothing."""
    rng = np.random.default_rng(seed)
    feature_BTD = rng.normal(size=(n_rows, WINDOW, WIDTH)).astype(np.float16)
    classes_BT = rng.integers(0, CLASSES, (n_rows, WINDOW))
    if is_lawful:
        classes_BT = feature_BTD[..., 0] > 0
    return Features(feature_BTD, classes_BT.astype(np.int32))


def read(features, steps=160):
    seen = []
    scout = Scout(WIDTH, 64, CLASSES, rngs=nnx.Rngs(0))
    before = jnp.array(scout.w_in[...])
    found = train_scout(
        scout, features, steps=steps, progress=lambda step, total, _: seen.append((step, total))
    )
    np.testing.assert_array_equal(scout.w_in[...], before, "the one that was given stays")
    return found, seen


def test_a_scout_reads_on_where_that_teaches_it():
    found, seen = read(make_features(is_lawful=True))
    assert found.steps == 160
    assert found.heldout_bits < 0.5
    assert seen[-1] == (count_scout_steps(160), count_scout_steps(160)) == (210, 210)


def test_a_scout_stops_where_it_would_learn_by_heart():
    found, _ = read(make_features(is_lawful=False))
    assert found.steps == 10


def test_one_step_is_one_step():
    assert read(make_features(is_lawful=True), steps=1)[0].steps == count_scout_steps(1) == 1


def test_scouts_of_texts_of_any_length_run_the_same_programs():
    read(make_features(is_lawful=True), steps=20)
    with counted_compiling() as compiled:
        read(make_features(is_lawful=True, n_rows=33), steps=32)
    assert compiled == []
