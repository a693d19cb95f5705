import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composable.errors import ModelError
from composable.model.backbone import Backbone
from composable.model.config import BackboneConfig, RopeScaling, tiny_bytes
from composable.model.layers import _stretch
from composable.model.mix import mix, mix_state
from composable.model.model import Model

pytestmark = pytest.mark.slow

SCALING = RopeScaling(factor=8.0, low_frequency=1.0, high_frequency=4.0, original_context=64)
# What families of transformers differ in, one change each, and all at once.
VARIANTS = {
    "after": {"norm_placement": "after"},
    "head": {"qk_norm": "head"},
    "projection": {"qk_norm": "projection"},
    "untied": {"is_tied": False},
    "wide-heads": {"d_head": 12},
    "scaled": {"rope_scaling": SCALING, "rope_theta": 500_000.0},
    "bfloat16": {"dtype": "BF16"},
    "all": {"norm_placement": "after", "qk_norm": "projection", "is_tied": False, "d_head": 6},
}
# The same sums in another order. In bfloat16 (8 bits) logits up to 4 come in steps of 1/64, and
# every one of three layers has rounded a few times before.
ROUNDING = {"F32": 1e-5, "BF16": 1e-1}


def make_variant(tiny, **changes):
    cfg = dataclasses.replace(tiny.cfg, **changes)
    return Backbone(cfg, np.arange(256), 256, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_causal_and_decodes_what_a_full_pass_gives(tiny, changes):
    backbone = make_variant(tiny, **changes)
    model = Model(backbone, tiny.interface)
    tokens_BT = tiny.tokens(batch=1, length=12)
    changed_BT = tokens_BT.copy()
    changed_BT[0, 9:] += 1
    logits_BTV, changed_BTV = np.asarray(model(tokens_BT)), np.asarray(model(changed_BT))
    np.testing.assert_array_equal(logits_BTV[:, :9], changed_BTV[:, :9])
    assert (logits_BTV[:, 9:] != changed_BTV[:, 9:]).any()

    step = jax.jit(mix)
    state, decoded = mix_state(model.parts, 1, 16), []
    for token in tokens_BT[0]:
        out_BTV, state = step(model.parts, jnp.full((1, 1), token), state)
        decoded.append(np.asarray(out_BTV))
    atol = ROUNDING[backbone.cfg.dtype]
    np.testing.assert_allclose(np.concatenate(decoded, 1), logits_BTV, atol=atol)


@pytest.mark.parametrize("qk_norm", ["head", "projection"])
def test_normalised_queries_do_not_depend_on_the_scale_of_their_matrix(tiny, qk_norm):
    tokens_BT = tiny.tokens(length=6)
    backbone = make_variant(tiny, qk_norm=qk_norm)
    run = jax.jit(lambda backbone: backbone(tokens_BT))
    before = np.asarray(run(backbone))
    for layer in backbone.layers:
        layer.attention.w_q[...] = 1000 * layer.attention.w_q[...]
        layer.attention.w_k[...] = 1000 * layer.attention.w_k[...]
    scaled = np.asarray(run(backbone))
    # What is left of 1000 is eps = 1e-5 beside mean squares of about 1.
    np.testing.assert_allclose(scaled, before, atol=1e-3)


def test_norms_after_bound_what_a_layer_adds(tiny):
    tokens_BT = tiny.tokens(length=6)
    backbone = make_variant(tiny, norm_placement="after")
    embedded_BTD = backbone.embed[...][tokens_BT]
    grown_BTD, _ = jax.jit(lambda backbone: backbone.trunk(tokens_BT))(backbone)
    added = np.sqrt(np.square(np.asarray(grown_BTD - embedded_BTD)).mean(-1))
    assert (added <= 2.001).all()  # two outputs of unit root mean square
    assert (added > 0.1).all()


def test_stretched_frequencies_are_those_of_llama_3():
    """High frequencies stay, low ones are divided by the factor, those between are interpolated."""

    frequency = 2 * np.pi / np.array([4, 15.9, 16, 32, 64, 64.1, 1000])  # wavelengths
    ratio = np.asarray(_stretch(jnp.asarray(frequency), SCALING)) / frequency
    # 64 tokens of context: wavelengths below 16 are kept, above 64 stretched; 32 turns twice.
    between = 1 / 8 * (4 - 2) / 3 + (2 - 1) / 3
    np.testing.assert_allclose(ratio, [1, 1, 1, between, 1 / 8, 1 / 8, 1 / 8], rtol=1e-5)


def test_logits_do_not_depend_on_later_tokens(tiny):
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
    return backbone.run_layers(layers, x_BTD, backbone.own_feed_forward, 0, None)[0]


@pytest.mark.bits
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
        ({"depth": 3}, "config.depth"),
        ({"d_model": "32"}, "config.d_model"),
        ({"d_model": 1 << 40}, "config.d_model"),
        ({"n_layers": 1 << 20}, "config.n_layers"),
        ({"is_tied": 1}, "config.is_tied"),
        ({"rope_theta": float("inf")}, "config.rope_theta"),
        ({"rope_scaling": [8.0]}, "config.rope_scaling"),
        ({"norm_placement": "both"}, "config.norm_placement"),
        ({"qk_norm": "row"}, "config.qk_norm"),
        ({"dtype": "F16"}, "config.dtype"),
        ({"rope_scaling": {"factor": 2.0}}, "config.rope_scaling.low_frequency"),
        (
            {"rope_scaling": {**dataclasses.asdict(SCALING), "factor": 0.5}},
            "config.rope_scaling.factor",
        ),
        (
            {"rope_scaling": {**dataclasses.asdict(SCALING), "high_frequency": 1.0}},
            "config.rope_scaling.high_frequency",
        ),
    ],
)
def test_an_impossible_config_is_refused_by_field(tiny, change, field):
    with pytest.raises(ModelError) as caught:
        BackboneConfig.from_dict({**tiny.cfg.to_dict(), **change})
    assert caught.value.where == field


@pytest.mark.parametrize("changes", [{}, *VARIANTS.values()], ids=["plain", *VARIANTS])
def test_a_config_survives_plain_data(tiny, changes):
    cfg = dataclasses.replace(tiny.cfg, **changes)
    assert BackboneConfig.from_dict(cfg.to_dict()) == cfg


def test_fields_that_came_later_are_left_out_at_their_defaults():
    assert list(tiny_bytes().to_dict())[-1] == "norm_eps"
    assert tiny_bytes().slots == (2, 3, 4, 5)
