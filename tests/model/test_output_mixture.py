"""The output mixture: by class, weighted by which predicted better, at a bounded cost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from composable.model.output_mixture import empty_output_mixture, mix_outputs

FLOAT32_ROUNDING = 1e-5
POWER, PRIOR, RATE = 0.6, 0.05, 0.01
BATCH, LENGTH, VOCAB, CLASSES, EXPERTS = 2, 30, 10, 4, 3
CLASS_MAP = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
run = jax.jit(partial(mix_outputs, power=POWER, prior=PRIOR, rate=RATE))


def draw_case(seed=0, n_classes=CLASSES):
    """Return a model's logits, scout log-probabilities, router weights and a text."""
    rng = np.random.default_rng(seed)
    logits_BTV = rng.normal(0, 3, (BATCH, LENGTH, VOCAB)).astype(np.float32)
    scout_log_prob_EBTC = jax.nn.log_softmax(rng.normal(0, 3, (EXPERTS, BATCH, LENGTH, n_classes)))
    weight_BTE = rng.dirichlet([0.5] * EXPERTS, (BATCH, LENGTH)).astype(np.float32)
    tokens_BT = rng.integers(0, VOCAB, (BATCH, LENGTH))
    return logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT


def mixture(case, class_map_V=CLASS_MAP, order_E=(0, 1, 2), state=None, started=False):
    logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT = case
    state = empty_output_mixture(BATCH, scout_log_prob_EBTC.shape[-1]) if state is None else state
    maps = jnp.asarray(class_map_V), jnp.asarray(order_E)
    classes_BT = jnp.asarray(class_map_V)[tokens_BT]
    started_B = jnp.full(BATCH, started)
    return run(logits_BTV, scout_log_prob_EBTC, weight_BTE, classes_BT, *maps, started_B, state)


def reference(case, class_map_V):
    """Return probabilities, token by token and class by class."""
    logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT = (
        np.asarray(x, np.float64) for x in case
    )
    prob_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(-1, keepdims=True)
    n_classes, found_BTV = scout_log_prob_EBTC.shape[-1], np.empty_like(prob_BTV)
    for b in range(BATCH):
        share, p_C, g_C = PRIOR, np.ones(n_classes), np.ones(n_classes)
        for t in range(LENGTH):
            c = class_map_V[int(tokens_BT[b, t])]
            if t:
                both = share * g_C[c], (1 - share) * p_C[c]
                share = (1 - RATE) * both[0] / sum(both) + RATE * PRIOR
            p_C = np.bincount(class_map_V, prob_BTV[b, t], n_classes)
            kept_weight_E = np.where(weight_BTE[b, t] < 1e-3, 0, weight_BTE[b, t])
            q_C = (1 - kept_weight_E[1:].sum()) * p_C
            q_C += sum(
                kept_weight_E[i] * np.exp(scout_log_prob_EBTC[i, b, t]) for i in range(1, EXPERTS)
            )
            g_C = p_C ** (1 - POWER) * q_C**POWER
            g_C /= g_C.sum()
            mixed_C = (1 - share) * p_C + share * g_C
            found_BTV[b, t] = prob_BTV[b, t] * (mixed_C / p_C)[class_map_V]
    return found_BTV


