"""Composition: causality, isolation, limits of adversarial experts, safe mode's bound.

Most tests run the same two documents of 24 tokens, so that they share compiled programs.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from composable.interface import OutputMixture, SwitchingFilter
from composable.model import bank as banks
from composable.model import composed
from composable.model import mix as mix_mode
from composable.model import safe as safe_mode
from composable.model.layers import swiglu
from composable.model.router import ScoutBank

pytestmark = pytest.mark.slow

track_records = jax.jit(
    lambda parts, tokens_BT: composed.track_records(
        parts, tokens_BT, mix_mode.mix_state(parts, tokens_BT.shape[0]).router
    )
)


@pytest.fixture(scope="module")
def experts(tiny):
    return {name: tiny.expert(name) for name in ("a", "b", "c")}


@pytest.fixture(scope="module")
def model(tiny, experts):
    return tiny.model(*experts.values())


MODES = {
    "mix": lambda model, tokens_BT: model(tokens_BT),
    "safe": lambda model, tokens_BT: model.safe(tokens_BT),
    "route": lambda model, tokens_BT: model.route(tokens_BT),
    "backbone": lambda model, tokens_BT: model.path(tokens_BT),
}
by_mode = pytest.mark.parametrize("mode", MODES)


@by_mode
@pytest.mark.bits
def test_later_tokens_do_not_change_earlier_outputs(tiny, model, mode):
    tokens_BT, at = tiny.tokens(), 10
    changed_BT = tokens_BT.copy()
    changed_BT[:, at:] = tiny.tokens(seed=1)[:, at:]
    before, after = (np.asarray(MODES[mode](model, x)) for x in (tokens_BT, changed_BT))
    if mode == "mix":
        # Rows of one expert are multiplied together, so another later token may be another row
        # of the same product, and can change its rounding by a unit in the last place.
        np.testing.assert_allclose(before[:, :at], after[:, :at], atol=1e-5)
    else:
        np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert (before[:, at:] != after[:, at:]).any(axis=(0, 2)).all()


@pytest.mark.bits
def test_track_records_of_one_document_do_not_depend_on_another(tiny, model):
    together_BTE = track_records(model.parts, tiny.tokens())
    swapped_BTE = track_records(model.parts, tiny.tokens()[::-1])
    np.testing.assert_array_equal(together_BTE, swapped_BTE[::-1])


@pytest.mark.bits
def test_track_records_are_bit_identical_with_any_other_experts(tiny, experts):
    tokens_BT, alone = tiny.tokens(), {}
    for name, expert in experts.items():
        model = tiny.model(expert)
        alone[name] = np.asarray(track_records(model.parts, tokens_BT))[..., 1]
        alone["backbone"] = np.asarray(track_records(model.parts, tokens_BT))[..., 0]
    adversarial = tiny.expert("adversarial", noise=1e18, scout_noise=1e6)
    for order in itertools.permutations(experts):
        ordered = [experts[name] for name in order]
        for plugged, capacity in ((ordered, 4), (ordered[:2], 4), ([adversarial, *ordered], 8)):
            model = tiny.model(*plugged, capacity=capacity)
            track_BTE = np.asarray(track_records(model.parts, tokens_BT))
            for name in alone.keys() & set(model.names):
                index = model.names.index(name)
                np.testing.assert_array_equal(track_BTE[..., index], alone[name])


@by_mode
@pytest.mark.bits
def test_removing_restores_every_bit(tiny, experts, mode):
    tokens_BT = tiny.tokens()
    model = tiny.model(experts["a"], experts["b"])
    before = np.asarray(MODES[mode](model, tokens_BT))
    model.install(experts["c"])
    between = np.asarray(MODES[mode](model, tokens_BT))
    assert mode == "backbone" or (before != between).any()
    model.remove("c")
    np.testing.assert_array_equal(MODES[mode](model, tokens_BT), before)
    model.remove("a")
    model.install(experts["a"])
    np.testing.assert_array_equal(MODES[mode](model, tokens_BT), before)


@pytest.mark.parametrize("mode", ["mix", "safe"])
@pytest.mark.bits
def test_the_order_of_installation_changes_no_bit(tiny, experts, mode):
    tokens_BT, expected = tiny.tokens(), None
    for order in itertools.permutations(experts):
        model = tiny.model(*(experts[name] for name in order))
        found = np.asarray(MODES[mode](model, tokens_BT))
        expected = found if expected is None else expected
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["mix", "safe"])
@pytest.mark.bits
def test_the_order_of_installation_changes_no_bit_when_all_experts_tie(tiny, experts, mode):
    scout = experts["a"].scout
    twins = [dataclasses.replace(expert, scout=scout) for expert in experts.values()]
    tokens_BT = tiny.tokens()
    found = [MODES[mode](tiny.model(*order), tokens_BT) for order in itertools.permutations(twins)]
    for logits_BTV in found:
        np.testing.assert_array_equal(logits_BTV, found[0])


@pytest.mark.bits
def test_spare_capacity_changes_no_bit(tiny, experts):
    tokens_BT = tiny.tokens()
    small, large = (tiny.model(*experts.values(), capacity=capacity) for capacity in (4, 8))
    np.testing.assert_array_equal(small(tokens_BT), large(tokens_BT))


def test_route_gives_weight_to_installed_experts_only(tiny, experts):
    model = tiny.model(*experts.values())
    model.remove("b")
    weight_BTE = np.asarray(model.route(tiny.tokens()))
    np.testing.assert_allclose(weight_BTE.sum(-1), 1, atol=1e-6)  # float32 softmax
    assert ((weight_BTE > 0).sum(-1) <= model.interface.top_k).all()
    assert (weight_BTE[..., model.names.index(None)] == 0).all()


def test_route_is_the_softmax_of_prior_and_track_record(tiny, model):
    tokens_BT = tiny.tokens()
    prior = model.interface.backbone_prior
    track_BTE = np.asarray(track_records(model.parts, tokens_BT), np.float64)
    score_BTE = track_BTE + np.log([prior, *[(1 - prior) / 3] * 3])
    second_BT1 = np.sort(score_BTE, axis=-1)[..., -2:-1]
    score_BTE = np.where(score_BTE >= second_BT1, score_BTE, -np.inf)
    weight_BTE = np.exp(score_BTE - score_BTE.max(-1, keepdims=True))
    weight_BTE /= weight_BTE.sum(-1, keepdims=True)
    weight_BTE[:, 0] = [1, 0, 0, 0]  # no evidence yet: the backbone alone
    # Scores of order 100 in float32 are known to 1e-5, and so are their differences.
    np.testing.assert_allclose(model.route(tokens_BT), weight_BTE, atol=1e-4)


FILTER = SwitchingFilter(power=0.35, backbone_prior=0.8, switch_rate=0.003)
SWITCHING = {"mix": FILTER}
FLOORED = {
    "mix": dataclasses.replace(FILTER, max_expert_prior=0.05, margin=0.1, floor=0.05, top_k=4)
}
WITH_SCOUTS = {**FLOORED, "output_mixture": OutputMixture(prior=0.3, rate=0.05, power=0.6)}


def test_route_by_the_switching_filter(tiny, experts):
    """The weights are those of the filter, updated with the evidence of each token."""
    model, tokens_BT = tiny.model(*experts.values(), **SWITCHING), tiny.tokens()
    plain = tiny.model(*experts.values(), discount=1.0)
    track_BTE = np.asarray(track_records(plain.parts, tokens_BT), np.float64)
    evidence_BTE = np.diff(track_BTE, axis=1, prepend=0)
    weight_BE = prior_E = np.array([0.8, *[0.2 / 3] * 3])
    found_BTE = np.asarray(model.route(tokens_BT))
    for t in range(1, tokens_BT.shape[1]):
        weight_BE = weight_BE * np.exp(0.35 * evidence_BTE[:, t])
        weight_BE = 0.997 * weight_BE / weight_BE.sum(-1, keepdims=True) + 0.003 * prior_E
        second_B1 = np.sort(weight_BE, axis=-1)[:, -2:-1]
        top_BE = np.where(weight_BE >= second_B1, weight_BE, 0)
        expected_BE = top_BE / top_BE.sum(-1, keepdims=True)
        np.testing.assert_allclose(found_BTE[:, t], expected_BE, atol=1e-4)
    np.testing.assert_array_equal(found_BTE[:, 0], [[1, 0, 0, 0]] * len(found_BTE))


@pytest.mark.parametrize("settings", [SWITCHING, FLOORED, WITH_SCOUTS])
@pytest.mark.bits
def test_the_switching_filter_keeps_bits_as_the_discount_does(tiny, experts, settings):
    tokens_BT = tiny.tokens()
    model = tiny.model(experts["a"], experts["b"], **settings)
    before = np.asarray(model(tokens_BT))
    assert (before != np.asarray(tiny.model(experts["a"], experts["b"])(tokens_BT))).any()
    for name in ("a", "b"):
        index = model.names.index(name)
        plain = tiny.model(experts["a"], experts["b"])
        found_BTE, expected_BTE = (track_records(m.parts, tokens_BT) for m in (model, plain))
        np.testing.assert_array_equal(found_BTE[..., index], expected_BTE[..., index])
    model.install(experts["c"])
    assert (np.asarray(model(tokens_BT)) != before).any()
    model.remove("c")
    np.testing.assert_array_equal(model(tokens_BT), before)
    full = [
        np.asarray(
            tiny.model(*(experts[name] for name in order), capacity=n, **settings)(tokens_BT)
        )
        for order, n in (("abc", 4), ("cab", 4), ("bca", 8))
    ]
    for logits_BTV in full[1:]:
        np.testing.assert_array_equal(logits_BTV, full[0])


def test_the_switching_filter_gives_a_broken_scout_no_weight(tiny, experts):
    tokens_BT = tiny.tokens()
    alone = tiny.model(experts["a"], **SWITCHING)
    scout = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), experts["b"].scout)
    broken = dataclasses.replace(experts["b"], scout=scout)
    model = tiny.model(experts["a"], broken, **SWITCHING)
    weight_BTE = np.asarray(model.route(tokens_BT))
    index = model.names.index("b")
    assert np.isfinite(weight_BTE).all()
    # All it can get is its share of the chain's restarts, which is rarely among the top k.
    assert weight_BTE[..., index].max() <= 0.003
    assert np.isfinite(np.asarray(model(tokens_BT))).all()
    assert np.isfinite(np.asarray(alone(tokens_BT))).all()


def test_an_expert_below_the_floor_has_no_row_and_the_others_share_its_weight(tiny, experts):
    tokens_BT = tiny.tokens()

    def model(**settings):
        return tiny.model(*experts.values(), mix=dataclasses.replace(FILTER, **settings))

    whole, floored = (model(top_k=4, floor=floor) for floor in (0.0, 0.2))
    weight_BTE, kept_BTE = (np.asarray(m.route(tokens_BT)) for m in (whole, floored))
    assert (weight_BTE[:, 1:] > 0).all(), "four of four"
    expected_BTE = np.where(weight_BTE >= 0.2, weight_BTE, 0)
    expected_BTE /= expected_BTE.sum(-1, keepdims=True)
    np.testing.assert_allclose(kept_BTE, expected_BTE, atol=1e-5)
    made = {m: sum(x.made for x in m.contributions(tokens_BT).values()) for m in (whole, floored)}
    n_slots = len(tiny.interface.slots)
    assert made[floored] == (kept_BTE > 0).sum() * n_slots < made[whole]
    # With one choice, mix is the path of the expert with the largest weight.
    alone = model(top_k=4, floor=0.99)
    single = model(top_k=1)
    np.testing.assert_array_equal(alone.route(tokens_BT), single.route(tokens_BT))
    # Rows of one expert are multiplied in blocks of another size where there are four choices.
    np.testing.assert_allclose(alone(tokens_BT), single(tokens_BT), atol=1e-4)


@pytest.mark.bits
def test_a_model_without_experts_is_its_backbone(tiny):
    model, tokens_BT = tiny.model(capacity=4), tiny.tokens()
    # The grouped kernel and the plain product sum in another order; logits are of order 5.
    np.testing.assert_allclose(model(tokens_BT), model.path(tokens_BT), atol=1e-4)
    log_prob_BTV = jax.nn.log_softmax(model.path(tokens_BT))
    np.testing.assert_allclose(model.safe(tokens_BT), log_prob_BTV, atol=1e-4)
    with_scouts, plain = (tiny.model(capacity=4, **s) for s in (WITH_SCOUTS, FLOORED))
    np.testing.assert_array_equal(with_scouts(tokens_BT), plain(tokens_BT))


def test_the_output_mixture_follows_scouts_that_predict_the_text(tiny, experts):
    """An expert whose scout always predicts one class, on a text of that class alone."""
    scout = jax.tree.map(jnp.zeros_like, experts["a"].scout)
    scout.b_out[...] = jnp.zeros(scout.b_out[...].shape).at[7].set(20.0)
    knowing = dataclasses.replace(experts["a"], scout=scout)
    tokens_BT = np.full((2, 24), 7, np.int32)
    plain, mixed = (tiny.model(knowing, **settings) for settings in (FLOORED, WITH_SCOUTS))
    for mode in ("mix", "safe"):
        before, after = (
            np.asarray(jax.nn.log_softmax(MODES[mode](m, tokens_BT)))[:, 10:, 7]
            for m in (plain, mixed)
        )
        assert (after > -0.5).all()
        assert (before < -2).all()


def test_the_only_expert_that_predicts_the_text_gets_all_weight(tiny):
    """A scout that is certain of byte 7, on a text of nothing else."""
    sure = tiny.expert("sure")
    sure.scout.b_out[...] = sure.scout.b_out[...].at[7].set(60.0)
    tokens_BT = np.full((2, 24), 7, np.int32)
    tokens_BT[:, 0] = 0
    model = tiny.model(sure)
    weight_TE = np.asarray(model.route(tokens_BT))[0]
    assert weight_TE[0, 0] == 1, "no expert has weight before the first prediction"
    assert (weight_TE[8:, 1] > 0.999).all()


# ------------------------------------------------------------------------------ adversarial experts

PLANS = ("sound", "copy", "huge body", "nan body", "inf body", "huge scout", "nan scout", "dead")


def random_bank(tiny, rng, plans, capacity=4):
    """Return a bank made directly, so that it may hold what no package could."""
    own = banks.empty_bank(tiny.backbone, tiny.interface, capacity)
    slots = [{name: np.array(stack) for name, stack in slot.items()} for slot in own.slots]
    scouts = [np.array(x) for x in own.scouts]
    alive_E = np.ones(capacity, bool)
    for e, plan in enumerate(plans, start=1):
        for slot in slots:
            for stack in slot.values():
                noise = rng.normal(size=stack.shape[1:]).astype(np.float32)
                stack[e] = stack[0] + (0 if plan == "copy" else 0.2 * noise)
                if plan == "huge body":
                    stack[e] = noise * 10.0 ** rng.integers(2, 38)
                elif plan in ("nan body", "inf body"):
                    stack[e][rng.random(noise.shape) < 0.1] = float(plan[:3])
        for stack in scouts:
            stack[e] = rng.normal(size=stack.shape[1:]).astype(np.float32)
            if plan == "huge scout":
                stack[e] *= 10.0 ** rng.integers(2, 38)
            elif plan == "nan scout":
                stack[e] = np.nan
        alive_E[e] = plan != "dead"
    key_E = np.concatenate([[0], 1 + rng.permutation(capacity - 1)]).astype(np.uint32)
    return dataclasses.replace(
        own,
        slots=tuple({name: jnp.asarray(x) for name, x in slot.items()} for slot in slots),
        scouts=ScoutBank(*map(jnp.asarray, scouts)),
        # An entry that is not alive may have a scout nevertheless.
        width_E=jnp.full(capacity, scouts[1].shape[1], own.width_E.dtype),
        alive_E=jnp.asarray(alive_E),
        key_E=jnp.asarray(key_E),
    )


@jax.jit
def run_safe(parts, tokens_BT):
    """Return safe mode's log probabilities and the state after them."""
    return safe_mode.safe(parts, tokens_BT, safe_mode.safe_state(parts, tokens_BT.shape[0]))


