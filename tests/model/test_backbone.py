import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.errors import ModelError
from composable.model.config import BackboneConfig, tiny_bytes


def test_logits_do_not_hear_later_tokens(tiny):
    """The gradient of the logits at t with respect to later embeddings is zero, at t it is not."""
    tokens_BT = jnp.asarray(tiny.tokens(length=12))
    at = 5

    def logits_at(change_TD):
        embedded = tiny.backbone.embed[...][tokens_BT] + change_TD
        trunk = _trunk_from_embeddings(tiny.backbone, embedded)
        logits_BTV, _ = tiny.backbone.upper(trunk, tiny.backbone.own_feed_forward)
        return jnp.square(logits_BTV[:, at]).sum()

    gradient_TD = np.asarray(jax.jit(jax.grad(logits_at))(jnp.zeros((12, tiny.cfg.d_model))))
    assert (gradient_TD[at + 1 :] == 0).all()
    assert (np.abs(gradient_TD[: at + 1]).max(axis=-1) > 0).all()


def _trunk_from_embeddings(backbone, x_BTD):
    layers = range(backbone.cfg.tap)
    return backbone._run(layers, x_BTD, backbone.own_feed_forward, 0, None)[0]


def test_trunk_reads_the_embeddings_and_the_layers_below_the_tap_only(tiny):
    tokens_BT = jnp.asarray(tiny.tokens(length=12))
    embedded_BTD = tiny.backbone.embed[...][tokens_BT]
    x_BTD = jax.jit(lambda backbone: backbone.trunk(tokens_BT)[0])(tiny.backbone)
    expected_BTD = jax.jit(_trunk_from_embeddings)(tiny.backbone, embedded_BTD)
    np.testing.assert_array_equal(x_BTD, expected_BTD)


def test_features_have_unit_scale(tiny):
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)) * 7, jnp.float32)
    feature_BTD = np.asarray(tiny.backbone.features(x_BTD))
    np.testing.assert_allclose(np.sqrt((feature_BTD**2).mean(-1)), 1, rtol=1e-4)  # eps is 1e-5


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"d_model": 0}, "config.d_model"),
        ({"context": -1}, "config.context"),
        ({"n_kv_heads": 3}, "config.n_kv_heads"),
        ({"d_head": 7}, "config.d_head"),
        ({"tap": 3}, "config.tap"),
        ({"depth": 3}, "config"),
    ],
)
def test_an_impossible_config_is_refused_by_field(tiny, change, field):
    with pytest.raises(ModelError) as caught:
        BackboneConfig.from_dict({**tiny.cfg.to_dict(), **change})
    assert caught.value.where == field


def test_a_config_survives_plain_data():
    cfg = tiny_bytes()
    assert BackboneConfig.from_dict(cfg.to_dict()) == cfg
    assert cfg.slots == (2, 3, 4, 5)
