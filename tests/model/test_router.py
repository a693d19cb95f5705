from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.model import composed
from composable.model.router import (
    NEVER,
    RouterState,
    ScoutBank,
    choose,
    dense_weights,
    empty_state,
    evidence,
    log_prior,
    switching_posterior,
    track_record,
)

score_tokens = jax.jit(evidence)
accumulate = jax.jit(track_record)
# Softmax weights are sums of a handful of float32 numbers below one.
FLOAT32_ROUNDING = 1e-6


def reference_track(evidence_TE, discount):
    record, rows = np.zeros(evidence_TE.shape[1]), []
    for row_E in evidence_TE:
        record = discount * record + row_E
        rows.append(record)
    return np.array(rows)


@pytest.mark.parametrize("discount", [1.0, 0.95, 0.5])
def test_track_record_is_the_discounted_sum(discount):
    evidence_BTE = np.random.default_rng(0).normal(-3, 1, (2, 40, 3)).astype(np.float32)
    record_BTE = accumulate(jnp.asarray(evidence_BTE), jnp.zeros((2, 3)), discount)
    expected_BTE = np.stack([reference_track(x.astype(np.float64), discount) for x in evidence_BTE])
    # 40 additions in float32 of numbers that reach 120.
    np.testing.assert_allclose(record_BTE, expected_BTE, rtol=1e-5)


@pytest.mark.bits
def test_track_record_goes_on_where_it_stopped():
    evidence_BTE = jnp.asarray(np.random.default_rng(1).normal(-3, 1, (2, 20, 3)), jnp.float32)
    whole_BTE = accumulate(evidence_BTE, jnp.zeros((2, 3)), 0.9)
    first_BTE = accumulate(evidence_BTE[:, :7], jnp.zeros((2, 3)), 0.9)
    second_BTE = accumulate(evidence_BTE[:, 7:], first_BTE[:, -1], 0.9)
    np.testing.assert_array_equal(whole_BTE, np.concatenate([first_BTE, second_BTE], axis=1))


def reference_weights(evidence_TE, prior_E, power, rate):
    """Return the weights of a hidden Markov chain by its forward recursion, in float64."""
    weight_E, rows = prior_E, []
    for row_E in evidence_TE:
        weight_E = weight_E * np.exp(power * (row_E - row_E.max()))
        weight_E = (1 - rate) * weight_E / weight_E.sum() + rate * prior_E
        rows.append(weight_E)
    return np.array(rows)


@pytest.mark.parametrize(("power", "rate"), [(1.0, 1e-4), (0.35, 0.003), (0.5, 0.2)])
@pytest.mark.bits
def test_the_switching_filter_is_the_forward_recursion(power, rate):
    evidence_TE = np.random.default_rng(2).normal(-3, 2, (60, 3)).astype(np.float32)
    prior_E = np.array([0.8, 0.1, 0.1])
    log_prior_E = jnp.log(jnp.asarray(prior_E, jnp.float32))

    def follow(evidence_BTE, before_BE):
        return switching_posterior(evidence_BTE, before_BE, log_prior_E, power=power, rate=rate)

    whole_BTE = follow(evidence_TE[None], log_prior_E[None])
    expected_TE = reference_weights(evidence_TE.astype(np.float64), prior_E, power, rate)
    np.testing.assert_allclose(np.exp(whole_BTE[0]), expected_TE, rtol=1e-4)
    # No weight falls below the rate times its prior, so that it is back soon after a switch.
    assert (expected_TE >= rate * prior_E).all()
    first_BTE = follow(evidence_TE[None, :25], log_prior_E[None])
    second_BTE = follow(evidence_TE[None, 25:], first_BTE[:, -1])
    np.testing.assert_array_equal(whole_BTE, np.concatenate([first_BTE, second_BTE], axis=1))


def random_scouts(n_experts=3, d=4, width=5, n_classes=6, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(d, width), (width,), (width, n_classes), (n_classes,)]
    return ScoutBank(*(jnp.asarray(rng.normal(size=(n_experts, *s)), jnp.float32) for s in shapes))