def nats(log_prob_BTV, tokens_BT):
    """Return the cost of each document after its start token."""
    picked = np.take_along_axis(np.asarray(log_prob_BTV)[:, :-1], tokens_BT[:, 1:, None], axis=-1)
    return -picked[..., 0].astype(np.float64).sum(axis=1)


# Without switching, and with one expert shortlisted at a time.
ONE_DOCUMENT = {"discount": 1.0, "backbone_prior": 0.7, "switch_rate": 0.0, "top_k": 1}
MIXTURE_ALONE = {"output_mixture": OutputMixture(prior=0.1, rate=0.05, power=0.6)}


@pytest.mark.parametrize(
    "router",
    [{}, ONE_DOCUMENT, MIXTURE_ALONE],
    ids=["switching", "one document", "output mixture"],
)
def test_safe_mode_keeps_its_bound_with_any_experts(tiny, router):
    """50 random banks, every plan in turn and most of them adversarial, on random tokens."""
    interface = tiny.interface_with(**router)
    n_tokens = 24
    bound = interface.safe_bound(n_tokens - 1)
    rng = np.random.default_rng(0)
    model, excesses = tiny.model(), []
    for case in range(50):
        plans = [PLANS[case % len(PLANS)], *rng.choice(PLANS, 2)]
        bank = random_bank(tiny, rng, plans)
        model.parts = composed.Parts(backbone=tiny.backbone, bank=bank, interface=tiny.interface)
        tokens_BT = tiny.tokens(seed=case, length=n_tokens)
        safe_BTV, _ = run_safe(dataclasses.replace(model.parts, interface=interface), tokens_BT)
        track_BTE = track_records(model.parts, tokens_BT)
        for name, found in (("safe", safe_BTV), ("mix", model(tokens_BT)), ("track", track_BTE)):
            assert np.isfinite(found).all(), f"{name} is not finite with {plans}"
        # Log probabilities are sums of 256 exponentials in float32.
        total_BT = np.exp(np.asarray(safe_BTV, np.float64)).sum(-1)
        np.testing.assert_allclose(total_BT, 1, atol=1e-4, err_msg=str(plans))
        own_BTV = jax.nn.log_softmax(model.path(tokens_BT))
        excess_B = nats(safe_BTV, tokens_BT) - nats(own_BTV, tokens_BT)
        # 23 log probabilities of order 10, each to float32's seven digits.
        assert (excess_B <= bound + 1e-3).all(), f"{excess_B} over {bound} with {plans}"
        excesses.extend(excess_B)
    assert max(excesses) > 0.1 * bound, "no bank came near the bound"


