import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.model.causal_attention import causal_attention
from composable.model.layers import place_tokens, rms_norm, rope, swiglu

# Float32 sums of a few hundred products, in another order than the reference's.
REORDERED_SUMS = 2e-5


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm_gives_unit_root_mean_square_at_any_scale():
    x_BTD = normal(0, 2, 3, 64) * np.float32([1e-1, 1, 1e4])[None, :, None]
    y_BTD = np.asarray(rms_norm(jnp.asarray(x_BTD), jnp.ones(64), eps=1e-12))
    np.testing.assert_allclose(np.sqrt((y_BTD**2).mean(-1)), 1, atol=REORDERED_SUMS)


def test_rms_norm_multiplies_by_its_scale_along_the_width():
    x_BTD, scale_D = jnp.asarray(normal(0, 1, 2, 8)), jnp.arange(8.0)
    ones_BTD = rms_norm(x_BTD, jnp.ones(8), eps=1e-5)
    np.testing.assert_array_equal(rms_norm(x_BTD, scale_D, eps=1e-5), ones_BTD * scale_D)


def test_rms_norm_computes_in_float32_whatever_comes_in():
    x_BTD = jnp.full((1, 1, 64), 300.0, jnp.float16)  # its square overflows float16
    y_BTD = rms_norm(x_BTD, jnp.ones(64, jnp.float16), eps=1e-5)
    assert y_BTD.dtype == jnp.float16
    np.testing.assert_allclose(y_BTD, 1, rtol=1e-3)  # float16 holds three digits


@pytest.mark.parametrize("shift", [1, 17, 400])
def test_rope_scores_depend_on_the_distance_only(tiny, shift):
    width = tiny.cfg.d_head
    q_BTNH, k_BTNH = (jnp.asarray(normal(seed, 1, 6, 2, width)) for seed in (1, 2))

    def scores(first):
        turned = (rope(x, place_tokens(tiny.cfg, 6, first)) for x in (q_BTNH, k_BTNH))
        return np.einsum("BTNH,BSNH->BNTS", *turned)

    # Angles of some hundred radians are known to about 1e-5 in float32, times scores of order 10.
    angle_rounding = 2e-3
    here, there = scores(0), scores(shift)
    np.testing.assert_allclose(here, there, atol=angle_rounding)
    assert not np.allclose(here, np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH), atol=0.1)


def test_rope_keeps_lengths_and_leaves_position_zero_alone(tiny):
    x_BTNH = jnp.asarray(normal(3, 1, 4, 2, tiny.cfg.d_head))
    y_BTNH = rope(x_BTNH, place_tokens(tiny.cfg, 4))
    np.testing.assert_array_equal(y_BTNH[:, 0], x_BTNH[:, 0])
    lengths = np.linalg.norm(x_BTNH, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(y_BTNH, axis=-1), lengths, rtol=REORDERED_SUMS)


def test_each_sine_is_made_once_for_all_layers_heads_and_rows(tiny):
    tokens_BT = jnp.zeros((3, 24), jnp.int32)
    program = jax.jit(lambda backbone: backbone(tokens_BT)).lower(tiny.backbone).compile().as_text()
    found = re.findall(r"= f32\[([\d,]*)\]\S* sine\(", program)
    assert found == [f"24,{tiny.cfg.d_head // 2}"]


def plain_attention(q_BTNH, k_BTKH, v_BTKH):
    """Attend with every key head repeated for its queries and the whole causal square computed."""
    n_tokens, n_heads = q_BTNH.shape[1:3]
    repeats = n_heads // k_BTKH.shape[2]
    k_BTNH, v_BTNH = np.repeat(k_BTKH, repeats, axis=2), np.repeat(v_BTKH, repeats, axis=2)
    score_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) / np.sqrt(q_BTNH.shape[-1])
    score_BNTS = np.where(np.tri(n_tokens, dtype=bool), score_BNTS, -np.inf)
    weight_BNTS = np.exp(score_BNTS - score_BNTS.max(-1, keepdims=True))
    weight_BNTS /= weight_BNTS.sum(-1, keepdims=True)
    return np.einsum("BNTS,BSNH->BTNH", weight_BNTS, v_BTNH)


@pytest.mark.parametrize("n_tokens", [127, 128, 129, 300])
def test_attention_in_blocks_equals_plain_attention_with_repeated_keys(n_tokens):
    q_BTNH = normal(4, 1, n_tokens, 4, 4)
    k_BTKH, v_BTKH = normal(5, 1, n_tokens, 2, 4), normal(6, 1, n_tokens, 2, 4)
    y_BTNH = jax.jit(causal_attention)(q_BTNH, k_BTKH, v_BTKH)
    expected_BTNH = plain_attention(*(x.astype(np.float64) for x in (q_BTNH, k_BTKH, v_BTKH)))
    np.testing.assert_allclose(y_BTNH, expected_BTNH, atol=REORDERED_SUMS)
    np.testing.assert_allclose(
        jax.vjp(causal_attention, q_BTNH, k_BTKH, v_BTKH)[0], expected_BTNH, atol=REORDERED_SUMS
    )


@pytest.mark.parametrize("n_tokens", [5, 130])
def test_the_gradient_of_attention_is_that_of_its_definition(n_tokens):
    arrays = [normal(seed, 2, n_tokens, n, 4) for seed, n in ((4, 6), (5, 2), (6, 2))]
    dy_BTNH = normal(7, 2, n_tokens, 6, 4)
    is_before_TS = jnp.tril(jnp.ones((n_tokens, n_tokens), bool))

    def attend(q_BTNH, k_BTKH, v_BTKH):
        k_BSNH, v_BSNH = jnp.repeat(k_BTKH, 3, axis=2), jnp.repeat(v_BTKH, 3, axis=2)
        score_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / 2
        p_BNTS = jax.nn.softmax(jnp.where(is_before_TS, score_BNTS, -jnp.inf))
        return jnp.einsum("BNTS,BSNH->BTNH", p_BNTS, v_BSNH)

    expected, found = (
        jax.jit(lambda *x, f=f: jax.vjp(f, *x)[1](jnp.asarray(dy_BTNH)))(*arrays)
        for f in (attend, causal_attention)
    )
    for slope, expected_slope in zip(found, expected, strict=True):
        np.testing.assert_allclose(slope, expected_slope, atol=REORDERED_SUMS)


def test_swiglu_is_its_formula():
    x_BTD, w_gate_DF = normal(7, 2, 3, 8), normal(8, 8, 16)
    w_up_DF, w_down_FD = normal(9, 8, 16), normal(10, 16, 8)
    gate_BTF = x_BTD @ w_gate_DF
    expected_BTD = (gate_BTF / (1 + np.exp(-gate_BTF)) * (x_BTD @ w_up_DF)) @ w_down_FD
    y_BTD = swiglu(*map(jnp.asarray, (x_BTD, w_gate_DF, w_up_DF, w_down_FD)))
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=1e-4, atol=1e-4)  # values of order 100