@pytest.mark.parametrize("class_map_V", [CLASS_MAP, np.arange(VOCAB)], ids=["classes", "tokens"])
def test_it_is_the_mixture_by_class_of_model_and_scouts(class_map_V):
    case = draw_case(n_classes=class_map_V.max() + 1)
    logits_BTV, _ = mixture(case, class_map_V)
    found_BTV = np.exp(np.asarray(logits_BTV, np.float64))
    found_BTV /= np.exp(np.asarray(case[0], np.float64)).sum(-1, keepdims=True)
    np.testing.assert_allclose(found_BTV.sum(-1), 1, atol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(found_BTV, reference(case, class_map_V), rtol=1e-4)


def test_it_goes_on_from_piece_to_piece():
    case = draw_case()
    whole_BTV, last = mixture(case)
    logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT = case
    state, pieces = None, []
    for at in (slice(0, 1), slice(1, 17), slice(17, LENGTH)):
        piece = (
            logits_BTV[:, at],
            scout_log_prob_EBTC[:, :, at],
            weight_BTE[:, at],
            tokens_BT[:, at],
        )
        found_BTV, state = mixture(piece, state=state, started=at.start > 0)
        pieces.append(found_BTV)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole_BTV, atol=FLOAT32_ROUNDING)
    for found, expected in zip(state, last, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("weight_E", [[1, 0, 0], [0.9985, 0.0009, 0.0006]])
@pytest.mark.bits
def test_without_an_expert_above_the_least_weight_nothing_changes(weight_E):
    logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT = draw_case()
    weight_BTE = np.broadcast_to(np.float32(weight_E), weight_BTE.shape)
    found_BTV, _ = mixture((logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT))
    np.testing.assert_array_equal(found_BTV, logits_BTV)


def test_no_scout_can_cost_a_document_more_than_the_bound():
    bound = -np.log(1 - PRIOR) - (LENGTH - 1) * np.log(1 - RATE * PRIOR)
    excesses = []
    for seed in range(30):
        logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT = draw_case(seed)
        if seed % 3:  # certain and wrong: always, or from the middle, after gaining a share
            wrong_from = 0 if seed % 3 == 1 else LENGTH // 2
            wrong_BT = np.roll(CLASS_MAP[tokens_BT], -1, axis=1)
            wrong_BT[:, wrong_from:] = (wrong_BT[:, wrong_from:] + 1) % CLASSES
            wrong_BTC = np.where(np.eye(CLASSES, dtype=bool)[wrong_BT], 0.0, -1e4)
            scout_log_prob_EBTC = np.broadcast_to(np.float32(wrong_BTC), scout_log_prob_EBTC.shape)
            weight_BTE = np.broadcast_to(np.float32([0.1, 0.5, 0.4]), weight_BTE.shape)
        case = logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT
        targets_BT1 = tokens_BT[:, 1:, None]
        cost, own = (
            -np.take_along_axis(
                np.asarray(jax.nn.log_softmax(x_BTV))[:, :-1], targets_BT1, axis=-1
            ).sum((1, 2))
            for x_BTV in (mixture(case)[0], logits_BTV)
        )
        excesses.extend(cost - own)
    assert max(excesses) <= bound + 1e-3
    assert max(excesses) > 0.5 * bound, "no case came near the bound: the cases are too easy"
    assert min(excesses) < -5, "no case gained"


def test_a_class_that_the_model_rules_out_stays_finite():
    """Model and scouts are each certain of another class, and the backbone has no weight."""
    logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT = draw_case()
    for sure in (20.0, 80.0, 500.0):
        logits_BTV = np.where(np.arange(VOCAB) == 1, sure, -sure).astype(np.float32)
        logits_BTV = np.broadcast_to(logits_BTV, (BATCH, LENGTH, VOCAB))
        sure_C = jnp.maximum(jax.nn.log_softmax(2 * sure * (np.arange(CLASSES) == 2)), -1e4)
        scout_log_prob_EBTC = jnp.broadcast_to(sure_C, scout_log_prob_EBTC.shape)
        weight_BTE = np.broadcast_to(np.float32([0, 1, 0]), weight_BTE.shape)
        found_BTV, state = mixture((logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT))
        assert np.isfinite(found_BTV).all()
        assert all(np.isfinite(x).all() for x in state)


@pytest.mark.bits
def test_the_order_of_entries_changes_no_bit():
    logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT = draw_case()
    expected_BTV, _ = mixture((logits_BTV, scout_log_prob_EBTC, weight_BTE, tokens_BT))
    swapped = (
        logits_BTV,
        scout_log_prob_EBTC[np.array([0, 2, 1])],
        weight_BTE[..., [0, 2, 1]],
        tokens_BT,
    )
    found_BTV, _ = mixture(swapped, order_E=(0, 2, 1))
    np.testing.assert_array_equal(found_BTV, expected_BTV)