def spoil(expert, value, slots=("1", "2"), name="broken"):
    """Return a copy of an expert whose outputs in some slots are multiplied by, or are, `value`."""
    body = nnx.clone(expert.body)
    for slot in slots:
        w_down = body.slots[slot].w_down
        w_down[...] = w_down[...] * value if np.isfinite(value) else jnp.full_like(w_down, value)
    return dataclasses.replace(expert, name=name, body=body, key=expert.key + 1)


@jax.jit
def run_dense(backbone, slots, tokens_BT, weights_SBTE):
    """Return logits of dense products with given weights in every slot; weight 0 runs no body."""

    def run(layer, x_BTD):
        index = backbone.cfg.slots.index(layer)
        mixed_BTD = jnp.zeros_like(x_BTD)
        for e in range(weights_SBTE.shape[-1]):
            y_BTD = swiglu(x_BTD, *(slots[index][name][e] for name in ("w_gate", "w_up", "w_down")))
            weight_BT1 = weights_SBTE[index, ..., e, None]
            mixed_BTD += jnp.where(weight_BT1 > 0, weight_BT1 * y_BTD, 0)
        return mixed_BTD

    x_BTD, _ = backbone.trunk(tokens_BT)
    return backbone.upper(x_BTD, run)[0]


def mixture_without(model, tokens_BT, broken):
    """Return the logits if some experts had not been chosen in some slots, by dense products.

    Args:
        model: The model.
        tokens_BT: Tokens.
        broken: For every slot, the names of the experts that are broken there.
    """
    routed_BTE, weights_SBTE = np.asarray(model.route(tokens_BT)), []
    for names in broken:
        is_broken_E = np.isin(np.array(model.names, object), list(names))
        weight_BTE = np.where(is_broken_E, 0, routed_BTE)
        total_BT1 = weight_BTE.sum(-1, keepdims=True)
        alone_E = np.eye(len(model.names), dtype=np.float32)[0]
        weight_BTE = np.where(total_BT1 > 0, weight_BTE / np.maximum(total_BT1, 1e-30), alone_E)
        weights_SBTE.append(weight_BTE)
    parts = model.parts
    return run_dense(parts.backbone, parts.bank.slots, tokens_BT, np.stack(weights_SBTE))


