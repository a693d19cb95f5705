"""Text that the model writes is no evidence for any expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.interface import OutputMixture, SwitchingFilter
from composable.model import composed
from composable.model.decoding import Decoder
from composable.model.mix import mix_state, trace_mix
from composable.model.occupancy import (
    HORIZON,
    WRITING_RATE,
    empty_occupancy,
    switch_targets,
    update_occupancy,
)
from composable.model.router import switching_posterior
from composable.model.safe import safe_state, trace_safe
from composable.model.sampling import Sampling
from composable.model.tokenizer import ByteTokenizer

pytestmark = pytest.mark.slow

FILTER = SwitchingFilter(power=0.5, backbone_prior=0.6, switch_rate=0.05)
MODES = {"mix": (trace_mix, mix_state), "safe": (trace_safe, safe_state)}
# Sums of probabilities in float32.
ROUNDING = 1e-5


def smooth(likelihood_TE, prior_E, rate):
    """Return the smoothed posterior of a chain with restarts, shape TE, by forward and backward."""
    n = len(prior_E)
    step_EE = (1 - rate) * np.eye(n) + rate * prior_E[None]
    alpha_E, forward = prior_E, []
    for likelihood_E in likelihood_TE:
        # The chain is observed, and then moves, as in the filter.
        alpha_E = (alpha_E * likelihood_E) @ step_EE
        alpha_E = alpha_E / alpha_E.sum()
        forward.append(alpha_E)
    beta_E, smoothed = np.ones(n), []
    for t in reversed(range(len(likelihood_TE))):
        smoothed.append(forward[t] * beta_E / (forward[t] @ beta_E))
        beta_E = likelihood_TE[t] * (step_EE @ beta_E)
    return np.array(smoothed[::-1])


def test_the_statistic_counts_smoothed_tokens():
    rng = np.random.default_rng(0)
    prior_E, rate = np.array([0.7, 0.2, 0.1]), 0.1
    evidence_TE = rng.normal(size=(12, 3))
    posterior_BTE = switching_posterior(
        jnp.asarray(evidence_TE)[None],
        jnp.log(prior_E)[None],
        jnp.log(prior_E),
        power=1.0,
        rate=rate,
    )
    occupancy_BEO = empty_occupancy(1, 3)
    for piece in (slice(0, 5), slice(5, 12)):
        occupancy_BEO = update_occupancy(
            occupancy_BEO, posterior_BTE[:, piece], jnp.log(prior_E)[None], rate
        )
    counts_T = (1 - 1 / HORIZON) ** np.arange(11, -1, -1)
    expected_E = counts_T @ smooth(np.exp(evidence_TE), prior_E, rate)
    found_E = np.exp(posterior_BTE[0, -1]) @ occupancy_BEO[0]
    np.testing.assert_allclose(found_E, expected_E, rtol=ROUNDING)
    target_BE = switch_targets(occupancy_BEO, posterior_BTE[:, -1], jnp.log(prior_E))
    np.testing.assert_allclose(
        np.exp(target_BE[0]), (expected_E + prior_E) / (counts_T.sum() + 1), rtol=ROUNDING
    )


@pytest.fixture(scope="module")
def model(tiny):
    mixture = OutputMixture(prior=0.2, rate=0.05)
    experts = (tiny.expert("a"), tiny.expert("b", scout_noise=3.0), tiny.expert("c"))
    return tiny.model(*experts, mix=FILTER, output_mixture=mixture)


def read(model, mode, tokens_T):
    """Return the state of a document that is being decoded, after some given tokens."""
    step, start = MODES[mode]
    state = start(model.parts, 1, 128)
    return jax.jit(step)(model.parts, jnp.asarray(tokens_T)[None], state, jnp.bool_(False))[2]


def write(model, mode, state, tokens):
    """Return the weights after each of some tokens, as if the model had drawn them."""
    step, weights = jax.jit(MODES[mode][0]), []
    for token in tokens:
        token_BT = jnp.full((1, 1), token, jnp.int32)
        _, weight_BTE, state = step(model.parts, token_BT, state, jnp.bool_(True))
        weights.append(np.asarray(weight_BTE[0, 0]))
    return np.array(weights), state


@pytest.mark.parametrize("mode", MODES)
def test_no_weight_depends_on_what_the_model_wrote(model, tiny, mode):
    state = read(model, mode, tiny.tokens(batch=1)[0])
    rng = np.random.default_rng(1)
    one, other = (write(model, mode, state, rng.integers(1, 256, 8))[0] for _ in range(2))
    if mode == "mix":
        np.testing.assert_array_equal(one, other)
    else:  # which paths are awake is decided by the track records, which did not move either
        np.testing.assert_array_equal(one > 0, other > 0)
        np.testing.assert_allclose(one, other, rtol=ROUNDING)


@pytest.mark.parametrize("mode", MODES)
def test_weights_move_towards_what_the_document_held(model, tiny, mode):
    state = read(model, mode, tiny.tokens(batch=1)[0])
    chain = state.router if mode == "mix" else state
    prior_E = (
        composed.log_prior(model.parts.bank.alive_E, FILTER.backbone_prior)
        if mode == "mix"
        else composed.log_prior_of(model.parts)
    )
    order_E = np.argsort(model.parts.bank.key_E)
    before_E = np.asarray(chain.posterior_BE[0])
    if mode == "mix":
        before_E = before_E[order_E]
    target_E = np.exp(
        switch_targets(chain.occupancy_BEO, before_E[None], np.asarray(prior_E)[order_E])[0]
    )
    _, after = write(model, mode, state, range(1, 11))
    posterior_E = np.exp((after.router if mode == "mix" else after).posterior_BE[0])
    posterior_E = posterior_E[order_E] if mode == "mix" else posterior_E
    decayed = (1 - WRITING_RATE) ** 10
    expected_E = target_E + decayed * (np.exp(before_E) - target_E)
    np.testing.assert_allclose(posterior_E, expected_E, rtol=1e-4, atol=1e-6)


def test_the_model_writes_with_evidence_at_full_strength(model, tiny):
    weights, state = write(model, "mix", read(model, "mix", tiny.tokens(batch=1)[0]), range(1, 6))
    prior_E = np.exp(composed.log_prior(model.parts.bank.alive_E, FILTER.backbone_prior))
    posterior_E = np.exp(state.router.posterior_BE[0])
    is_mixed_E = weights[-1] > 0
    expected_E = np.zeros_like(posterior_E)
    ratio_E = posterior_E[is_mixed_E] / prior_E[is_mixed_E]
    expected_E[is_mixed_E] = prior_E[is_mixed_E] * ratio_E ** (1 / FILTER.power)
    assert is_mixed_E.sum() > 1
    np.testing.assert_allclose(weights[-1], expected_E / expected_E.sum(), rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_given_text_is_evidence_again_after_written_text(model, tiny, mode):
    tokens_T = tiny.tokens(batch=1)[0]
    _, state = write(model, mode, read(model, mode, tokens_T), range(1, 9))
    step = jax.jit(MODES[mode][0])
    found = []
    for seed in (3, 4):
        given_BT = jnp.asarray(tiny.tokens(seed=seed, batch=1)[:, 1:9])
        found.append(step(model.parts, given_BT, state, jnp.bool_(False))[1][0, -1])
    assert np.abs(np.asarray(found[0]) - np.asarray(found[1])).max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_safe_text_is_near_the_backbones(model, tiny, seed):
    """Total variation from the backbone's path is at most 1 - w_0 plus the scouts' share."""
    state = read(model, "safe", tiny.tokens(seed=seed, batch=1)[0])
    step = jax.jit(trace_safe)
    mixture = model.interface.output_mixture
    order_E = np.argsort(model.parts.bank.key_E)
    prior_E = np.asarray(composed.log_prior_of(model.parts))[order_E]
    target_BE = switch_targets(state.occupancy_BEO, state.posterior_BE, prior_E)
    start, target = np.exp(state.posterior_BE[0, 0]), np.exp(target_BE[0, 0])
    share = float(state.output_mixture.share_B[0])
    rng = np.random.default_rng(seed)
    for n in range(1, 9):
        token_BT = jnp.asarray(rng.integers(1, 256, (1, 1)), jnp.int32)
        log_prob_BTV, _, state = step(model.parts, token_BT, state, jnp.bool_(True))
        own = target + (1 - WRITING_RATE) ** n * (start - target)
        share = mixture.prior + (1 - mixture.rate) * (share - mixture.prior)
        backbone_V = np.exp(np.asarray(state.log_prob_EBV[0, 0]))
        distance = 0.5 * np.abs(np.exp(np.asarray(log_prob_BTV[0, 0])) - backbone_V).sum()
        assert distance <= 1 - own + share + ROUNDING


def test_a_decoder_gives_the_weights_of_one_that_drew_in_two_calls(model, tiny):
    prompt = tiny.tokens(batch=1)[0]

    def decoder():
        sampling = Sampling(temperature=1.0, seed=3)
        return Decoder(model.parts, ByteTokenizer(), length=64, sampling=sampling)

    whole, parted = decoder(), decoder()
    whole.feed(prompt)
    parted.feed(prompt)
    expected = list(whole.draw(8))
    found = list(parted.draw(4))
    parted.feed([])
    found += list(parted.draw(4))
    assert [drawn.token for drawn in found] == [drawn.token for drawn in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.weight_E, other.weight_E)


def test_scoring_carries_no_statistic(tiny):
    model = tiny.model(tiny.expert("a"), mix=dataclasses.replace(FILTER, floor=0.1))
    assert mix_state(model.parts, 1).router.occupancy_BEO is None
    assert safe_state(model.parts, 1).occupancy_BEO is None
