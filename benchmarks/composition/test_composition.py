"""The rivals of the composition benchmark, on cases whose answer is known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.composition import ensembles, methods
from benchmarks.composition.report import Table, best_settings, mean_recovery
from benchmarks.composition.rivals import nearest_rows
from composable.interface import SwitchingFilter
from composable.model.router import ScoutBank

pytestmark = pytest.mark.slow

TOKENS = 32


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model(tiny.expert("ant"), tiny.expert("bee"), capacity=4)


@pytest.fixture(scope="module")
def stack(model):
    return methods.stack_of(model.parts, 3)


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokens(batch=2, length=TOKENS + 1)


def run(step, tokens_BT):
    """Run a step on a document in two windows, as the benchmark does."""
    half, state, found = TOKENS // 2, None, []
    for at in (0, half):
        here = tokens_BT[:, at : at + half + 1]
        nats, state = step(here[:, :-1], here[:, 1:], state)
        found.append(np.asarray(nats))
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "mix": SwitchingFilter(
                power=0.35,
                backbone_prior=0.3,
                max_expert_prior=0.2,
                switch_rate=0.01,
                margin=0.1,
                floor=0.05,
                top_k=3,
            )
        },
    ],
)
def test_the_open_router_is_the_shipped_one(tiny, model, stack, tokens, settings):
    interface = dataclasses.replace(model.interface, **settings)
    parts = dataclasses.replace(model.parts, interface=interface)
    scouts = ScoutBank(*(x[:3] for x in parts.bank.scouts))
    gate = methods.Scouts(scouts=scouts, interface=interface, tap=tiny.cfg.tap)
    open_one = run(methods.mixture(tiny.backbone, stack, gate), tokens)
    shipped = run(methods.shipped(parts, "mix"), tokens)
    np.testing.assert_allclose(open_one, shipped, rtol=1e-4, atol=1e-4)


def test_a_gate_that_always_says_the_same_is_one_path(tiny, stack, tokens):
    gate = methods.Constant(jnp.array([0.0, 1.0, 0.0]))
    mixed = run(methods.mixture(tiny.backbone, stack, gate), tokens)
    alone = run(methods.path(tiny.backbone, methods.entry(stack, 1)), tokens)
    np.testing.assert_allclose(mixed, alone, rtol=1e-4, atol=1e-4)


def test_all_paths_are_the_paths(tiny, stack, tokens):
    every = run(ensembles.all_paths(tiny.backbone, stack), tokens)
    for index in range(3):
        one = run(methods.path(tiny.backbone, methods.entry(stack, index)), tokens)
        np.testing.assert_allclose(every[..., index], one, rtol=1e-4, atol=1e-4)


def test_pooled_features_go_on_where_a_window_ended():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10, 3)), jnp.float32)
    whole, _ = methods.pool(x, None)
    first, state = methods.pool(x[:, :4], None)
    second, _ = methods.pool(x[:, 4:], state)
    np.testing.assert_allclose(whole, jnp.concatenate([first, second], 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole[:, 0], x[:, 0], rtol=1e-5, atol=1e-6)


def test_ties_elects_signs_and_averages_those_that_agree():
    change = np.array([[4.0, -3.0, 0.1, 2.0], [2.0, 1.0, 0.2, -2.5]], np.float32)
    own = np.ones((1, 4), np.float32)
    stack = ({"w": jnp.asarray(np.concatenate([own, own + change]))},)
    merged = methods.ties(stack, scale=1.0, kept=0.75)[0]["w"]
    # Trimmed are the smallest quarter of each: 0.1 and 0.2.
    np.testing.assert_allclose(merged, [1 + 3.0, 1 - 3.0, 1.0, 1 - 2.5], rtol=1e-6)


def test_an_ensemble_follows_who_predicted_better():
    cost = np.tile(np.array([2.0, 1.0]), (1, 50, 1))
    weight = np.exp(ensembles.posterior(cost, 1.0, np.array([0.5, 0.5])))
    np.testing.assert_allclose(weight[0, 0], [0.5, 0.5])
    np.testing.assert_allclose(weight[0, 3], 1 / (1 + np.exp([3.0, -3.0])))
    found = ensembles.ensemble(cost, np.log(weight))
    assert found[0, 0] == pytest.approx(-np.log(0.5 * (np.exp(-2) + np.exp(-1))))
    assert found[0, -1] == pytest.approx(1.0)
    updating = np.exp(ensembles.demix_updating(cost))
    assert updating[0, -1, 1] > 0.99


def test_ensembles_are_the_arithmetic_on_every_path(model, stack, tokens):
    """Without a scouts' share, which the tiny interface does not have."""
    rules = ensembles.ensemble_rules(model.interface.backbone_prior)
    found_NTK = run(ensembles.ensembles(model.parts, list(rules.values())), tokens)
    every = run(ensembles.all_paths(model.parts.backbone, stack), tokens)
    for index, rule in enumerate(rules.values()):
        weight = ensembles.posterior(every, rule.discount, ensembles.ensemble_prior(3, rule))
        expected = ensembles.ensemble(every, weight)
        np.testing.assert_allclose(found_NTK[..., index], expected, rtol=1e-4, atol=1e-4)


def test_a_proxy_is_the_public_text_most_like_the_domain():
    rng = np.random.default_rng(0)
    mean_ED = np.array([[0.0, 0.0, 5.0], [3.0, 0.0, 5.0], [0.0, -3.0, 5.0]])
    # The last feature has the largest values and the largest spread, and tells nothing.
    spread_EDD = np.stack([np.diag([1.0, 1.0, 100.0])] * 3)
    public_RD = rng.normal(scale=[0.1, 0.1, 10.0], size=(50, 3)) + mean_ED[0]
    public_RD[[7, 9], 0] = 2.0, 1.0
    public_RD[[30, 31], 1] = -1.0, -2.0
    found = nearest_rows(public_RD, mean_ED, spread_EDD, 2)
    np.testing.assert_array_equal(found, [[7, 9], [31, 30]])


def test_recovery_is_the_share_of_the_gap():
    assert mean_recovery({"a": 4.0}, {"a": 2.0}, {"a": 2.5}) == 0.75
    rows = {"a": methods.Rows.of([b"x" * 600], lambda d: [0, *d], 1)}
    table = Table(rows, ["a"])
    for name, cost in (("backbone", 4.0), ("oracle", 2.0), ("mix", 2.5)):
        nats_NT = np.full((1, methods.WINDOW), cost * np.log(2))
        table.add(name, {"a": rows["a"].total(nats_NT)})
    assert table.bits("mix", "a") == pytest.approx(2.5)
    assert table.recovery("mix") == pytest.approx(0.75)
    assert table.interval("mix", mean_recovery) == [0.75, 0.75]


def test_a_rival_is_reported_with_its_best_setting():
    rows = {"a": methods.Rows.of([b"x" * 600], lambda d: [0, *d], 1)}
    table = Table(rows, ["a"])
    bits = {
        **{"flexolmo top2 bias 0.0": 3.0, "flexolmo top4 bias 0.0": 2.5},
        **{
            "flexolmo-tuned top2 bias 0.0 steps 10": 2.0,
            "flexolmo-tuned top4 bias 0.0 steps 10": 4.0,
        },
    }
    for name, cost in bits.items():
        nats_NT = np.full((1, methods.WINDOW), cost * np.log(2))
        table.add(name, {"a": rows["a"].total(nats_NT)})
    assert best_settings(table) == {
        "flexolmo": "flexolmo top4 bias 0.0",
        "flexolmo-tuned": "flexolmo-tuned top2 bias 0.0 steps 10",
    }