# The grouped kernel and dense products sum in another order; logits are of order 5.
REORDERED_SUMS = 1e-4
# A factor of an expert's output, or a value in place of it.
BROKEN = (1e8, 1e20, 1e38, np.inf, np.nan)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("slots", [("1",), ("2",), ("1", "2")], ids="+".join)
def test_mix_runs_as_if_a_broken_expert_had_not_been_chosen(tiny, experts, slots, top_k):
    """Bit-identical for any broken output; its weight goes to the others or the backbone."""
    tokens_BT = tiny.tokens()
    models = [
        tiny.model(experts["a"], spoil(experts["b"], value, slots), top_k=top_k) for value in BROKEN
    ]
    found = [np.asarray(model(tokens_BT)) for model in models]
    for logits_BTV in found[1:]:
        np.testing.assert_array_equal(logits_BTV, found[0])
    model = models[-1]
    weight_BT = np.asarray(model.route(tokens_BT))[..., model.names.index("broken")]
    assert weight_BT.max() > 0.5
    if top_k == 1:
        assert weight_BT.max() == 1, "every token has another choice; choose other tokens"
    broken = [{"broken"} if str(layer) in slots else set() for layer in model.interface.slots]
    expected = mixture_without(model, tokens_BT, broken)
    np.testing.assert_allclose(found[0], expected, atol=REORDERED_SUMS)