def test_evidence_is_each_scouts_log_probability_one_position_earlier():
    scouts = random_scouts()
    rng = np.random.default_rng(1)
    feature_BTD = rng.normal(size=(2, 5, 4)).astype(np.float32)
    classes_BT = rng.integers(0, 6, (2, 5))
    found_BTE = score_tokens(scouts, jnp.asarray(feature_BTD), classes_BT, empty_state(2, 3, 4))
    for e in range(3):
        w_in, b_in, w_out, b_out = (np.asarray(x[e]) for x in scouts)
        hidden = np.asarray(jax.nn.gelu(feature_BTD @ w_in + b_in))
        logits = hidden @ w_out + b_out
        log_prob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for t in range(1, 5):
            expected_B = log_prob[np.arange(2), t - 1, classes_BT[:, t]]
            # Logits of order 10.
            np.testing.assert_allclose(found_BTE[:, t, e], expected_B, rtol=1e-4)
    assert (np.asarray(found_BTE[:, 0]) == 0).all(), "the first token is no evidence"


@pytest.mark.bits
def test_evidence_of_a_scout_depends_on_its_own_width_alone():
    scouts = random_scouts(n_experts=4, width=8)
    rng = np.random.default_rng(1)
    feature_BTD = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    classes_BT, state = rng.integers(0, 6, (2, 5)), empty_state(2, 4, 4)
    width_E = jnp.asarray([3, 8, 0, 4])
    is_padding_EW = np.arange(8) >= np.asarray(width_E)[:, None]
    padded = scouts._replace(
        w_in_EDW=jnp.where(is_padding_EW[:, None], 0, scouts.w_in_EDW),
        b_in_EW=jnp.where(is_padding_EW, 0, scouts.b_in_EW),
        w_out_EWC=jnp.where(is_padding_EW[..., None], 0, scouts.w_out_EWC),
    )
    found_BTE = np.asarray(score_tokens(padded, feature_BTD, classes_BT, state, width_E))
    whole_BTE = score_tokens(padded, feature_BTD, classes_BT, state)
    # Fewer zeros are added up, perhaps in another order; logits are of order 10.
    alive = [0, 1, 3]
    np.testing.assert_allclose(found_BTE[..., alive], whole_BTE[..., alive], rtol=1e-5)
    np.testing.assert_allclose(found_BTE[:, 1:, 2], -np.log(6), rtol=FLOAT32_ROUNDING)

    # What is more than the program for its width needs is not read, and neither are peers.
    spoilt = padded._replace(w_out_EWC=padded.w_out_EWC.at[:, 4:].set(jnp.nan).at[1:3].set(jnp.nan))
    again_BTE = np.asarray(score_tokens(spoilt, feature_BTD, classes_BT, state, width_E))
    np.testing.assert_array_equal(again_BTE[..., [0, 3]], found_BTE[..., [0, 3]])
    few = jax.tree.map(lambda x: x[3:], padded)
    alone_BT1 = score_tokens(few, feature_BTD, classes_BT, empty_state(2, 1, 4), width_E[3:])
    np.testing.assert_array_equal(alone_BT1[..., 0], found_BTE[..., 3])


def test_evidence_of_a_broken_scout_is_finite_and_worse_than_any_other():
    broken = [jnp.full((4, 5), jnp.nan), jnp.full((4, 5), jnp.inf), jnp.full((4, 5), 3e38)]
    scouts = random_scouts()
    scouts = scouts._replace(w_in_EDW=jnp.stack(broken))
    feature_BTD = jnp.ones((1, 6, 4))
    found_BTE = np.asarray(
        score_tokens(scouts, feature_BTD, np.zeros((1, 6), int), empty_state(1, 3, 4))
    )
    assert np.isfinite(found_BTE).all()
    assert (found_BTE[:, 1:, :2] < -1000).all()


def test_a_track_record_of_absurd_predictions_stays_finite():
    scouts = random_scouts(n_experts=1)
    scouts = scouts._replace(b_out_EC=jnp.full((1, 6), -1e38).at[:, 1].set(1e38))
    state = empty_state(1, 1, 4)
    found_BTE = score_tokens(scouts, jnp.ones((1, 50, 4)), np.zeros((1, 50), int), state)
    assert np.isfinite(np.asarray(accumulate(found_BTE, state.track_BE, 1.0))).all()


