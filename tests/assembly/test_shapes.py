"""What loading needs of a model beside its weights."""

import jax
from flax import nnx

from composable.assembly.backbones import load_backbone
from composable.model.backbone import Backbone


def test_the_shapes_of_a_backbone_need_no_random_numbers(monkeypatch):
    def draw(*arguments, **settings):
        raise AssertionError("random numbers were drawn")

    monkeypatch.setattr(jax.random, "normal", draw)
    loaded = load_backbone("tiny-bytes").backbone
    blank = nnx.eval_shape(lambda: Backbone(loaded.cfg, range(loaded.cfg.vocab_size), 4, rngs=None))
    assert blank.embed.shape == loaded.embed.shape