def test_mix_is_the_backbone_when_all_experts_are_broken(tiny, experts):
    tokens_BT = tiny.tokens()
    model = tiny.model(*(spoil(experts[name], np.nan, name=name) for name in experts))
    np.testing.assert_allclose(model(tokens_BT), model.path(tokens_BT), atol=REORDERED_SUMS)
    for _, made in model.contributions(tokens_BT).values():
        assert made > 0


# Other experts keep some thousandths of the weight.
OTHERS_WEIGHT = 0.01


@pytest.mark.parametrize("router", [{}, SWITCHING], ids=["track records", "switching"])
@pytest.mark.parametrize(
    ("value", "slots"),
    [(np.nan, ("1", "2")), (1e10, ("1", "2")), (np.nan, ("2",))],
    ids=["nan", "huge", "nan in one slot"],
)
def test_a_broken_expert_with_a_copied_scout_changes_nothing(tiny, value, slots, router):
    """It is routed half of the expert's weight, which goes back to the expert."""
    sure = tiny.expert("sure")
    sure.scout.b_out[...] = sure.scout.b_out[...].at[7].set(60.0)
    tokens_BT = np.full((2, 24), 7, np.int32)
    tokens_BT[:, 0] = 0
    copy, silent = spoil(sure, value, slots), spoil(sure, 0.0, slots)
    both, alone = tiny.model(sure, copy, **router), tiny.model(sure, **router)
    weight_TE = np.asarray(both.route(tokens_BT))[0, 12:]
    np.testing.assert_allclose(weight_TE[:, 1:3], 0.5, atol=1e-2)
    logits_TV = np.asarray(alone(tokens_BT))[0, 12:]
    np.testing.assert_allclose(np.asarray(both(tokens_BT))[0, 12:], logits_TV, atol=OTHERS_WEIGHT)
    lost_TV = np.asarray(tiny.model(sure, silent, **router)(tokens_BT))[0, 12:]
    assert (np.abs(lost_TV - logits_TV).max(axis=-1) > 10 * OTHERS_WEIGHT).all(), (
        "the copy has no effect to remove"
    )
    counts = both.contributions(tokens_BT)
    assert counts["broken"].zeroed == counts["broken"].made * len(slots) // 2 > 0
    assert counts["sure"].zeroed == counts["backbone"].zeroed == 0