def test_weights_sum_to_one_over_the_top_k_and_leave_out_the_dead():
    rng = np.random.default_rng(2)
    score_BTE = rng.normal(0, 5, (3, 7, 6)).astype(np.float32)
    score_BTE[..., 4] = NEVER
    key_E = jnp.arange(6)
    for k in (1, 3, 6):
        choice = jax.jit(choose, static_argnums=2)(jnp.asarray(score_BTE), key_E, k)
        weight_BTE = np.asarray(dense_weights(choice, 6))
        np.testing.assert_allclose(weight_BTE.sum(-1), 1, atol=FLOAT32_ROUNDING)
        assert ((weight_BTE > 0).sum(-1) <= k).all()
        assert (weight_BTE[..., 4] == 0).all()
        best_BTE = np.sort(score_BTE, axis=-1)[..., -k:]
        chosen_BTE = np.take_along_axis(score_BTE, np.asarray(choice.expert_BTJ), axis=-1)
        np.testing.assert_array_equal(np.sort(chosen_BTE, axis=-1), best_BTE)


def test_who_has_less_weight_than_the_floor_is_not_chosen_and_the_best_always_is():
    score_BTE = jnp.log(jnp.asarray([[[0.04, 0.06, 0.6, 0.3], [0.25, 0.25, 0.25, 0.25]]]))
    choice = choose(score_BTE, jnp.arange(4), k=4, floor=0.05)
    weight_BTE = np.asarray(dense_weights(choice, 4))
    kept_E = np.array([0, 0.06, 0.6, 0.3])
    np.testing.assert_allclose(weight_BTE[0, 0], kept_E / kept_E.sum(), atol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(weight_BTE[0, 1], 0.25, atol=FLOAT32_ROUNDING)
    assert choice.expert_BTJ[0, 0].tolist() == [2, 3, 1, 4], "4 is the index of no expert"
    alone = choose(score_BTE, jnp.arange(4), k=4, floor=0.7)
    assert np.asarray(dense_weights(alone, 4))[0].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_a_chain_that_never_switches_is_bayes():
    evidence_BTE = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20, 3)), jnp.float32)
    prior_E = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    found_BTE = switching_posterior(evidence_BTE, prior_E[None], prior_E, power=1.0, rate=1e-30)
    expected_BTE = jax.nn.log_softmax(prior_E + evidence_BTE.cumsum(1))
    np.testing.assert_allclose(found_BTE, expected_BTE, rtol=1e-4, atol=1e-4)


def test_a_margin_lowers_the_weight_of_scouts_no_better_than_the_backbones():
    rng = np.random.default_rng(5)
    evidence_BTE = jnp.asarray(rng.normal(-2, 1, (16, 400, 3)), jnp.float32)
    prior_E = log_prior(jnp.ones(3, bool), 0.5)
    start_BE = jnp.broadcast_to(prior_E, (16, 3))

    def expert_weights(evidence_BTE, margin):
        margin_E = jnp.asarray([0.0, margin, margin])
        follow = partial(switching_posterior, power=0.35, rate=0.01, margin_E=margin_E)
        return np.exp(np.asarray(follow(evidence_BTE, start_BE, prior_E)))[..., 1:].sum(-1)

    wandering, sunk = (expert_weights(evidence_BTE, margin) for margin in (0.0, 0.5))
    assert sunk.mean() < wandering.mean() / 3
    better_BTE = evidence_BTE.at[..., 2].add(1.0)  # a nat per token better: by more than the margin
    assert expert_weights(better_BTE, 0.5)[:, 100:].mean() > 0.9


def test_asking_for_more_experts_than_there_are_takes_all():
    choice = choose(jnp.zeros((1, 1, 2)), jnp.arange(2), k=5)
    assert choice.expert_BTJ.shape == (1, 1, 2)


