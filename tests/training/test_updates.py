"""The parts of low-rank updates: a parent in a backbone's slots, and factors of changes."""

import numpy as np
from flax import nnx

from composable.model.body import Expert
from composable.model.tensors import to_tensors
from composable.training.updates import place_parent


def test_an_update_starts_as_its_parent(tiny):
    parent = tiny.expert("parent", noise=0.5)
    before = to_tensors(tiny.backbone)
    placed = place_parent(tiny.backbone, parent.body)
    start = Expert(placed, kind="lora", rank=2, scout_width=16, rngs=nnx.Rngs(0))
    x_BTD = np.random.default_rng(0).normal(size=(2, 3, tiny.backbone.cfg.d_model))
    x_BTD = x_BTD.astype(np.float32)
    for layer in tiny.backbone.cfg.slots:
        expected = parent.body.feed_forward(tiny.backbone)(layer, x_BTD)
        found = start.body.feed_forward(placed)(layer, x_BTD)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        was, now = (b.layers[layer].ffn.w_up[...] for b in (tiny.backbone, placed))
        assert not np.allclose(was, now)
    for name, array in to_tensors(tiny.backbone).items():
        np.testing.assert_array_equal(array, before[name])