def test_output_bounds_are_those_of_the_interface(tiny, experts):
    tokens_BT = tiny.tokens()
    tight = tiny.model(*experts.values(), output_bounds=(0.01, 0.01))(tokens_BT)
    usual = tiny.model(*experts.values())(tokens_BT)
    assert (np.abs(np.asarray(tight) - np.asarray(usual))[:, 1:].max(axis=-1) > 1e-3).any()


def test_mix_stays_finite_with_an_adversarial_expert(tiny, experts):
    tokens_BT = tiny.tokens()
    for exponent in (10, 20, 38):
        adversarial = tiny.expert("adversarial", noise=float(f"1e{exponent}"), scout_noise=10)
        model = tiny.model(experts["a"], adversarial)
        assert np.isfinite(np.asarray(model(tokens_BT))).all(), f"bodies of order 1e{exponent}"


def test_a_path_that_is_never_shortlisted_keeps_its_prior(tiny, experts):
    """Exactly its prior share of the posterior."""
    model = tiny.model(*experts.values(), **ONE_DOCUMENT)
    tokens_BT = tiny.tokens()
    _, state = run_safe(model.parts, tokens_BT)
    track_BTE = np.asarray(track_records(model.parts, tokens_BT))
    # No expert has a track record at the start token, and the tie goes to the smallest key.
    key_E = np.asarray(model.parts.bank.key_E)
    shortlisted = {int(e) for e in track_BTE[0, 1:-1, 1:].argmax(-1) + 1} | {
        int(key_E[1:].argmin()) + 1
    }
    posterior_E = np.exp(np.asarray(state.posterior_BE))[0]
    assert posterior_E.sum() == pytest.approx(1, abs=1e-5)  # a float32 softmax
    others = [i for i, e in enumerate(np.argsort(key_E)) if e not in shortlisted | {0}]
    assert others, "every expert was shortlisted; choose other tokens"
    for i in others:
        assert posterior_E[i] == pytest.approx(0.3 / 3, rel=1e-5)