def test_exact_ties_are_settled_by_key_and_not_by_slot():
    score_BTE = jnp.zeros((1, 1, 4))
    for key_E in ([0, 7, 3, 9], [9, 3, 7, 0], [3, 0, 9, 7]):
        choice = choose(score_BTE, jnp.asarray(key_E, jnp.uint32), k=2)
        chosen = [key_E[e] for e in np.asarray(choice.expert_BTJ).ravel()]
        assert chosen == [0, 3]


@pytest.mark.parametrize("alive", [(1, 1, 1, 1), (1, 0, 1, 0), (1, 0, 0, 1)])
def test_prior_gives_the_backbone_its_share_and_the_living_the_rest(alive):
    alive_E = np.array(alive, bool)
    prior_E = np.exp(log_prior(jnp.asarray(alive_E), 0.25))
    assert prior_E[0] == pytest.approx(0.25)
    assert (prior_E[~alive_E] == 0).all()
    assert prior_E[1:][alive_E[1:]] == pytest.approx(0.75 / alive_E[1:].sum())


@pytest.mark.parametrize(
    ("n_experts", "own", "each"), [(1, 0.9, 0.1), (3, 0.7, 0.1), (15, 0.25, 0.05)]
)
def test_no_experts_prior_exceeds_the_most_that_one_may_have(n_experts, own, each):
    prior_E = np.exp(log_prior(jnp.ones(n_experts + 1, bool), 0.25, most=0.1))
    np.testing.assert_allclose(prior_E, [own, *[each] * n_experts], rtol=1e-5)


def test_no_expert_can_expect_to_look_better_than_the_backbone_on_the_backbones_own_text(tiny):
    """With discount 1, prod q_i / q_0 is a martingale under the backbone's scout.

    So its mean is 1, and by Ville's inequality it ever exceeds 1/alpha with probability at most
    alpha.
    """
    samples, length, alpha = 2048, 9, 0.2
    experts = [tiny.expert(name, scout_noise=0.25) for name in ("a", "b")]
    for expert in experts:  # near the backbone's scout, so that the ratios have a small variance
        for name in ("w_in", "b_in", "w_out", "b_out"):
            own = getattr(tiny.backbone.scout, name)[...]
            getattr(expert.scout, name)[...] += own
    parts = tiny.model(*experts, discount=1.0).parts
    backbone = parts.backbone

    @jax.jit
    def sample_and_track(key):
        def draw(t, tokens_BT):
            x_BTD, _ = backbone.trunk(tokens_BT)
            log_prob_BTC = backbone.scout(backbone.features(x_BTD))
            drawn_B = jax.random.categorical(jax.random.fold_in(key, t), log_prob_BTC[:, t - 1])
            return tokens_BT.at[:, t].set(drawn_B)

        tokens_BT = jnp.zeros((samples, length), jnp.int32)
        tokens_BT = jax.lax.fori_loop(1, length, draw, tokens_BT)
        state = empty_state(samples, parts.bank.capacity, parts.interface.d_model)
        return composed.track_records(parts, tokens_BT, state)

    track_BTE = np.asarray(sample_and_track(jax.random.key(0)), np.float64)
    advantage_BTE = np.exp(track_BTE[..., 1:3] - track_BTE[..., :1])
    final_BE = advantage_BTE[:, -1]
    # Five standard errors of the mean; the ratios must really differ from one for this to bite.
    error_E = 5 * final_BE.std(axis=0) / np.sqrt(samples)
    assert (final_BE.std(axis=0) > 0.5).all()
    assert (error_E < 0.3).all()
    assert (np.abs(final_BE.mean(axis=0) - 1) < error_E).all()
    exceeding_E = (advantage_BTE.max(axis=1) > 1 / alpha).mean(axis=0)
    assert (exceeding_E < alpha + 5 * np.sqrt(alpha * (1 - alpha) / samples)).all()
    assert (exceeding_E > 0).all()


def test_an_empty_state_has_seen_nothing():
    state = empty_state(2, 3, 4)
    assert isinstance(state, RouterState)
    assert not np.asarray(state.started_B).any()
    assert state.occupancy_BEO is None
    assert all((np.asarray(x) == 0).all() for x in state[:-1])
