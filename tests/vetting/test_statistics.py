import numpy as np
import pytest

from composable.vetting.statistics import is_above, ratio_interval, upper_mean

DRAWS = {
    "rare": lambda rng, n: (rng.random(n) < 0.05).astype(float),
    "even": lambda rng, n: rng.random(n),
    "skewed": lambda rng, n: rng.beta(0.1, 1.9, n),
}
MEANS = {"rare": 0.05, "even": 0.5, "skewed": 0.05}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("n", [3, 8, 60])
def test_the_bound_covers_the_mean_at_the_stated_confidence(kind, n):
    """Of 400 samples at most 5 % may miss; 8 % is three standard errors more."""
    rng = np.random.default_rng(0)
    missed = sum(upper_mean(DRAWS[kind](rng, n)) < MEANS[kind] for _ in range(400))
    assert missed <= 0.08 * 400


def test_more_documents_tighten_the_bound_no_further_than_any_bound_can():
    previous = 1.0
    for n in (3, 8, 32, 128):
        bound = upper_mean(np.zeros(n))
        assert 1 - 0.05 ** (1 / n) <= bound < previous
        previous = bound
    assert previous < 0.04


def test_the_bound_lies_above_the_mean_and_reaches_one():
    for share_B in (np.full(10, 0.4), np.linspace(0, 1, 20), np.ones(5)):
        assert share_B.mean() <= upper_mean(share_B) <= 1
    assert upper_mean(np.ones(5)) == pytest.approx(1)


@pytest.mark.parametrize(("n", "may_miss"), [(8, 0.1), (30, 0.08)])
def test_the_interval_covers_the_ratio_at_the_stated_confidence(n, may_miss):
    """Documents of very different lengths, for which it is slightly narrow when they are few."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        bytes_B = rng.uniform(100, 1000, n)
        nats_B = bytes_B * rng.normal(0.7, 0.1, n)
        low, high = ratio_interval(nats_B, bytes_B)
        missed += not low < 0.7 < high
    assert missed <= may_miss * 400


def test_one_document_has_no_interval():
    assert ratio_interval(np.array([1.0]), np.array([2.0])) == (-np.inf, np.inf)


def test_a_difference_counts_if_it_is_beyond_noise_and_matters():
    rng = np.random.default_rng(0)
    noise_B = rng.normal(size=8)
    noise_B -= noise_B.mean()
    assert is_above(0.1 + 0.05 * noise_B, limit=0.01)
    assert not is_above(0.1 + noise_B, limit=0.01), "it may be noise"
    assert not is_above(0.001 + 1e-6 * noise_B, limit=0.01), "it does not matter"
    assert not is_above(-0.1 + 0.05 * noise_B, limit=0.01)
    assert is_above(np.full(4, 0.1), limit=0.01)
    assert is_above(np.array([0.1]), limit=0.01), "of one document no noise is known"
    assert is_above(np.array([0.0, np.nan]), limit=0.01), "what is not finite got worse"
    assert is_above(np.array([0.0, np.inf]), limit=0.01)
    assert not is_above(np.array([0.0, -np.inf]), limit=0.01)


@pytest.mark.parametrize(("n", "t"), [(2, 6.314), (5, 2.132), (8, 1.895), (30, 1.699)])
def test_the_threshold_is_that_of_students_t_test(n, t):
    """Tables give t at 95 %, one-sided, for n - 1 degrees of freedom."""
    base_B = np.arange(n) - (n - 1) / 2
    error = base_B.std(ddof=1) / np.sqrt(n)
    assert is_above(1.01 * t * error + base_B, limit=0)
    assert not is_above(0.99 * t * error + base_B, limit=0)