def test_safe_mode_is_the_bayesian_mixture_of_paths_that_are_always_shortlisted(tiny):
    model = tiny.model(tiny.expert("far", noise=3.0))
    tokens_BT = tiny.tokens()
    own_B, body_B = (
        nats(jax.nn.log_softmax(model.path(tokens_BT, name)), tokens_BT)
        for name in ("backbone", "far")
    )
    assert np.abs(own_B - body_B).max() > 0.5, "the paths must differ"
    log_prob_BTV, _ = run_safe(
        tiny.model(tiny.expert("far", noise=3.0), **ONE_DOCUMENT).parts, tokens_BT
    )
    expected_B = -np.logaddexp(np.log(0.7) - own_B, np.log(0.3) - body_B)
    # 23 log probabilities of order 6, each to float32's seven digits.
    np.testing.assert_allclose(nats(log_prob_BTV, tokens_BT), expected_B, atol=1e-3)


# ------------------------------------------------------------------ counts of zeroed contributions


def test_zeroed_contributions_are_counted_by_expert(tiny, experts):
    """All contributions of a broken body, and none of a sound one."""
    tokens_BT = tiny.tokens()
    broken = tiny.expert("huge", noise=1e6)
    broken.scout.b_out[...] = experts["a"].scout.b_out[...]
    model = tiny.model(experts["a"], broken)
    counts = model.contributions(tokens_BT)
    chosen = (np.asarray(model.route(tokens_BT)) > 0).sum(axis=(0, 1))
    n_slots = len(model.interface.slots)
    assert counts.keys() == {"backbone", "a", "huge"}
    for name, (zeroed, made) in counts.items():
        assert made == n_slots * chosen[model.names.index(name)]
        assert zeroed == (made if name == "huge" else 0)
    assert counts["huge"].made > 0


@pytest.mark.parametrize("plan", ["nan body", "inf body", "huge body"])
def test_zeroed_contributions_are_counted_in_both_modes(tiny, plan):
    """Padding rows of a broken body are broken too, and must not be counted."""
    bank = random_bank(tiny, np.random.default_rng(1), [plan, "sound", "sound"])
    parts = composed.Parts(backbone=tiny.backbone, bank=bank, interface=tiny.interface)
    model, tokens_BT = tiny.model(), tiny.tokens()
    model.parts, model.names = parts, ("backbone", "broken", "b", "c")
    counts = model.contributions(tokens_BT)
    n_chosen = (np.asarray(model.route(tokens_BT)) > 0).sum()
    assert sum(made for _, made in counts.values()) == len(model.interface.slots) * n_chosen
    assert 0 < counts["broken"].zeroed <= counts["broken"].made
    assert all(counts[name].zeroed == 0 for name in ("backbone", "b", "c"))
    tally = run_safe(parts, tokens_BT)[1].tally
    assert int(tally.made_E[0]) == tokens_BT.size, "the backbone's path always runs"
    assert np.asarray(tally.zeroed_E)[[0, 2, 3]].sum() == 0
    if plan == "nan body":
        assert 0 < int(tally.zeroed_E[1]) <= int(tally.made_E[1])
