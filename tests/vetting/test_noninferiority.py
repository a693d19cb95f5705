"""How often the rule of merges errs, by simulation, and what it reports of too little text."""

import numpy as np
import pytest

from composable.vetting.noninferiority import MARGIN, MIN_DOCUMENTS, LossChange, compare_losses

# Changes of documents as shares, around a mean: alike; all harm in a fifth; a few far off.
SPREADS = {
    "alike": lambda rng, mean, n: rng.normal(mean, 0.03, n),
    "a fifth": lambda rng, mean, n: 5 * mean * (rng.random(n) < 0.2) + rng.normal(0, 0.01, size=n),
    "far off": lambda rng, mean, n: mean + 0.02 * rng.standard_t(3, n),
    "skewed": lambda rng, mean, n: mean + 0.03 * (rng.exponential(1, n) - 1),
}


def share(outcome, *, mean, n, spread="alike", n_texts=400):
    """Return the share of simulated texts of uneven documents on which the rule finds something."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(n_texts):
        before_B = np.clip(rng.lognormal(7, 0.8, n), 100, 2048) * rng.lognormal(0.3, 0.25, n)
        after_B = before_B * (1 + SPREADS[spread](rng, mean, n))
        found += compare_losses(before_B, after_B).outcome == outcome
    return found / n_texts


@pytest.mark.parametrize("n", [MIN_DOCUMENTS, 40])
@pytest.mark.parametrize("spread", SPREADS)
def test_what_is_five_percent_worse_is_seldom_accepted(spread, n):
    assert share("not worse", mean=0.05, n=n, spread=spread) <= 0.05


@pytest.mark.parametrize("spread", SPREADS)
def test_what_is_worse_by_the_margin_is_seldom_accepted(spread):
    """Normal ones give 5 %; where few documents are far worse than most, it is nearly 15 %."""
    assert share("not worse", mean=MARGIN, n=20, spread=spread) <= 0.15
    assert share("not worse", mean=2 * MARGIN, n=40, spread=spread) <= 0.05


def test_enough_text_shows_what_is_equal_and_what_is_worse():
    assert share("not worse", mean=0.0, n=MIN_DOCUMENTS) < 0.5
    assert share("not worse", mean=0.0, n=150) > 0.9
    assert share("not worse", mean=-0.03, n=20) > 0.9
    assert share("worse", mean=0.05, n=20) > 0.9
    assert share("worse", mean=0.0, n=20) < 0.08


def test_the_documents_that_are_needed_decide():
    change_B = np.random.default_rng(1).normal(0, 0.06, 20)
    change_B -= change_B.mean()
    found = compare_losses(np.ones(20), 1 + change_B)
    assert found.outcome == "undecided"
    more_B = np.tile(change_B, found.needed // 20 + 1)
    assert compare_losses(np.ones(len(more_B)), 1 + more_B).outcome == "not worse"
    fewer_B = more_B[: int(0.8 * found.needed) // 20 * 20]
    assert compare_losses(np.ones(len(fewer_B)), 1 + fewer_B).outcome == "undecided"


def test_few_documents_show_nothing():
    same_B = np.ones(MIN_DOCUMENTS)
    assert compare_losses(same_B, same_B).outcome == "not worse"
    assert compare_losses(same_B[1:], same_B[1:]).outcome == "undecided"
    single = compare_losses(same_B[:1], same_B[:1])
    assert single.outcome == "undecided" and single.needed == MIN_DOCUMENTS


def test_what_is_not_finite_is_worse():
    after_B = np.array([np.nan, *np.ones(19)])
    assert compare_losses(np.ones(20), after_B).outcome == "worse"
    assert LossChange(change=np.inf, low=0.0, high=np.inf, documents=20).outcome == "worse"
